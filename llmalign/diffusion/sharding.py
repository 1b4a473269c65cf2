"""Weights that ZeRO-3 or FSDP2 spread over the processes: loaded whole, made whole for a moment, written to.

All but `loading_whole` exchange tensors: every process calls them together, for the same weights in the same order.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed as integration
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@contextmanager
def loading_whole() -> Iterator[None]:
    """Load models whole inside, where transformers would spread them: what encodes and decodes is no engine's."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    known = integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(known)


def whole(weight: Any) -> Tensor:
    """All of a weight, without gradient; a copy where it is spread."""
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if not _in_zero3(weight):
        return weight.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def whole_shape(weight: Any) -> torch.Size:
    """The shape of all of a weight."""
    return weight.ds_shape if _in_zero3(weight) else weight.shape


@torch.no_grad()
def write(weight: Any, value: Tensor) -> None:
    """Write all of a weight; every process has the same value."""
    if isinstance(weight, DTensor):
        weight.copy_(distribute_tensor(value.to(weight.device, weight.dtype), weight.device_mesh, weight.placements))
    elif _in_zero3(weight):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.copy_(value)
    else:
        weight.copy_(value)


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """A module's state dict with whole weights on the CPU, for one weight after another; empty where not to `keep`."""
    state = {}
    for name, weight in module.state_dict(keep_vars=True).items():
        value = whole(weight)
        if keep:
            state[name] = value.cpu()
    return state


def write_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a state dict of whole weights into a module, whose names it has."""
    for name, weight in module.state_dict(keep_vars=True).items():
        write(weight, state[name])


def freeze_beside(model: nn.Module, accelerator: Any) -> Any:
    """Place a frozen model as the policy's weights are placed; what is returned has to live as long as the model."""
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if plugin is None:
        return model.to(accelerator.device)
    model.to(plugin.hf_ds_config.dtype())
    if plugin.zero_stage != 3:
        return model.to(accelerator.device)
    import deepspeed

    config = deepcopy(plugin.deepspeed_config)
    for part in ("optimizer", "scheduler"):
        config.pop(part, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    return deepspeed.initialize(model=model, config=config)[0]


def _in_zero3(weight: Any) -> bool:
    if not is_deepspeed_zero3_enabled():
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return is_zero_param(weight)
