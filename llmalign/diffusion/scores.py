"""Denoising errors as scores: s = -error/2, so that every pairwise loss of `llmalign.losses` takes them as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmalign.types import PairScores


def denoising_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all dimensions but the first of (prediction - target)^2, (N,) in float32 (float64 if either is).

    Half precision is widened first: rounded to bfloat16, an error alone would move the loss's argument by .4 at
    beta 5000.
    """
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class PairErrors:
    """Denoising errors of B pairs, (B,) each: of policy and reference and, for INPO, of the previous iterate."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    last_chosen: Tensor | None = None
    last_rejected: Tensor | None = None


def pair_scores(errors: PairErrors, *, scale: float = 1.0) -> PairScores:
    """Scores -scale/2 * error; with scale 1, `losses.dpo(scores, beta=beta)` is the loss of Diffusion-DPO:

    -log sigmoid(-beta/2 [(err_w - err_l) - (ref_err_w - ref_err_l)]), arXiv 2311.12908 (T and the weight in beta).
    `scale` is the number of latent dimensions where errors should be sums and not means.
    """

    def score(error: Tensor) -> Tensor:
        return -0.5 * scale * error

    def optional(error: Tensor | None) -> Tensor | None:
        return None if error is None else score(error)

    return PairScores(
        chosen=score(errors.chosen),
        rejected=score(errors.rejected),
        ref_chosen=score(errors.ref_chosen),
        ref_rejected=score(errors.ref_rejected),
        last_chosen=optional(errors.last_chosen),
        last_rejected=optional(errors.last_rejected),
    )
