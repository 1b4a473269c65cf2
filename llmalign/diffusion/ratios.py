"""From transitions, rewards and denoising errors to the pairs of scores of D3PO, PSO and SePPO.

The losses of `llmalign.losses` are used as they are: each function says which loss, at the authors' own beta, is the
authors' loss.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from llmalign.diffusion.scores import PairErrors, pair_scores
from llmalign.types import PairScores

SIGN, INDICATOR = "sign", "indicator"
FLIP_RULES = (SIGN, INDICATOR)


def transition_scores(policy: Tensor, reference: Tensor, preference: Tensor, *, clip: float | None = 0.1) -> PairScores:
    """Scores of B pairs of transitions: `losses.dpo(scores, beta=beta)` is the loss of D3PO and of online PSO.

    `policy` and `reference` (B, 2) are the log-probabilities of the first and of the second sample's transition,
    `preference` (B,) is 1 where the first is preferred, -1 where the second is, 0 for a tie, which has loss log 2 and
    no gradient. Each ratio exp(policy - reference) is clamped to [1 - clip, 1 + clip], on both sides: a pair outside of
    the band has no gradient, even where it is on the wrong side. None leaves the ratios, as Eq. 14 of
    https://arxiv.org/abs/2311.13231. What is left of a ratio stands under `chosen` and `rejected`, 0 under the
    reference. ValueError for other shapes and for a `clip` outside of (0, 1).
    """
    ratios = _log_ratios(policy, reference)
    if preference.shape != policy.shape[:1]:
        raise ValueError(f"preference must have shape ({len(policy)},), got {tuple(preference.shape)}")
    if clip is not None:
        low, high = _band(clip)
        ratios = ratios.clamp(low, high)
    first, second = ratios.unbind(dim=1)
    strict = (preference != 0).to(ratios.dtype)
    chosen = strict * torch.where(preference < 0, second, first)
    rejected = strict * torch.where(preference < 0, first, second)
    return PairScores(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen))


def clipped_fraction(policy: Tensor, reference: Tensor, clip: float) -> Tensor:
    """Of each pair's two ratios, the share outside of the band, (B,); arguments as for `transition_scores`."""
    ratios = _log_ratios(policy, reference).detach()
    low, high = _band(clip)
    return ((ratios < low) | (ratios > high)).to(ratios.dtype).mean(dim=1)


def pareto_preference(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first sample is preferred, -1 where the second is, else 0: int64 (B,).

    `first` and `second` are (B,) or, for several rewards, (B, R). One sample is preferred where none of its rewards is
    lower and one is higher. A missing reward (NaN) leaves its pair without a preference. ValueError for unequal shapes.
    """
    if first.shape != second.shape or first.ndim not in (1, 2):
        raise ValueError(f"rewards must be (B,) or (B, R), twice: {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    dominates = (first >= second).all(dim=1) & (first > second).any(dim=1)
    dominated = (second >= first).all(dim=1) & (second > first).any(dim=1)
    return dominates.long() - dominated.long()


def seppo_flip(errors: PairErrors, *, rule: str = SIGN, tie: int = 1) -> Tensor:
    """What SePPO multiplies its own sample's error by, (B,), without gradient: https://arxiv.org/abs/2410.05255.

    `chosen` is the image of the data set. 1 where the policy denoises it better than the reference does: the sample is
    a loser. Where it does worse, -1 (`sign`: the sample is a winner) or 0 (`indicator`: it is left out). `tie` (1 or 0)
    stands where both do equally well, as everywhere before the first update. ValueError for another rule or tie.
    """
    if rule not in FLIP_RULES:
        raise ValueError(f"rule must be one of {', '.join(FLIP_RULES)}, got {rule!r}")
    if tie not in (0, 1):
        raise ValueError(f"tie must be 1 (the sample is a loser) or 0 (it is left out), got {tie!r}")
    lead = (errors.ref_chosen - errors.chosen).detach()
    flip = torch.sign(lead) if rule == SIGN else (lead > 0).to(lead.dtype)
    return torch.where(lead == 0, float(tie), flip)


def seppo_scores(errors: PairErrors, *, rule: str = SIGN, tie: int = 1, scale: float = 1.0) -> PairScores:
    """SePPO: `losses.dpo(scores, beta=beta)` with Diffusion-DPO's beta; `rejected` is a past checkpoint's own sample.

    `rule` and `tie` as for `seppo_flip`, `scale` as for `pair_scores`. With a flip of 1 it is Diffusion-DPO.
    """
    flip = seppo_flip(errors, rule=rule, tie=tie)
    flipped = replace(errors, rejected=flip * errors.rejected, ref_rejected=flip * errors.ref_rejected)
    return pair_scores(flipped, scale=scale)


def pso_scores(errors: PairErrors, *, negative_factor: float = 0.1, with_reference: bool = True) -> PairScores:
    """Offline PSO: https://arxiv.org/abs/2410.03190; `rejected` is the distilled base model's own sample.

    Scores are -error, without Diffusion-DPO's 1/2, and the rejected ones are weighed by `negative_factor`:
    `losses.dpo(scores, beta=beta)` is the authors' `pso`, and without reference `losses.slic(scores, beta=beta)` their
    `pso_db`. Both add a prior term, a weight (.5 in their scripts) times `errors.rejected`, with no factor. Errors are
    those of the noise, which are sigma^-2 times those of the clean latents, at the distilled model's timesteps alone.
    """
    weighed = replace(
        errors, rejected=negative_factor * errors.rejected, ref_rejected=negative_factor * errors.ref_rejected
    )
    if not with_reference:
        none = torch.zeros_like(errors.ref_chosen)
        weighed = replace(weighed, ref_chosen=none, ref_rejected=none)
    return pair_scores(weighed, scale=2.0)


def _log_ratios(policy: Tensor, reference: Tensor) -> Tensor:
    if policy.shape != reference.shape or policy.ndim != 2 or policy.shape[1] != 2:
        raise ValueError(
            f"log-probabilities must be (B, 2), twice, got {tuple(policy.shape)} and {tuple(reference.shape)}"
        )
    return policy - reference


def _band(clip: float) -> tuple[float, float]:
    """The band of the ratio as one of its logarithm, where no exponential can overflow."""
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie between 0 and 1 (None: no clip), got {clip!r}")
    return math.log1p(-clip), math.log1p(clip)
