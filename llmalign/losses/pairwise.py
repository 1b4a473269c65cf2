"""Losses of preference pairs: dpo cdpo ipo slic | rpo irpo | rdpo ripo rslic | inpo.

Every function takes ``PairScores`` and returns the loss of each pair, (B,), in nats or squared nats, to be minimised.
All but ``inpo`` read the margin ``m = rho(chosen) - rho(rejected)`` with ``rho = policy - reference``, of
log-probabilities that are summed over tokens, never averaged; ``rpo`` and ``irpo`` add a likelihood. ValueError for
scores of unequal shape or dtype and for a hyper-parameter out of its range. Not covered: NaN or infinite scores, which
pass through.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmalign.losses import _checks
from llmalign.types import PairScores


def dpo(scores: PairScores, *, beta: float) -> Tensor:
    """DPO, ``-log sigmoid(beta m)``: Eq. 7 of https://arxiv.org/abs/2305.18290; ``beta`` > 0."""
    return _logistic(_margin(scores) * _checks.positive("beta", beta))  # Eq. 7


def cdpo(scores: PairScores, *, beta: float, flip_rate: float | Tensor) -> Tensor:
    """Conservative DPO, soft labels: Eq. 3 of https://ericmitchell.ai/cdpo.pdf.

    ``beta`` > 0; ``flip_rate`` in [0, 1], one number or (B,): the probability that the label is wrong. Unlike
    ``rdpo`` it is no unbiased estimate of the loss on clean labels: it pulls the margin to a finite target.
    """
    logit = _margin(scores) * _checks.positive("beta", beta)
    rate = _checks.flip_rate(flip_rate, logit, soft=True)
    return (1 - rate) * _logistic(logit) + rate * _logistic(-logit)  # Eq. 3


def ipo(scores: PairScores, *, tau: float) -> Tensor:
    """IPO, ``(m - 1/(2 tau))^2``: Eq. 17 of https://arxiv.org/abs/2310.12036; ``tau`` > 0.

    On sums of log-probabilities as the paper writes it; TRL's loss of this name divides each by its length.
    """
    return _squared(_margin(scores), _checks.positive("tau", tau))  # Eq. 17


def slic(scores: PairScores, *, beta: float) -> Tensor:
    """SLiC's hinge on the margin to the reference, ``max(0, 1 - beta m)``; ``beta`` > 0.

    The hinge is that of https://arxiv.org/abs/2305.10425, its normalised form that of
    https://arxiv.org/abs/2309.06657. Not covered: SLiC's cross-entropy term on the supervised target.
    """
    return _hinge(_margin(scores) * _checks.positive("beta", beta))


def rpo(scores: PairScores, *, beta: float, eta: float) -> Tensor:
    """RPO, ``dpo - eta beta log pi(base)``: Eq. 4.8 of https://arxiv.org/abs/2405.16436.

    ``beta`` > 0, ``eta`` >= 0. The baseline's log-prob is summed over its tokens; it is that of ``scores.base``, or
    of the chosen response where that is None. Not covered: the mean over tokens without beta, see ``irpo``.
    """
    preference = dpo(scores, beta=beta)
    base = scores.chosen if scores.base is None else scores.base
    return preference - _checks.not_negative("eta", eta) * beta * base  # Eq. 4.8


def irpo(scores: PairScores, *, beta: float, alpha: float) -> Tensor:
    """DPO plus the chosen response's mean negative log-prob per token, after https://arxiv.org/abs/2404.19733.

    ``beta`` > 0, ``alpha`` >= 0; ``scores.chosen_lengths`` are needed, above 0. The paper's mean also counts the
    tokens of its chain of thought, which here are part of the completion.
    """
    preference = dpo(scores, beta=beta)
    lengths = scores.chosen_lengths
    if lengths is None:
        raise ValueError("irpo needs scores.chosen_lengths, the number of tokens of each chosen completion.")
    if not bool((lengths > 0).all()):
        raise ValueError("chosen_lengths must be above 0: a chosen completion without tokens has no mean.")
    return preference - _checks.not_negative("alpha", alpha) * scores.chosen / lengths.to(scores.chosen)


def rdpo(scores: PairScores, *, beta: float, flip_rate: float | Tensor) -> Tensor:
    """Robust DPO, the unbiased estimate of the clean DPO loss from flipped labels: https://arxiv.org/abs/2403.00409.

    ``((1 - e) L(m) - e L(-m)) / (1 - 2e)`` with DPO's L; ``beta`` > 0; ``flip_rate`` e in [0, 0.5), one number or
    (B,). Unbounded below for e > 0: choose checkpoints by accuracy, not by this loss.
    """
    logit = _margin(scores) * _checks.positive("beta", beta)
    return _noise_corrected(_logistic, logit, flip_rate)


def ripo(scores: PairScores, *, tau: float, flip_rate: float | Tensor) -> Tensor:
    """IPO corrected for flipped labels as ``rdpo`` corrects DPO: https://arxiv.org/abs/2403.00409.

    Equals ``(m - c / (1 - 2e))^2`` with c = 1/(2 tau) up to a constant; ``tau`` > 0; ``flip_rate`` e in [0, 0.5),
    one number or (B,).
    """
    margin, tau = _margin(scores), _checks.positive("tau", tau)
    return _noise_corrected(lambda value: _squared(value, tau), margin, flip_rate)


def rslic(scores: PairScores, *, beta: float, flip_rate: float | Tensor) -> Tensor:
    """SLiC's hinge corrected for flipped labels as ``rdpo`` corrects DPO: https://arxiv.org/abs/2403.00409.

    ``beta`` > 0; ``flip_rate`` in [0, 0.5), one number or (B,). For a flip rate above 0 it is neither convex nor
    bounded below.
    """
    logit = _margin(scores) * _checks.positive("beta", beta)
    return _noise_corrected(_hinge, logit, flip_rate)


def inpo(scores: PairScores, *, eta: float, tau: float) -> Tensor:
    """INPO, ``(h - 1/(2 eta))^2``: Algorithm 1 of https://arxiv.org/abs/2407.00617.

    ``h`` is the policy's log-ratio of chosen to rejected, less tau/eta of the reference's and 1 - tau/eta of the
    previous iterate's. ``eta`` > 0, ``tau`` >= 0 (0: no pull to the reference; eta: IPO). ``scores.last_chosen`` and
    ``scores.last_rejected`` are needed. The paper's eta (.005) starts at 1e4 with gradients of 200: clip them.
    """
    _checks.pair_scores(scores)
    eta, tau = _checks.positive("eta", eta), _checks.not_negative("tau", tau)
    if scores.last_chosen is None or scores.last_rejected is None:
        raise ValueError(
            "inpo needs scores.last_chosen and scores.last_rejected, the log-probabilities under the previous iterate."
        )
    policy = scores.chosen - scores.rejected
    reference = scores.ref_chosen - scores.ref_rejected
    last = scores.last_chosen - scores.last_rejected
    h = policy - tau / eta * reference - (1 - tau / eta) * last  # h_t of Alg. 1
    return _squared(h, eta)  # Alg. 1


def _margin(scores: PairScores) -> Tensor:
    """The margin m = rho(chosen) - rho(rejected), (B,), of scores whose form is checked."""
    _checks.pair_scores(scores)
    return (scores.chosen - scores.ref_chosen) - (scores.rejected - scores.ref_rejected)


def _logistic(logit: Tensor) -> Tensor:
    # softplus(-logit). F.softplus is the identity beyond 20, which costs its gradient 2e-9 there; logsigmoid is exact.
    return -F.logsigmoid(logit)


def _squared(value: Tensor, strength: float) -> Tensor:
    return (value - 1 / (2 * strength)).square()


def _hinge(logit: Tensor) -> Tensor:
    return torch.relu(1 - logit)


def _noise_corrected(loss: Callable[[Tensor], Tensor], margin: Tensor, flip_rate: float | Tensor) -> Tensor:
    """The loss whose mean over labels that are flipped with probability e is ``loss(margin)`` on the true label."""
    rate = _checks.flip_rate(flip_rate, margin)
    return ((1 - rate) * loss(margin) - rate * loss(-margin)) / (1 - 2 * rate)
