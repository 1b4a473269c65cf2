"""Losses of groups: k completions of one prompt, each with a reward."""

import torch
from torch import Tensor

from llmalign.losses import _checks
from llmalign.types import GroupScores


def copg(scores: GroupScores, *, beta: float) -> Tensor:
    """Contrastive policy gradient: Eq. 7-9 of https://arxiv.org/abs/2406.19185, negated to be minimised.

    Returns (P,): the sum over a prompt's pairs of ``-(dR - beta/2 drho) drho``, over k - 1, with k the completions
    that are present, R the reward and rho = policy - reference; 0 where k < 2. Its gradient is the leave-one-out
    policy gradient on ``R - beta rho`` (Eq. 18), valid wherever the completions came from. ``beta`` > 0, on the scale
    of the rewards. ValueError for scores of unequal shape or dtype. Not covered: rewards that depend on the policy.
    """
    _checks.group_scores(scores)
    beta = _checks.positive("beta", beta)
    present = torch.ones_like(scores.policy, dtype=torch.bool) if scores.mask is None else scores.mask.bool()
    # Cleared before any arithmetic: a NaN that is masked afterwards still makes the gradient NaN.
    policy, reference, rewards = (
        torch.where(present, value, torch.zeros_like(value))
        for value in (scores.policy, scores.reference, scores.rewards)
    )
    both = present.unsqueeze(2) & present.unsqueeze(1)
    d_reward, d_rho = _differences(rewards), _differences(policy - reference)
    losses = -(d_reward - beta / 2 * d_rho) * d_rho  # Eq. 9; rho is not detached in its first factor
    total = torch.where(both, losses, torch.zeros_like(losses)).sum(dim=(1, 2)) / 2  # every pair stands there twice
    return total / (present.sum(dim=1) - 1).clamp(min=1)


def _differences(values: Tensor) -> Tensor:
    """(P, K) -> (P, K, K), ``values[:, i] - values[:, j]``."""
    return values.unsqueeze(2) - values.unsqueeze(1)
