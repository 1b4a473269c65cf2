"""The network that is trained, called alike for UNets and transformers, with its adapters on, off or another's."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from llmalign.diffusion.pipelines import Conditions, Family
from llmalign.diffusion.sharding import whole, whole_shape, write
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

POLICY = "default"  # the name that diffusers gives to the one adapter of a network
LORA_FILE = "pytorch_lora_weights.safetensors"
WAY_OUT = "resume with the recipe that wrote them"


class Denoiser(nn.Module):
    """A diffusers network with the call of its family; under LoRA the reference is the same network, adapters off.

    It has no `config`, which transformers would take for one of its own, and dropout is off, so that the policy starts
    where the reference is.
    """

    accepts_loss_kwargs = True

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network: Any = network
        self.network_class: Any = type(network)  # FSDP2 gives modules another
        self.family = family
        self._layers: list[BaseTunerLayer] = []
        self._in_use: str | None = None
        self._drop_nothing()

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; DeepSpeed may change it."""
        return next(self.network.parameters()).dtype

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP2 takes as units, as the network names them, of those that it has."""
        there = {type(module).__name__ for module in self.network.modules()}
        return [name for name in self.network._no_split_modules or () if name in there]

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Predictions (N, C, h, w) for noisy latents at timesteps (N,), conditions with a row each."""
        conditions = {name: value.to(self.dtype) for name, value in conditions.items()}
        return self.family.predict(self.network, noisy.to(self.dtype), timesteps, conditions)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, as the diffusers network does it."""
        if options.get("offload") or options.get("every_n_layers", 1) != 1:
            raise UserError(
                "activation_checkpointing_kwargs: diffusers networks know neither every_n_layers nor offload"
            )
        self.network.enable_gradient_checkpointing()

    @property
    def has_adapters(self) -> bool:
        """Whether the network is trained through adapters."""
        return bool(self._layers)

    def add_adapter(self, config: LoraConfig, name: str = POLICY) -> None:
        """Train an adapter, in float32, and freeze everything else."""
        self.network.requires_grad_(False)
        self.network.add_adapter(config, adapter_name=name)
        self._adopt(name)

    def load_adapter(self, pipe: Any, path: str | Path, name: str = POLICY) -> None:
        """Go on from a LoRA file in any form that the pipeline `pipe`, which holds this network, can load.

        Raises UserError where there is none, and where it also changes the text encoders, which have encoded already.
        """
        self.network.requires_grad_(False)
        try:
            pipe.load_lora_weights(str(path), adapter_name=name, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise UserError(f"no LoRA file could be loaded from {path} ({first}); check the path") from error
        part = self.family.network_name
        others = sorted(owner for owner, names in pipe.get_list_adapters().items() if owner != part and name in names)
        if others:
            raise UserError(f"{path} holds an adapter of the {others[0]}, too; only one of the {part} can be trained")
        if name not in self.adapters:
            raise UserError(f"{path} holds no adapter of the {part}; check the path")
        self._adopt(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that the network has."""
        return list(self.network.peft_config) if self.network._hf_peft_config_loaded else []

    def add_copy(self, name: str) -> None:
        """Keep a frozen copy of the policy's adapter under a name; it lies whole on every process, however sharded."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are meant
            self.network.add_adapter(copy.deepcopy(self.network.peft_config[POLICY]), adapter_name=name)
        self._adopt(POLICY)
        self._make_buffers(name)
        self.load_adapter_state(self.adapter_state(POLICY), name)

    def _make_buffers(self, name: str) -> None:
        """Turn the weights of an adapter into buffers of the policy's precision, which PEFT does not give them.

        An engine that has sharded the network refuses parameters that are added later, and leaves buffers alone.
        """
        for place, weight in list(self.network.named_parameters()):
            if f".{name}." in place:
                kind = self.network.get_parameter(place.replace(f".{name}.", f".{POLICY}.")).dtype
                owner, _, own = place.rpartition(".")
                module = self.network.get_submodule(owner)
                delattr(module, own)
                module.register_buffer(own, weight.detach().to(kind), persistent=False)

    def _drop_nothing(self) -> None:
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def _adopt(self, name: str) -> None:
        self._drop_nothing()  # a file may ask for it
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        self.network.set_adapter(name)
        cast_training_params(self.network, dtype=torch.float32)
        self._in_use = name

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Let the network use another adapter, or none, inside; gradients belong to the policy's adapter outside.

        A network without adapters knows only None, which changes nothing. Raises ValueError for an unknown name.
        """
        if adapter is not None and adapter not in self.adapters:  # PEFT would go on without any
            raise ValueError(f"there is no adapter {adapter!r}; there are {self.adapters}")
        if not self._layers or adapter == self._in_use:
            yield
            return
        before = self._in_use
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        # PEFT's own switch also goes over every weight's requires_grad, which on SDXL takes 40 ms a step, and which
        # FSDP2 reads once, when a weight is first gathered; the network's goes over every module.
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._in_use = adapter

    def adapter_weights(self, name: str = POLICY) -> dict[str, Tensor]:
        """The weights of an adapter as they lie in the network, by PEFT's names."""
        held = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return get_peft_model_state_dict(self.network, held, adapter_name=name)

    def adapter_state(self, name: str = POLICY) -> dict[str, Tensor]:
        """The weights of an adapter, by PEFT's names; where they are sharded all processes ask together."""
        return {key: whole(weight) for key, weight in self.adapter_weights(name).items()}

    def load_adapter_state(self, state: dict[str, Tensor], name: str = POLICY) -> None:
        """Put weights into an adapter that is there. Raises UserError where they do not fit it."""
        own = self.adapter_weights(name)
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [key for key in own.keys() & state.keys() if whole_shape(own[key]) != state[key].shape]
        if wrong:
            raise UserError(f"the adapter's weights do not fit this network ({wrong[0]} differs); {WAY_OUT}")
        for key, weight in own.items():
            write(weight, state[key])

    def save_adapter(
        self, pipeline_class: Any, folder: str | Path, name: str = POLICY, state: dict[str, Tensor] | None = None
    ) -> None:
        """Write an adapter as a LoRA file of plain diffusers, its configuration (and so lora_alpha) with it.

        `state` holds its weights where they are sharded.
        """
        part = self.family.network_name
        state = self.adapter_state(name) if state is None else state
        state = {key: value.contiguous() for key, value in state.items()}  # of channels-last layers
        pipeline_class.save_lora_weights(
            folder,
            **{
                f"{part}_lora_layers": state,
                f"{part}_lora_adapter_metadata": self.network.peft_config[name].to_dict(),
            },
        )

    def restore_adapter(self, pipeline_class: Any, folder: str | Path, name: str = POLICY) -> None:
        """Read back what `save_adapter` wrote, into an adapter that is there."""
        loaded = pipeline_class.lora_state_dict(folder)
        state = loaded[0] if isinstance(loaded, tuple) else loaded
        prefix = f"{self.family.network_name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.load_adapter_state(own, name)
