"""Models of Llama's shape written as GGUF, the files that llama.cpp and what is built on it load."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmalign.errors import UserError
from llmalign.export.files import file_aside
from llmalign.export.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary

logger = logging.getLogger(__name__)

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0,
}  # fmt: skip
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
# llama.cpp rotates neighbours in models of its architecture llama, and the two halves of a head in the others.
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
LARGEST_F16 = 65504.0
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Exported:
    """The file, llama.cpp's name of the architecture, and how many tensors and bytes there are."""

    path: Path
    architecture: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class _Plan:
    """One tensor: its name in GGUF, where its values are, and how they are stored."""

    name: str
    values: Tensor
    kind: gguf.GGMLQuantizationType
    heads: int | None  # whose rows are interleaved


def require_kind(dtype: str) -> None:
    """Raise UserError for a dtype that is not one of a GGUF file's."""
    if dtype not in KINDS:
        raise UserError(f"--dtype of a GGUF file is one of {', '.join(KINDS)}, not {dtype!r}.")


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str,
    *,
    dtype: str = "f16",
    context: int | None = None,
    chat_template: str | None = None,
    name: str | None = None,
) -> Exported:
    """Write a whole Llama, Mistral, Qwen2 or Qwen3 with its tokenizer to one GGUF file, and read its shapes back.

    `dtype` (f32, f16, bf16, q8_0) is that of the matrices; vectors stay in float32, and a matrix whose rows are not a
    multiple of 32 long is kept in f16 where q8_0 was asked for. `context` (tokens) replaces the length that the model
    was made for, `chat_template` the tokenizer's. Written aside and renamed; tensor by tensor, so that no second copy
    of the model is held. Raises UserError for other architectures, positions, activations and tokenizers than
    llama.cpp has, and for weights too large for f16. Not covered: files in parts, k-quants, mixtures of experts.
    """
    require_kind(dtype)
    path = Path(path).expanduser()
    arch = _architecture(model)
    vocabulary = read_vocabulary(tokenizer, model, chat_template)
    plans = list(_plans(model, arch, KINDS[dtype]))
    with file_aside(path) as aside:
        writer = gguf.GGUFWriter(aside, gguf.MODEL_ARCH_NAMES[arch])
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            if name:
                writer.add_name(name)
            writer.add_file_type(_FILE_TYPES[dtype])
            if dtype == "q8_0":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _write_shape(writer, model, context)
            write_vocabulary(writer, vocabulary)
            _write_tensors(writer, plans)
        finally:
            writer.close()
        _read_back(aside, plans, vocabulary)
    return Exported(path, gguf.MODEL_ARCH_NAMES[arch], len(plans), path.stat().st_size)


def _architecture(model: PreTrainedModel) -> gguf.MODEL_ARCH:
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise UserError(f"{kind} cannot be written to GGUF here; {', '.join(ARCHITECTURES)} can")
    config: Any = model.config
    if config.hidden_act != "silu":
        raise UserError(f"the model's activation is {config.hidden_act}; llama.cpp has silu for this architecture")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("the model rotates a part of each head, which llama.cpp does not do for this architecture")
    settings = config.to_dict()
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        logger.warning("llama.cpp attends to the whole context, the model to the last %d tokens.", window)
    return ARCHITECTURES[kind]


def _write_shape(writer: gguf.GGUFWriter, model: PreTrainedModel, context: int | None) -> None:
    config: Any = model.config
    head = _head_size(model)
    writer.add_context_length(context or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    _write_rope_scaling(writer, config)


def _write_rope_scaling(writer: gguf.GGUFWriter, config: Any) -> None:
    """Linear and YaRN by their keys; Llama 3's by factors among the tensors. Raises UserError for any other."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return
    if kind not in ("linear", "yarn"):
        raise UserError(f"positions scaled by {kind!r} cannot be written to GGUF here; linear, yarn and llama3 can")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "linear":
        return
    own = {key for key in ("mscale", "mscale_all_dim") if rope.get(key)}
    default = rope.get("attention_factor") in (None, 0.1 * math.log(rope["factor"]) + 1.0)
    if own or not default or rope.get("truncate", True) is not True:
        raise UserError("YaRN with an attention factor or a truncation of its own cannot be written to GGUF here")
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _plans(model: PreTrainedModel, arch: gguf.MODEL_ARCH, kind: gguf.GGMLQuantizationType) -> Iterator[_Plan]:
    config: Any = model.config
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if config.rope_parameters.get("rope_type") == "llama3":
        if arch is not gguf.MODEL_ARCH.LLAMA:
            raise UserError("llama.cpp has Llama 3's scaling of positions for models of Llama's architecture alone")
        yield _Plan(ROPE_FACTORS, _rope_factors(config, _head_size(model)), gguf.GGMLQuantizationType.F32, None)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for own, values in model.state_dict().items():
        if own == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embeddings where there is no output matrix
        target = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if target is None or not values.is_floating_point():
            raise UserError(f"the weight {own} has no place in a GGUF file of this architecture")
        heads = interleaved.get(own.split(".")[-2]) if arch is gguf.MODEL_ARCH.LLAMA else None
        yield _Plan(target, values, _kind(own, values, kind), heads)


def _kind(name: str, values: Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if values.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if kind is gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        logger.info("%s has rows of %d values, no multiple of 32: it is kept in f16.", name, values.shape[-1])
        kind = gguf.GGMLQuantizationType.F16
    if kind is gguf.GGMLQuantizationType.F16 and float(values.abs().max()) > LARGEST_F16:
        raise UserError(f"{name} has values above {LARGEST_F16:.0f}, which f16 cannot hold: give --dtype bf16")
    return kind


def _rope_factors(config: Any, head: int) -> Tensor:
    """By how much each frequency is divided, (head size / 2)."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, head, 2, dtype=torch.float32) / head
    return 1.0 / config.rope_parameters["rope_theta"] ** places / scaled


def _head_size(model: PreTrainedModel) -> int:
    return model.get_submodule("model.layers.0.self_attn").head_dim


def _write_tensors(writer: gguf.GGUFWriter, plans: list[_Plan]) -> None:
    for plan in plans:
        shape = _stored_shape(plan)
        size = math.prod(shape) * _element(plan.kind).itemsize
        writer.add_tensor_info(plan.name, shape, _element(plan.kind), size, raw_dtype=plan.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for plan in plans:
        values = plan.values.detach().to("cpu", torch.float32).numpy()
        if plan.heads is not None:
            values = _interleave(values, plan.heads)
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), plan.kind))


def _element(kind: gguf.GGMLQuantizationType) -> np.dtype:
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    return np.dtype(plain.get(kind, np.uint8))


def _stored_shape(plan: _Plan) -> tuple[int, ...]:
    """In elements for f32 and f16, in bytes for the others, as the writer takes it."""
    shape = tuple(plan.values.shape)
    return shape if _element(plan.kind).itemsize > 1 else gguf.quant_shape_to_byte_shape(shape, plan.kind)


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a matrix (heads * size, columns), or entries of its bias, as llama.cpp rotates them: neighbours."""
    rows = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _read_back(path: Path, plans: list[_Plan], vocabulary: Vocabulary) -> None:
    """Raise RuntimeError where the file does not hold every tensor and token that was to be written."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: (tuple(map(int, tensor.shape))[::-1], tensor.tensor_type) for tensor in reader.tensors}
    expected = {plan.name: (tuple(plan.values.shape), plan.kind) for plan in plans}
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if found != expected or tokens is None or len(tokens.data) != len(vocabulary.tokens):
        raise RuntimeError(f"{path} does not read back as it was written")
