"""The sampler that a config asks for, on a pipeline's own schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmalign.diffusion.pipelines import Family, Flux
from llmalign.diffusion.transitions import Sampler, consistency, ddim, euler_ancestral, flow_sde
from llmalign.errors import UserError

DDIM, EULER, CONSISTENCY, FLOW = SAMPLERS = ("ddim", "euler_ancestral", "consistency", "flow_sde")
PATCH = 2  # latents a side that make one token of SD3 and Flux


def build_sampler(
    kind: str | None,
    config: Mapping[str, Any],
    steps: int,
    *,
    family: Family,
    latent_shape: Sequence[int],
    eta: float = 1.0,
    noise_level: float = 0.7,
) -> Sampler:
    """A sampler of `steps` steps under a scheduler's config; None: flow SDE for flow matching, else DDIM.

    `eta` is DDIM's share of noise, `noise_level` the flow SDE's; both 0 make a sampler without noise. Raises UserError
    where kind and schedule do not belong together.
    """
    flow = "base_image_seq_len" in config
    kind = kind or (FLOW if flow else DDIM)
    if flow != (kind == FLOW):
        fits = FLOW if flow else "ddim, euler_ancestral or consistency"
        raise UserError(f"sampler: {kind} does not belong to this pipeline's schedule; use {fits}")
    if kind == DDIM:
        return ddim(config, steps, eta=eta)
    if kind == EULER:
        return euler_ancestral(config, steps)
    if kind == CONSISTENCY:
        return consistency(config, steps)
    # As the pipelines set their schedulers: Flux names its sigmas, and under dynamic shifting the shift grows with the
    # tokens of the image.
    sigmas = [1 - step / steps for step in range(steps)] if isinstance(family, Flux) else None
    mu = _shift(config, latent_shape) if config.get("use_dynamic_shifting") else None
    return flow_sde(config, steps, noise_level=noise_level, sigmas=sigmas, mu=mu)


def _shift(config: Mapping[str, Any], latent_shape: Sequence[int]) -> float:
    tokens = (latent_shape[-2] // PATCH) * (latent_shape[-1] // PATCH)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return config["base_shift"] + slope * (tokens - low)
