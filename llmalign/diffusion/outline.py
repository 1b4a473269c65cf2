"""Image pipelines without weights: their networks from the configs alone, and the shapes of what a network is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from llmalign.diffusion.denoiser import Denoiser
from llmalign.diffusion.image_trainer import lora_config
from llmalign.diffusion.pipelines import DTYPES, FAMILIES, Conditions, Family, Flux, StableDiffusion3
from llmalign.diffusion.samplers import build_sampler
from llmalign.errors import UserError

CLIP_TOKENS = 77
#: of T5 beside or in place of CLIP's, as the pipelines ask for
TOKENS = {StableDiffusion3.__name__: CLIP_TOKENS + 256, Flux.__name__: 512}
TOLD = 3.5  # any number: what a network with distilled guidance is told takes no memory


@dataclass(frozen=True)
class PipelineOutline:
    """A pipeline that was not loaded. `parts`: numbers of the weights of all components but the network."""

    path: str
    family: Family
    network_class: Any
    network_config: dict[str, Any]
    vae_class: Any
    vae_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    dtype: torch.dtype
    parts: dict[str, int]

    def network(self) -> nn.Module:
        """The network on the meta device."""
        with torch.device("meta"):
            network = self.network_class.from_config(self.network_config).train()
        return network if self.dtype == torch.float32 else network.to(self.dtype)

    def denoiser(self, lora: tuple[int, int, Any] | None) -> Denoiser:
        """What is trained: the network, or an adapter (rank, alpha, targets) on it."""
        denoiser = Denoiser(self.network().requires_grad_(lora is None), self.family)
        if lora is not None:
            rank, alpha, targets = lora
            denoiser.add_adapter(lora_config(rank, alpha, targets or self.family.lora_targets))
        return denoiser

    def vae(self) -> nn.Module:
        """The autoencoder on the meta device, in float32."""
        with torch.device("meta"):
            return self.vae_class.from_config(self.vae_config)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vae_config["latent_channels"]

    @property
    def native_resolution(self) -> int:
        """The side in pixels that the network was made for; 0 where its config does not say."""
        size = self.network_config.get("sample_size")
        return size * self.family.vae_scale_factor if isinstance(size, int) else 0

    def stochastic_steps(self, args: Any, resolution: int) -> int:
        """Steps with noise of the sampler that an online method's config names."""
        sampler = build_sampler(
            args.sampler,
            self.scheduler_config,
            args.sampling_steps,
            family=self.family,
            latent_shape=tuple(self.latents(1, resolution).shape[1:]),
            eta=args.sampling_eta,
            noise_level=args.noise_level,
        )
        return len(sampler.stochastic)

    def latents(self, rows: int, resolution: int) -> Tensor:
        """Latents of pictures."""
        side = resolution // self.family.vae_scale_factor
        return torch.zeros(rows, self.latent_channels, side, side)

    def conditions(self, rows: int) -> Conditions:
        """What the network is given for captions, in the shapes of the released text encoders' outputs."""
        config = self.network_config
        width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
        if isinstance(width, list | tuple):
            width = width[0]
        tokens = TOKENS.get(type(self.family).__name__, CLIP_TOKENS)
        found = {"states": torch.zeros(rows, tokens, int(width or 0))}
        pooled = config.get("pooled_projection_dim")
        if config.get("projection_class_embeddings_input_dim"):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        if pooled:
            found["pooled"] = torch.zeros(rows, pooled)
        return found


def pipeline_outline(path: str, *, revision: str | None = None, dtype: str | None = None) -> PipelineOutline:
    """Read a pipeline's configs. Raises UserError where there is none, or one that cannot be trained."""
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        known = {kind.__name__: family for kind, family in FAMILIES.items()}
        if index["_class_name"] not in known:
            raise UserError(f"{index['_class_name']} cannot be trained; known are {', '.join(known)}")
        kind = known[index["_class_name"]]
        config, network_class = _config(path, kind.network_name, index, revision)
        vae_config, vae_class = _config(path, "vae", index, revision)
        scheduler_config, _ = _config(path, "scheduler", index, revision)
        parts = {
            name: _count(path, name, value, revision)
            for name, value in index.items()
            if isinstance(value, list) and value[0] == "transformers" and name.startswith("text_encoder") and value[1]
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"no config of a pipeline could be found at {path!r} ({first}); name a folder that holds its "
            "model_index.json and the configs of its parts with --model_name_or_path"
        ) from error
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    told = TOLD if kind is Flux and config.get("guidance_embeds") else None
    family = kind(vae_config["scaling_factor"], vae_config.get("shift_factor") or 0.0, scale, told)
    return PipelineOutline(
        path,
        family,
        network_class,
        config,
        vae_class,
        vae_config,
        {**scheduler_config, "_class_name": index["scheduler"][1]},
        DTYPES[dtype or "float32"],
        parts,
    )


def _config(path: str, name: str, index: dict[str, Any], revision: str | None) -> tuple[dict[str, Any], Any]:
    kind = getattr(diffusers, index[name][1])
    return kind.load_config(path, subfolder=name, revision=revision), kind


def _count(path: str, name: str, value: list[str], revision: str | None) -> int:
    kind = getattr(transformers, value[1])
    own = Path(path).is_dir()
    options = {} if own else {"subfolder": name, "revision": revision}
    config = kind.config_class.from_pretrained(str(Path(path) / name) if own else path, **options)
    with torch.device("meta"):
        return sum(weight.numel() for weight in kind(config).parameters())
