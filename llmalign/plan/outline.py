"""Text models without weights: from the config alone, with any number of layers, with or without an adapter."""

import copy
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from llmalign.errors import UserError
from llmalign.trainers.loading import ModelConfig, get_peft_config, refuse_vision

logger = logging.getLogger(__name__)

#: bytes of a weight that bitsandbytes holds: its bits, and float32 scales of blocks of 64 (4 bit), or of a row (8 bit)
FOUR_BIT = 0.5 + 4 / 64
FOUR_BIT_TWICE = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales quantized again
EIGHT_BIT = 1.0
NEVER_QUANTIZED = ("lm_head", "lora_", "score")
PLAIN = ("eager", "sdpa")
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Weights:
    """Numbers of a model and the bytes that they take."""

    count: int
    trained: int
    bytes: float
    trained_bytes: float
    #: numbers of the largest layer, and of what belongs to no layer (embeddings, head), for what is gathered
    largest_layer: int = 0
    outside: int = 0


@dataclass(frozen=True)
class TextOutline:
    """What a text model would be; `adapter` is a PEFT config, `quantized` bytes a weight of its linear layers."""

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    adapter: Any = None
    quantized: float | None = None
    scorer: bool = False
    trust_remote_code: bool = False

    @property
    def layers(self) -> int:
        """Layers of the decoder."""
        return int(self.config.num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.config.vocab_size)

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat."""
        kinds = self.config.to_dict().get("layer_types")
        if not kinds:
            return 1
        return next((n for n in range(1, len(kinds)) if kinds == (kinds[:n] * len(kinds))[: len(kinds)]), len(kinds))

    def build(self, layers: int | None = None, *, dtype: torch.dtype | None = None) -> Any:
        """The model on the meta device; in training mode, dropout off as the trainers switch it off."""
        config = copy.deepcopy(self.config)
        if layers is not None:
            config.num_hidden_layers = layers
            if config.to_dict().get("layer_types"):
                config.layer_types = config.layer_types[:layers]
        kind = AutoModelForSequenceClassification if self.scorer else AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": dtype or self.dtype, "trust_remote_code": self.trust_remote_code}
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config, attn_implementation=config._attn_implementation, **options)
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if "attention_dropout" in vars(part):
                part.attention_dropout = 0.0  # type: ignore[assignment]
        if self.adapter is not None:
            model = get_peft_model(model, copy.deepcopy(self.adapter), low_cpu_mem_usage=True)
            if self.quantized is not None or dtype is not None:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def weights(self) -> Weights:
        """Numbers and bytes of the whole model."""
        model = self.build()
        linear = {
            id(part.weight)
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear) and not any(word in name for word in NEVER_QUANTIZED)
        }
        held = 0.0
        for parameter in model.parameters():
            small = id(parameter) in linear and not parameter.requires_grad
            size = self.quantized if self.quantized is not None and small else parameter.itemsize
            held += parameter.numel() * size
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        layers = decoder_layers(model, self.layers)
        sizes = [sum(map(torch.numel, layer.parameters())) for layer in layers or ()]
        count = sum(map(torch.numel, model.parameters()))
        return Weights(
            count=count,
            trained=sum(map(torch.numel, trained)),
            bytes=held,
            trained_bytes=sum(parameter.numel() * parameter.itemsize for parameter in trained),
            largest_layer=max(sizes, default=0),
            outside=count - sum(sizes),
        )


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The list of a model's layers; None where it has none of that length."""
    return next((part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)


def text_outline(path: str, options: ModelConfig, *, bf16: bool, scorer: bool, trust_remote_code: bool) -> TextOutline:
    """From a folder or a Hub name, its config alone. Raises UserError where there is none, or for no text model."""
    adapter = get_peft_config(options if not scorer else replace(options, lora_task_type="SEQ_CLS"))
    folder = Path(path)
    if (folder / ADAPTER_FILE).is_file():
        adapter = PeftConfig.from_pretrained(path)
        path = str(adapter.base_model_name_or_path)
        adapter.inference_mode = False
    try:
        config = AutoConfig.from_pretrained(path, revision=options.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"no config of a model could be found at {path!r} ({first}); name a folder that holds its config.json with "
            "--model_name_or_path"
        ) from error
    refuse_vision(config)
    if scorer:
        config.num_labels = 1
    quantized = None
    if options.load_in_4bit:
        quantized = FOUR_BIT_TWICE if options.use_bnb_nested_quant else FOUR_BIT
    elif options.load_in_8bit:
        quantized = EIGHT_BIT
    outline = TextOutline(
        name=path,
        config=config,
        dtype=_dtype(options.dtype, config, bf16=bf16, frozen=adapter is not None),
        quantized=quantized,
        scorer=scorer,
        trust_remote_code=trust_remote_code,
    )
    # A fused kernel that is not installed here holds as much as PyTorch's own; left open, the architecture decides.
    asked = options.attn_implementation
    config._attn_implementation = asked if asked in (None, *PLAIN) else "sdpa"
    config._attn_implementation = outline.build(outline.period).config._attn_implementation
    return replace(outline, adapter=adapter)


def _dtype(named: str | None, config: PretrainedConfig, *, bf16: bool, frozen: bool) -> torch.dtype:
    if named == "auto":
        return config.dtype or torch.float32
    if named is not None:
        return getattr(torch, named)
    return torch.bfloat16 if frozen and bf16 else torch.float32


def checkpointed(model: Any) -> None:
    """Let a model compute its activations again in the backward pass, as Trainer does."""
    if not isinstance(model, PreTrainedModel):
        model.enable_input_require_grads()
        model = model.get_base_model()
    model.activation_checkpointing_enable()
