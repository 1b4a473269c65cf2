"""Adaptive guidance: the unconditional pass is left out once it says the same as the conditional one.

Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
https://arxiv.org/abs/2312.12487
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from llmalign.diffusion.pipelines import FAMILIES
from llmalign.errors import UserError

THRESHOLD = 0.991
STACKED = (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline)


@dataclass
class Savings:
    """Network evaluations of single rows, counted over all calls: one conditional row for each image and step.

    ``at_once``: images whose two predictions were alike at their first step already.
    """

    conditional: int = 0
    unconditional: int = 0
    images: int = 0
    at_once: int = 0

    @property
    def unconditional_share(self) -> float:
        """Share of the unconditional passes that were left out; 0 before the first call."""
        return 1 - self.unconditional / self.conditional if self.conditional else 0.0

    @property
    def share(self) -> float:
        """Share of all network evaluations (NFE) that were left out: at most one half."""
        return self.unconditional_share / 2

    def text(self) -> str:
        """One sentence, and a second one where the threshold seems not to fit the model."""
        said = (
            f"Adaptive guidance left out {self.unconditional_share:.1%} of the unconditional passes, "
            f"{self.share:.1%} of all network evaluations."
        )
        if self.at_once:
            said += (
                f" {self.at_once} of {self.images} images lost their guidance after the first step: if they look "
                "unguided, raise the threshold."
            )
        return said


def similarity(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """gamma = cos(eps_c, eps_u) of each row, (N, ...) and (N, ...) -> (N,), in float32 at least."""
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    return torch.cosine_similarity(conditional.flatten(1).to(dtype), unconditional.flatten(1).to(dtype), dim=1)


@contextmanager
def adaptive_guidance(
    pipe: Any, *, threshold: float = THRESHOLD, max_cfg_fraction: float | None = None
) -> Iterator[Savings]:
    """Within this context the pipeline samples with adaptive guidance; yields what that saves, counted as it goes.

    Each image is guided until gamma = cos(eps_c, eps_u) reaches `threshold`: that step still combines eps_c and eps_u,
    every later one takes eps_c alone. Images of a batch are told apart, and a new call of the pipeline starts anew. A
    threshold above 1 is never reached, which is plain guidance. `max_cfg_fraction` in (0, 1] ends the guidance after
    that share of the steps, to the nearest step, whatever gamma says; None leaves it to gamma.

    The pipeline itself is not changed: the network is given fewer rows, and eps_u := eps_c for those without guidance,
    where eps_u + g (eps_c - eps_u) is eps_c. With `guidance_rescale` these are eps_c too, to rounding, since then both
    standard deviations are equal.

    Raises UserError for a threshold or fraction that cannot be, for a pipeline that does not stack both passes in one
    batch, and, when it is called, where its guidance is off or SD3 skips layers. Not covered: image-to-image,
    inpainting, ControlNets. gamma is that of the network's outputs, which for v-prediction and flow matching (SD 2 at
    768 pixels, SD3) are velocities: the paper's threshold was not studied for them, nor with `guidance_rescale`.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UserError(
            f"The threshold of adaptive guidance is a cosine above 0 (such as {THRESHOLD}), not {threshold}."
        )
    if max_cfg_fraction is not None and not 0 < max_cfg_fraction <= 1:
        raise UserError(f"max_cfg_fraction is a share of the steps above 0 and up to 1, not {max_cfg_fraction}.")
    if type(pipe) not in STACKED:
        raise UserError(
            f"Adaptive guidance needs a pipeline that runs the unconditional and the conditional pass as one batch "
            f"({', '.join(kind.__name__ for kind in STACKED)}); {type(pipe).__name__} does not (Flux is told its "
            "guidance as a number and has no unconditional pass): sample without adaptive guidance."
        )
    network = pipe.components[FAMILIES[type(pipe)].network_name]
    before = vars(network).get("forward")  # set on the instance by offloading, say, and then not the class's own
    if isinstance(before, _AdaptiveForward):
        raise RuntimeError("this pipeline samples with adaptive guidance already")
    savings = Savings()
    network.forward = _AdaptiveForward(pipe, network.forward, threshold, max_cfg_fraction, savings)
    try:
        yield savings
    finally:
        del network.forward
        if before is not None:
            network.forward = before


class _AdaptiveForward:
    """Stands in for a network's forward that gets [unconditional, conditional] rows of N images as one batch."""

    def __init__(
        self,
        pipe: Any,
        forward: Callable[..., Any],
        threshold: float,
        max_cfg_fraction: float | None,
        savings: Savings,
    ) -> None:
        self.pipe, self.forward, self.savings = pipe, forward, savings
        self.threshold, self.max_cfg_fraction = threshold, max_cfg_fraction
        self.timesteps: Tensor | None = None
        self.guided = torch.zeros(0, dtype=torch.bool)
        self.step = self.last_step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._check(kwargs)
        rows = len(args[0] if args else kwargs["hidden_states"])
        images = rows // 2
        # Every call of a pipeline sets the timesteps of its scheduler anew.
        if self.timesteps is not self.pipe.scheduler.timesteps:
            self._begin(images)
        if self.step >= self.last_step:
            self.guided[:] = False
        unconditional = self.guided.nonzero().flatten()
        kept = torch.cat([unconditional, torch.arange(images, rows)])
        (prediction,) = self.forward(*_take(args, kept, rows), **_take(kwargs, kept, rows))
        eps_c = prediction[-images:]
        eps_u = eps_c.clone()
        eps_u[unconditional.to(eps_u.device)] = prediction[:-images]
        self._count(len(unconditional), similarity(eps_c, eps_u).cpu() >= self.threshold)
        return (torch.cat([eps_u, eps_c]),)

    def _check(self, kwargs: dict[str, Any]) -> None:
        if not self.pipe.do_classifier_free_guidance:
            raise UserError(
                f"Guidance is off (guidance_scale {self.pipe.guidance_scale:g}, or a network distilled from it), so "
                "there is no unconditional pass to leave out: sample without adaptive guidance."
            )
        if kwargs.get("skip_layers") is not None:
            raise UserError("Adaptive guidance does not go with skip_guidance_layers; leave out one of the two.")

    def _begin(self, images: int) -> None:
        self.timesteps = self.pipe.scheduler.timesteps
        self.guided = torch.ones(images, dtype=torch.bool)
        self.step = 0
        steps = self.pipe.num_timesteps
        self.last_step = steps if self.max_cfg_fraction is None else round(self.max_cfg_fraction * steps)
        self.savings.images += images

    def _count(self, unconditional: int, alike: Tensor) -> None:
        self.savings.conditional += len(self.guided)
        self.savings.unconditional += unconditional
        if self.step == 0:
            self.savings.at_once += int((self.guided & alike).sum())
        self.guided &= ~alike
        self.step += 1


def _take(value: Any, kept: Tensor, rows: int) -> Any:
    """The kept rows of every tensor of a batch of `rows`, inside dicts, lists and tuples too; all else as it is."""
    if isinstance(value, Tensor):
        return value[kept.to(value.device)] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _take(inner, kept, rows) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(inner, kept, rows) for inner in value)
    return value
