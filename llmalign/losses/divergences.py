"""f-divergences to an unnormalised target and their policy gradient, f-DPG: https://arxiv.org/abs/2302.08215.

The target is p = P/Z and t = pi(x)/p(x), s = log t. ``D_f(pi|p) = E_p f(t) + f'(inf) pi{p = 0}``, and its gradient is
``E_pi[f'(t) grad log pi]`` (Theorem 1). Exponents stop at ``MAX_EXPONENT``; ``clamped`` says where that happened.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmalign.losses import _checks

MAX_EXPONENT = 20.0  # exp(20) = 4.9e8; float32 overflows at 88.7, and squares of ratios are formed from these


@dataclass(frozen=True)
class Divergence:
    """One f-divergence: f, f' and w f', each as a function of logarithms.

    ``f(s)`` and ``slope(s)`` are f(t) and f'(t) at t = exp(s). ``slope_at_infinity`` is f'(inf), that of a sample with
    P = 0; where it is infinite, so is the divergence. ``weighted(log_w, s)`` is w f' with w = pi/q, formed in one
    piece; ``exponent`` of the same arguments is what it exponentiates beside log w, or None.
    """

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    slope_at_infinity: float
    weighted: Callable[[Tensor, Tensor], Tensor]
    exponent: Callable[[Tensor, Tensor], Tensor] | None = None


def _exp(value: Tensor) -> Tensor:
    return value.clamp(max=MAX_EXPONENT).exp()


def _js(s: Tensor) -> Tensor:
    t = s.exp()
    return torch.xlogy(t, 2 * torch.sigmoid(s)) + math.log(2) + F.logsigmoid(-s)


def _js_slope(s: Tensor) -> Tensor:
    # log 2 - softplus(-s). F.softplus is the identity beyond 20, which costs 1e-10 there; logsigmoid is exact.
    return math.log(2) + F.logsigmoid(s)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(  # KL(p | pi)
        f=lambda s: -s,
        slope=lambda s: -_exp(-s),
        slope_at_infinity=0.0,
        weighted=lambda log_w, s: -_exp(log_w - s),  # (pi/q) (p/pi), where either alone may overflow
        exponent=lambda log_w, s: log_w - s,
    ),
    "reverse_kl": Divergence(  # KL(pi | p)
        f=lambda s: torch.xlogy(s.exp(), s.exp()),
        slope=lambda s: s + 1,
        slope_at_infinity=math.inf,
        weighted=lambda log_w, s: _exp(log_w) * (s + 1),
    ),
    "tv": Divergence(
        f=lambda s: s.expm1().abs() / 2,
        slope=lambda s: s.sign() / 2,
        slope_at_infinity=0.5,
        weighted=lambda log_w, s: _exp(log_w) * s.sign() / 2,
    ),
    "js": Divergence(  # KL(pi | m) + KL(p | m), twice the Jensen-Shannon divergence
        f=_js,
        slope=_js_slope,
        slope_at_infinity=math.log(2),
        weighted=lambda log_w, s: _exp(log_w) * _js_slope(s),
    ),
    "chi2_forward": Divergence(  # chi2(p | pi) = E_pi (p/pi - 1)^2
        f=lambda s: 4 * (s / 2).sinh().square(),
        slope=lambda s: 1 - _exp(-2 * s),
        slope_at_infinity=1.0,
        weighted=lambda log_w, s: _exp(log_w) - _exp(log_w - 2 * s),
        exponent=lambda log_w, s: log_w - 2 * s,
    ),
    "chi2_reverse": Divergence(  # chi2(pi | p) = E_p (pi/p - 1)^2
        f=lambda s: s.expm1().square(),
        slope=lambda s: 2 * s.clamp(max=MAX_EXPONENT).expm1(),
        slope_at_infinity=math.inf,
        weighted=lambda log_w, s: 2 * (_exp(log_w + s) - _exp(log_w)),
        exponent=lambda log_w, s: log_w + s,
    ),
}


def fdpg(
    policy: Tensor,
    proposal: Tensor,
    log_target: Tensor,
    log_z: float | Tensor,
    divergence: str,
    baseline: float | Tensor | None = None,
) -> Tensor:
    """f-DPG, ``w (f'(t) + B) log pi`` with w = pi/q, f' and B detached: Theorem 1 of https://arxiv.org/abs/2302.08215.

    ``policy``, ``proposal`` (N,): log-probabilities of samples under pi and under q, which drew them; ``log_target``
    (N,): log P, -inf where P = 0; ``log_z``, ``baseline``: one number or (N,), None stands for 0. Returns (N,), whose
    mean's gradient estimates that of ``D_f(pi|p)`` for every baseline that does not read its own sample; the value
    itself means nothing. ValueError for a log Z that is not finite, a target that is NaN or +inf, and for P = 0 under
    a divergence that is infinite there. Not covered: contexts with Z = 0, which the caller masks.
    """
    name = divergence
    samples = _samples({"policy": policy, "proposal": proposal, "log_target": log_target}, log_z, name, 1)
    shift = _number("baseline", 0.0 if baseline is None else baseline, policy)
    coefficient = samples.weighted() + samples.weights() * shift  # w (f' + B)
    return coefficient * policy


def pseudo_rewards(
    policy: Tensor, proposal: Tensor, log_target: Tensor, log_z: float | Tensor, divergence: str
) -> Tensor:
    """The pseudo-reward ``-f'(t)`` of each sample, (N,), detached: what a windowed baseline is the mean of.

    Arguments and errors are those of ``fdpg``; the proposal takes no part.
    """
    samples = _samples({"policy": policy, "proposal": proposal, "log_target": log_target}, log_z, divergence, 1)
    slopes = samples.divergence.slope(samples.s)
    return -torch.where(samples.impossible, samples.at_infinity(), slopes)


def leave_one_out_baseline(
    policy: Tensor,
    proposal: Tensor,
    log_target: Tensor,
    log_z: float | Tensor,
    divergence: str,
    mask: Tensor | None = None,
) -> Tensor:
    """The mean pseudo-reward of a context's other samples, ``sum_{j!=i} w_j (-f'_j) / sum_{j!=i} w_j``, detached.

    Tensors are (P, K), K samples of each of P contexts; ``log_z`` is one number or (P, K); ``mask`` (P, K) is true
    where a sample exists, and what stands elsewhere is never read. 0 where there is no other sample. Errors are those
    of ``fdpg``. For the forward KL the constant 1 = E_pi[p/pi] is exact and needs no samples.
    """
    given = {"policy": policy, "proposal": proposal, "log_target": log_target}
    _checks.one_form(given, 2, "(P, K)")
    present = torch.ones_like(policy, dtype=torch.bool) if mask is None else mask.bool()
    _checks.same_shape("mask", present, "policy", policy)
    absent = ~present
    given = {name: value.masked_fill(absent, 0.0) for name, value in given.items()}
    log_z = _number("log_z", log_z, policy).masked_fill(absent, 0.0)
    samples = _samples(given, log_z, divergence, 2)
    gains = _sum_of_others(-samples.weighted().masked_fill(absent, 0.0))
    weights = _sum_of_others(samples.weights().masked_fill(absent, 0.0))
    return torch.where(weights > 0, gains / weights, torch.zeros_like(gains))


def clamped(policy: Tensor, proposal: Tensor, log_target: Tensor, log_z: float | Tensor, divergence: str) -> Tensor:
    """Which samples' exponents ``fdpg`` cut at ``MAX_EXPONENT``, (N,) bool; its mean is the clamp rate.

    Arguments and errors are those of ``fdpg``. A rate that stays above 0 says that policy and proposal are too far
    apart, or Z too small.
    """
    samples = _samples({"policy": policy, "proposal": proposal, "log_target": log_target}, log_z, divergence, 1)
    cut = samples.log_w > MAX_EXPONENT
    if samples.divergence.exponent is not None:
        beside = samples.divergence.exponent(samples.log_w, samples.s) > MAX_EXPONENT
        cut = cut | (beside & ~samples.impossible)
    return cut


def exact_divergence(log_policy: Tensor, log_p: Tensor, divergence: str) -> Tensor:
    """``D_f(pi|p)`` over a finite space, in nats for the KLs, a number: both (N,), normalised, log p -inf where p = 0.

    ``js`` is KL(pi|m) + KL(p|m), twice the Jensen-Shannon divergence. Differentiable in the policy.
    """
    _checks.one_form({"log_policy": log_policy, "log_p": log_p}, 1, "(N,)")
    found = _known(divergence)
    possible = ~log_p.isneginf()
    inside = (log_p[possible].exp() * found.f(log_policy[possible] - log_p[possible])).sum()
    outside = log_policy[~possible].exp().sum()
    return inside + (found.slope_at_infinity * outside if bool(outside > 0) else 0.0)


@dataclass(frozen=True)
class _Samples:
    """Checked and detached samples; ``s`` is finite, and stands for nothing where ``impossible``."""

    log_w: Tensor
    s: Tensor
    impossible: Tensor
    divergence: Divergence

    def weights(self) -> Tensor:
        return _exp(self.log_w)

    def at_infinity(self) -> Tensor:
        # Checked to be finite wherever a sample is impossible; elsewhere it is not read.
        slope = self.divergence.slope_at_infinity
        return torch.full_like(self.s, slope if math.isfinite(slope) else 0.0)

    def weighted(self) -> Tensor:
        """w f'."""
        possible = self.divergence.weighted(self.log_w, self.s)
        return torch.where(self.impossible, self.weights() * self.at_infinity(), possible)


def _samples(given: dict[str, Tensor], log_z: float | Tensor, divergence: str, dimensions: int) -> _Samples:
    _checks.one_form(given, dimensions, "(N,)" if dimensions == 1 else "(P, K)")
    policy, proposal, log_target = (value.detach() for value in given.values())
    found = _known(divergence)
    log_z = _number("log_z", log_z, policy)
    _refuse(
        ~log_z.isfinite(), "log_z is {} at sample {}: mask contexts whose Z is 0 and give them any finite log_z.", log_z
    )
    wrong = log_target.isnan() | log_target.isposinf()
    _refuse(wrong, "log_target is {} at sample {}; it must be a number or -inf.", log_target)
    impossible = log_target.isneginf()
    if math.isinf(found.slope_at_infinity) and bool(impossible.any()):
        raise ValueError(
            f"{divergence} is infinite: the target gives sample {_first(impossible)} probability 0, and the policy drew"
            " it. Floor the constraint (1e-6, say), or use forward_kl, tv, js or chi2_forward."
        )
    log_target = torch.where(impossible, torch.zeros_like(log_target), log_target)
    # Log-probabilities first, which are large and close to each other: their difference is nearly exact in float32.
    return _Samples(policy - proposal, (policy - log_target) + log_z, impossible, found)


def _known(divergence: str) -> Divergence:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    return DIVERGENCES[divergence]


def _number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """One number, or a tensor of the shape of ``like``, as a detached tensor of its dtype."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    if value.shape not in (like.shape, torch.Size(())):
        raise ValueError(
            f"{name} must be one number or a tensor of shape {tuple(like.shape)}, got shape {tuple(value.shape)}."
        )
    return value.detach().to(like).expand_as(like)


def _refuse(wrong: Tensor, sentence: str, values: Tensor) -> None:
    if bool(wrong.any()):
        first = _first(wrong)
        raise ValueError(sentence.format(values.flatten()[first].item(), first))


def _first(flags: Tensor) -> int:
    return int(flags.flatten().nonzero()[0])


def _sum_of_others(values: Tensor) -> Tensor:
    """(P, K): the sum of each row without the entry itself, never formed as a difference, which would cancel."""
    before = F.pad(values, (1, 0))[:, :-1].cumsum(dim=1)
    after = F.pad(values.flip(1), (1, 0))[:, :-1].cumsum(dim=1).flip(1)
    return before + after
