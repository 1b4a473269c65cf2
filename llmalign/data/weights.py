"""Which weights scored something: a digest of all that a model's log-probs depend on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmalign.errors import UserError

# Of a config: what names files, versions and special tokens, or asks for other outputs. All else may change scores.
SILENT_KEYS = frozenset(
    """
    architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label initializer_range label2id
    output_attentions output_hidden_states pad_token_id problem_type return_dict tie_word_embeddings torch_dtype
    transformers_version use_cache
    """.split()
)
SILENT_ADAPTER_KEYS = frozenset(
    "auto_mapping base_model_name_or_path inference_mode init_lora_weights peft_version revision task_type".split()
)
WRAPPED = "base_model.model."  # what PEFT puts before every name
INNER = ("base_layer", "original_module")  # what PEFT calls a layer that it wraps
BETWEEN = ".token_adapter"  # what PEFT puts between a layer with trained tokens and its `base_layer`


def weights_digest(
    model: nn.Module,
    adapter: str | None = None,
    *,
    gather: Callable[[nn.Parameter], AbstractContextManager[Any]] = nullcontext,
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, and over what of the config changes scores.

    Of a model with PEFT adapters, `adapter` names the one that is switched on; None, none is, and the digest is that of
    the plain base model. `gather` makes a sharded parameter whole for a moment (DeepSpeed's GatheredParameters); then
    all ranks have to call this. Raises UserError where weights are offloaded. Not covered: wrappers of DDP and FSDP,
    prompt-learning adapters.
    """
    state = model.state_dict(keep_vars=True)
    config: Any = model.config
    values = config if isinstance(config, Mapping) else config.to_dict()  # diffusers' configs are mappings
    said: dict[str, Any] = {
        "config": {k: v for k, v in values.items() if k not in SILENT_KEYS and not k.startswith("_")}
    }
    if adapter is not None:
        settings: Any = model.peft_config
        said["adapter"] = {k: v for k, v in settings[adapter].to_dict().items() if k not in SILENT_ADAPTER_KEYS}
    whole = hashlib.sha256(json.dumps(said, sort_keys=True, default=_plain).encode())
    done: dict[int, bytes] = {}  # tied weights are read once
    for name, stored in sorted(_names(state, adapter).items()):
        tensor = state[stored]
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in done:
            with gather(tensor) if isinstance(tensor, nn.Parameter) else nullcontext():
                done[id(tensor)] = _tensor_digest(stored, tensor)
        whole.update(name.encode() + b"\0" + done[id(tensor)])
    return whole.hexdigest()


def _names(state: dict[str, Any], adapter: str | None) -> dict[str, str]:
    """Names in a state that take part, by what they would be called in the plain base model.

    PEFT keeps a layer that it wraps as `base_layer` or `original_module` inside its own, and what belongs to adapters
    beside it, under their names. An adapter's name is left out: a copy of an adapter scores as the adapter does.
    """
    wrappers = {name[: name.index(f".{inner}.")] for name in state for inner in INNER if f".{inner}." in name}
    taken = {}
    for stored in state:
        owner = _owner(stored, wrappers)
        rest = "" if owner is None else stored[len(owner) + 1 :]
        inner, _, inside = rest.partition(".")
        if owner is None:
            name = stored
        elif inner in INNER:
            name = f"{owner}.{inside}"
        else:
            parts = rest.split(".")
            if adapter not in parts:
                continue
            parts.remove(adapter)
            name = f"{owner}.{'.'.join(parts)}"
        taken[name.removeprefix(WRAPPED).replace(BETWEEN, "")] = stored
    return taken


def _owner(name: str, wrappers: set[str]) -> str | None:
    """The outermost wrapped layer that a name belongs to."""
    parts = name.split(".")
    return next((found for n in range(1, len(parts)) if (found := ".".join(parts[:n])) in wrappers), None)


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise UserError(
            f"the weight {name} is offloaded and cannot be read, so nothing can be kept under its digest; set "
            "precompute_ref_log_probs: false"
        )
    if not tensor.numel():  # two models of one shape would have the same digest
        raise ValueError(f"the parameter {name} is empty here, as sharded ones are: pass `gather`")
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def _plain(value: Any) -> Any:
    """Sets in order and enumerations as text, for JSON."""
    return sorted(value) if isinstance(value, set) else str(value)
