"""Policy gradients on tokens and sequences: gae, ppo_clip, value_clip (PPO with a critic), mdpo (mirror descent).

Token tensors are (B, T) with a mask, bool or 0/1 of any dtype, true at the tokens that the policy wrote; what stands at
masked places is never read. Log-ratios stop at ``MAX_LOG_RATIO`` from above, far outside of what clipping lets through.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmalign.losses import _checks

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8; an infinite ratio times a gradient of 0 is NaN
MIN_VARIANCE = 1e-8


def token_rewards(
    rewards: Tensor, old: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float, clamp: float | None = None
) -> Tensor:
    """The reward of each token, (B, T): ``-kl_coef (log pi_old - log pi_ref)``, plus the sequence's at its last token.

    ``rewards`` (B,), cut at +-``clamp`` where one is given; ``old`` and ``reference`` (B, T), log-probs of the tokens.
    0 where masked; a sequence without tokens gets nothing. Their sum is the reward with the KL penalty of
    https://arxiv.org/abs/2203.02155.
    """
    kept = _kept({"old": old, "reference": reference}, mask)
    kl_coef = _checks.not_negative("kl_coef", kl_coef)
    if rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards must have shape {tuple(mask.shape[:1])}, got {tuple(rewards.shape)}.")
    old, reference = _clear(old, kept).detach(), _clear(reference, kept).detach()
    score = rewards.to(old) if clamp is None else rewards.to(old).clamp(-clamp, clamp)
    is_last = kept & (kept.flip(1).cumsum(dim=1).flip(1) == 1)
    return -kl_coef * (old - reference) + torch.where(is_last, score.unsqueeze(1), torch.zeros_like(old))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, (advantages, returns), both (B, T) and detached: https://arxiv.org/abs/1506.02438.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}`` (Eq. 16), with V = A = 0
    after the last token; returns are A + V. ``gamma`` and ``lam`` in [0, 1]. 0 where masked; a masked token between
    others is stepped over: the token before it takes the value of the one after it.
    """
    kept = _kept({"rewards": rewards, "values": values}, mask)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if _checks.not_negative(name, value) > 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}.")
    rewards, values = _clear(rewards, kept).detach(), _clear(values, kept).detach()
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    columns = []
    for place in reversed(range(values.shape[1])):
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        advantage = delta + gamma * lam * next_advantage  # Eq. 16
        here = kept[:, place]
        columns.append(torch.where(here, advantage, torch.zeros_like(advantage)))
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, place], next_value)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def ppo_clip(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, negated: Eq. 7 of https://arxiv.org/abs/1707.06347, (B,), each the mean over its tokens.

    ``new``, ``old`` (B, T): token log-probs under the policy and under the one that sampled; ``advantages`` (B, T);
    ``clip`` > 0 (the paper: 0.2). 0 for a sequence without tokens.
    """
    kept = _kept({"new": new, "old": old, "advantages": advantages}, mask)
    clip = _checks.positive("clip", clip)
    advantages = _clear(advantages, kept).detach()
    ratio = (_clear(new, kept) - _clear(old, kept).detach()).clamp(max=MAX_LOG_RATIO).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # Eq. 7
    return _token_mean(-objective, kept)


def value_clip(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped value loss, (B,), each the mean over its tokens: ``max((V - R)^2, (V_clip - R)^2) / 2``.

    ``V_clip`` is ``new`` kept within ``clip`` of ``old``, in the units of the values, not relative; all (B, T), and
    ``clip`` > 0. The loss of PPO's reference code, which its paper does not state. 0 for a sequence without tokens.
    """
    kept = _kept({"new": new, "old": old, "returns": returns}, mask)
    clip = _checks.positive("clip", clip)
    new, old, returns = _clear(new, kept), _clear(old, kept).detach(), _clear(returns, kept).detach()
    near = old + (new - old).clamp(-clip, clip)
    return _token_mean(torch.maximum((new - returns).square(), (near - returns).square()) / 2, kept)


def whiten(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Values less their mean over their standard deviation (population, variance at least 1e-8); 0 where masked.

    ``values`` and ``mask`` of one shape, any. ``reduce`` adds a small float64 tensor up over all processes and returns
    the sum; every process must then call this, also one without values. Detached.
    """
    kept = _kept({"values": values}, mask, values.dim())
    total = (lambda tensor: tensor) if reduce is None else reduce
    clean = _clear(values, kept).detach().double()
    count, summed = total(torch.stack([kept.sum().double(), clean.sum()])).unbind()
    centred = _clear(clean - summed / count.clamp(min=1), kept)
    variance = total(centred.square().sum().reshape(1)).squeeze(0) / count.clamp(min=1)
    return (centred * variance.clamp(min=MIN_VARIANCE).rsqrt()).to(values)


def mdpo(policy: Tensor, old: Tensor, advantages: Tensor, step_size: float) -> Tensor:
    """On-policy MDPO, https://arxiv.org/abs/2005.09814, of whole sequences: ``-w A + (w log w - w + 1) / t``.

    ``policy``, ``old``, ``advantages`` (N,): log-probabilities of samples of the old policy under both and their
    advantages; w = policy/old, t = ``step_size`` > 0. Returns (N,). The second term estimates KL(policy || old)
    without ever being negative; gradient ``w (-A + log w / t)``. At policy = old it is the plain policy gradient, so
    take several steps on each batch. Not covered: the pull to a reference, which belongs in the reward.
    """
    _checks.one_form({"policy": policy, "old": old, "advantages": advantages}, 1, "(N,)")
    step_size = _checks.positive("step_size", step_size)
    log_w = policy - old.detach()
    w = log_w.clamp(max=MAX_LOG_RATIO).exp()  # beyond it log w alone still pulls back
    return -w * advantages.detach() + (w * log_w - w + 1) / step_size


def annealed_step_size(iteration: int, iterations: int, *, start: float = 1.0, floor: float = 0.05) -> float:
    """MDPO's step size ``t_k = start (1 - k/K)`` of iteration k = 0 ... K - 1, never below ``floor``."""
    if not 0 <= iteration < iterations:
        raise ValueError(f"iteration must lie in [0, {iterations}), got {iteration}.")
    return max(_checks.positive("floor", floor), _checks.positive("start", start) * (1 - iteration / iterations))


def _kept(tensors: dict[str, Tensor], mask: Tensor, dimensions: int = 2) -> Tensor:
    """The mask as bool, of tensors whose form is checked."""
    _checks.one_form(tensors, dimensions, "(B, T)")
    first, anchor = next(iter(tensors.items()))
    _checks.same_shape("mask", mask, first, anchor)
    return mask.bool()


def _clear(values: Tensor, kept: Tensor) -> Tensor:
    # Before any arithmetic: a NaN that is masked afterwards still makes the gradient NaN.
    return torch.where(kept, values, torch.zeros_like(values))


def _token_mean(values: Tensor, kept: Tensor) -> Tensor:
    return _clear(values, kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
