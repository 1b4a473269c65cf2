"""A regularised preference game over a few actions: best responses, the duality gap and INPO's exact step.

J(p1, p2) = P(p1 > p2) - tau KL(p1 | ref) + tau KL(p2 | ref), arXiv 2407.00617. Policies are log-probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmalign.losses import dpo, inpo
from llmalign.types import PairScores


@dataclass(frozen=True)
class Game:
    """`beats[i, j]` = P(action i preferred to action j), (A, A) float64; the reference (A,); tau, per nat of KL."""

    beats: Tensor
    reference: Tensor
    tau: float


def gap(policy: Tensor, game: Game) -> float:
    """max_p J(p, policy) - min_p J(policy, p), closed form; 0 at the Nash policy alone. `policy` are log-probs (A,)."""
    wins = game.beats @ policy.exp()
    # max_p E_p[wins] - tau KL(p | ref) = tau log E_ref[exp(wins / tau)]; the game is symmetric, J(p, q) = 1 - J(q, p).
    best = game.tau * torch.logsumexp(game.reference.log() + wins / game.tau, 0)
    kl = (policy.exp() * (policy - game.reference.log())).sum()
    return float(2 * (best + game.tau * kl) - 1)


def exploitability(policy: Tensor, beats: Tensor) -> float:
    """The duality gap without regularisation, 2 max_y P(y > policy) - 1: how far the best answer beats `policy`."""
    return float(2 * (beats @ policy.exp()).max() - 1)


def mirror_step(policy: Tensor, game: Game, eta: float) -> Tensor:
    """INPO's next iterate in closed form: ref^(tau/eta) policy^(1-tau/eta) exp(P(y > policy) / eta) (equation 5)."""
    share = game.tau / eta
    wins = game.beats @ policy.exp()
    return torch.log_softmax(share * game.reference.log() + (1 - share) * policy + wins / eta, 0)


@dataclass(frozen=True)
class Comparisons:
    """Preferred and other action of each comparison (N,) int64, and its weight (N,)."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor


def all_comparisons(policy: Tensor, game: Game) -> Comparisons:
    """Every ordered pair of different actions, weighted by its chance under two samples of `policy`."""
    actions = torch.arange(len(policy))
    chosen, rejected = torch.cartesian_prod(actions, actions).unbind(1)
    weight = policy.exp()[chosen] * policy.exp()[rejected] * game.beats[chosen, rejected]
    different = chosen != rejected
    return Comparisons(chosen[different], rejected[different], weight[different])


def scores(policy: Tensor, reference: Tensor, last: Tensor, data: Comparisons) -> PairScores:
    """The PairScores of the comparisons, read off three tables of log-probs (A,)."""
    tables = (policy, reference, last)
    (chosen, rejected), (ref_chosen, ref_rejected), (last_chosen, last_rejected) = (
        (t[data.chosen], t[data.rejected]) for t in tables
    )
    return PairScores(chosen, rejected, ref_chosen, ref_rejected, last_chosen, last_rejected)


def fit(objective: str, last: Tensor, reference: Tensor, data: Comparisons, options: dict[str, float]) -> Tensor:
    """The policy (A,) that minimises the weighted mean of `llmalign.losses.inpo` or `.dpo` over `data`.

    `options` are the loss's keywords and `ridge`, the weight of the squared distance of the logits to the previous
    iterate's: it decides actions that were never compared and keeps DPO's minimiser finite where one always wins.
    """
    loss = {"inpo": inpo, "dpo": dpo}[objective]
    keywords = {k: v for k, v in options.items() if k != "ridge"}
    logits = last.clone().requires_grad_()
    weight = data.weight / data.weight.sum()
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        policy = torch.log_softmax(logits, 0)
        total = (weight * loss(scores(policy, reference, last, data), **keywords)).sum()
        total = total + options["ridge"] * (logits - last).square().sum()
        total.backward()
        return total

    solver.step(closure)
    return torch.log_softmax(logits.detach(), 0)
