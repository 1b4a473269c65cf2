"""What differs between Stable Diffusion 1.5 and 2.1, SDXL, SD3 and Flux; everything else is written once for all four.

A family knows its network, how captions become conditions, how the network is called, and how latents are scaled. It is
made for one pipeline by `family_of`. Not covered: inpainting, image prompts, ControlNets, refiners, other pipelines.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from llmalign.errors import UserError
from llmalign.pickles import weight_options

logger = logging.getLogger(__name__)

Conditions = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Family:
    """One architecture; tensors of conditions have a row a caption. `guidance` is what a distilled network is told."""

    scaling_factor: float
    shift_factor: float
    vae_scale_factor: int
    guidance: float | None = None

    network_name: ClassVar[str]
    patch: ClassVar[int] = 1  # latents' side must be a multiple of it
    lora_targets: ClassVar[tuple[str, ...]]
    captioned_by: ClassVar[tuple[str, ...]]

    def conditions(self, pipe: Any, captions: Sequence[str]) -> Conditions:
        """What the network is given for captions, a row each, as the pipeline itself encodes them."""
        return self._encode(pipe, list(captions), guided=False)[0]

    def unconditional(self, pipe: Any) -> Conditions:
        """The other side of classifier-free guidance, one row, as the pipeline itself makes it."""
        return self._encode(pipe, [""], guided=True)[1]

    def _encode(self, pipe: Any, captions: list[str], *, guided: bool) -> tuple[Conditions, Conditions]:
        raise NotImplementedError

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's prediction (N, C, h, w) for latents of that shape at timesteps (N,)."""
        raise NotImplementedError

    def scaled(self, latents: Tensor) -> Tensor:
        """What the VAE encodes to, as the network takes it."""
        return (latents - self.shift_factor) * self.scaling_factor

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] from latents as the network takes them."""
        raw = latents.to(vae.dtype) / self.scaling_factor + self.shift_factor
        return (vae.decode(raw, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


class StableDiffusion(Family):
    """SD 1.5 and 2.1."""

    network_name = "unet"
    lora_targets = ATTENTION
    captioned_by = ("text_encoder", "tokenizer")

    def _encode(self, pipe: Any, captions: list[str], *, guided: bool) -> tuple[Conditions, Conditions]:
        states, empty = pipe.encode_prompt(captions, pipe.text_encoder.device, 1, guided)
        return {"states": states}, {"states": empty}

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See Family."""
        return network(noisy, timesteps, encoder_hidden_states=conditions["states"], return_dict=False)[0]


class StableDiffusionXL(Family):
    """SDXL: two text encoders, a pooled embedding, and sizes: original and target as they are, crop at (0, 0)."""

    network_name = "unet"
    lora_targets = ATTENTION
    captioned_by = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def _encode(self, pipe: Any, captions: list[str], *, guided: bool) -> tuple[Conditions, Conditions]:
        states, empty, pooled, pooled_empty = pipe.encode_prompt(
            captions, device=pipe.text_encoder.device, do_classifier_free_guidance=guided
        )
        return {"states": states, "pooled": pooled}, {"states": empty, "pooled": pooled_empty}

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See Family."""
        height, width = (side * self.vae_scale_factor for side in noisy.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=noisy.dtype)
        added = {"text_embeds": conditions["pooled"], "time_ids": sizes.expand(len(noisy), 6)}
        return network(
            noisy, timesteps, encoder_hidden_states=conditions["states"], added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusion3(Family):
    """SD3: joint attention over three encoders' states, flow matching."""

    network_name = "transformer"
    patch = 2
    lora_targets = JOINT_ATTENTION
    captioned_by = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")

    def _encode(self, pipe: Any, captions: list[str], *, guided: bool) -> tuple[Conditions, Conditions]:
        states, empty, pooled, pooled_empty = pipe.encode_prompt(
            captions, None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=guided
        )
        return {"states": states, "pooled": pooled}, {"states": empty, "pooled": pooled_empty}

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See Family."""
        return network(
            hidden_states=noisy,
            encoder_hidden_states=conditions["states"],
            pooled_projections=conditions["pooled"],
            timestep=timesteps,
            return_dict=False,
        )[0]


class Flux(Family):
    """Flux: CLIP's pooled embedding and T5's states, latents packed two by two, guidance told to the network."""

    network_name = "transformer"
    patch = 2
    lora_targets = JOINT_ATTENTION
    captioned_by = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def _encode(self, pipe: Any, captions: list[str], *, guided: bool) -> tuple[Conditions, Conditions]:
        states, pooled, _ = pipe.encode_prompt(captions, None, device=pipe.text_encoder.device)
        conditions = {"states": states, "pooled": pooled}
        return conditions, conditions  # an empty caption is what it compares with

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See Family."""
        count, channels, height, width = noisy.shape
        rows, columns = height // 2, width // 2
        blocks = noisy.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        states = conditions["states"]
        places = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
        places[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(columns, device=noisy.device)
        told = None if self.guidance is None else noisy.new_full((count,), self.guidance, dtype=torch.float32)
        packed = network(
            hidden_states=blocks.reshape(count, rows * columns, 4 * channels),
            timestep=timesteps / 1000,
            guidance=told,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places.reshape(rows * columns, 3),
            return_dict=False,
        )[0]
        blocks = packed.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return blocks.reshape(noisy.shape)


FAMILIES: dict[type, type[Family]] = {
    StableDiffusionPipeline: StableDiffusion,
    StableDiffusionXLPipeline: StableDiffusionXL,
    StableDiffusion3Pipeline: StableDiffusion3,
    FluxPipeline: Flux,
}


def family_of(pipe: Any, *, guidance: float = 3.5) -> Family:
    """The family of a pipeline. Raises UserError for a pipeline of another class, naming those that are known."""
    if type(pipe) not in FAMILIES:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise UserError(f"{type(pipe).__name__} cannot be trained; known are {known}")
    family = FAMILIES[type(pipe)]
    config = pipe.vae.config
    told = guidance if family is Flux and pipe.transformer.config.guidance_embeds else None
    return family(config.scaling_factor, config.get("shift_factor") or 0.0, pipe.vae_scale_factor, told)


def require_pipeline(path: str | Path) -> None:
    """Raise UserError where `path` is a local folder without a pipeline; whether the Hub has one shows in loading."""
    folder = Path(path).expanduser()
    looks_local = folder.exists() or str(path).startswith(("/", ".", "~"))
    if looks_local and not (folder / "model_index.json").is_file():
        raise UserError(f"{path} holds no diffusers pipeline (model_index.json is missing); check the path or name")


def load_pipeline(path: str | Path, *, revision: str | None = None, dtype: str | None = None) -> Any:
    """An ordinary diffusers pipeline from a folder or the Hub, its weights safetensors only, with no safety checker.

    `dtype` (float32, bfloat16 or float16) is that of the network and the text encoders; the VAE stays in float32, since
    what it encodes is kept.
    Raises UserError where there is none, or where it cannot be read.
    """
    require_pipeline(path)
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype of a pipeline is one of {', '.join(DTYPES)}, got {dtype!r}")
    kinds = {"default": DTYPES[dtype or "float32"], "vae": torch.float32}
    options: dict[str, Any] = {**weight_options(), "revision": revision, "dtype": kinds}
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        if "safety_checker" in index:  # it would be loaded, moved and saved along, and training has no use for it
            options |= {"safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(f"no pipeline could be loaded from {path} ({first}); check the path or name") from error
