"""CoPG's three-armed bandit: which objective reaches the optimum of a KL-regularised reward from fixed, lopsided pairs.

Setting of arXiv 2406.19185, section 5: R = (2.5, 2, 1), pairs of mu1 x mu2, beta .5, uniform reference, Adam 1e-3,
batches of 512 of 10,000 pairs. The policy is three logits. The paper stops at 100 epochs (2,000 steps); the claim is
made at 10,000, where CoPG has converged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from claims.cells import Cell, Result, Store, package_files
from claims.report import Claim, Figure, Outcome, interval, values
from llmalign.losses import copg, ipo
from llmalign.types import GroupScores, PairScores

REWARD = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
FIRST = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
SECOND = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64)
BETA = 0.5
LOG_REFERENCE = torch.full((3,), 1 / 3, dtype=torch.float64).log()
LABELS = {
    "copg": "CoPG",
    "ipo": "IPO",
    "pg": "policy gradient, no baseline",
    "pg_reward": "policy gradient, baseline E[R]",
    "pg_regularised": "policy gradient, baseline E[R_beta]",
}


@dataclass(frozen=True)
class Batch:
    """Pairs of arms (B,), whether a Bradley-Terry judge preferred the first (B,) bool, weights (B,) that sum to one."""

    first: Tensor
    second: Tensor
    first_wins: Tensor
    weight: Tensor


def value(log_policy: Tensor) -> Tensor:
    """J(pi) = E_pi[R - beta log(pi / ref)]."""
    return (log_policy.exp() * (REWARD - BETA * (log_policy - LOG_REFERENCE))).sum()


def regret(log_policy: Tensor) -> float:
    """J(pi*) - J(pi) with pi* proportional to ref exp(R / beta)."""
    return float(value(torch.log_softmax(LOG_REFERENCE + REWARD / BETA, 0)) - value(log_policy))


def population() -> Batch:
    """Every pair of arms with both labels, weighted by its probability: the expected gradient of every method."""
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    wins = torch.sigmoid(REWARD[first] - REWARD[second])
    weight = FIRST[first] * SECOND[second]
    return Batch(
        torch.cat([first, first]),
        torch.cat([second, second]),
        torch.arange(18) < 9,
        torch.cat([weight * wins, weight * (1 - wins)]),
    )


def sampled(pairs: int, batch: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled epochs over one fixed sample of `pairs` pairs; labels are drawn once."""
    rng = torch.Generator().manual_seed(seed)
    first = torch.multinomial(FIRST, pairs, replacement=True, generator=rng)
    second = torch.multinomial(SECOND, pairs, replacement=True, generator=rng)
    chance = torch.sigmoid(REWARD[first] - REWARD[second])
    wins = torch.rand(pairs, generator=rng, dtype=torch.float64) < chance
    while True:
        for rows in torch.randperm(pairs, generator=rng).split(batch):
            yield Batch(
                first[rows], second[rows], wins[rows], torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
            )


def _policy_gradient(log_policy: Tensor, batch: Batch, baseline: Tensor | float) -> Tensor:
    with torch.no_grad():
        advantage = REWARD - BETA * (log_policy - LOG_REFERENCE) - baseline
    pull = advantage * log_policy
    return -(batch.weight * (pull[batch.first] + pull[batch.second])).sum()


def objective(method: str, log_policy: Tensor, batch: Batch) -> Tensor:
    """The method's loss on one batch; policy gradient is off-policy without importance weights, as in the paper."""
    if method == "copg":
        pair = torch.stack([batch.first, batch.second], 1)
        scores = GroupScores(policy=log_policy[pair], reference=LOG_REFERENCE[pair], rewards=REWARD[pair])
        return (batch.weight * copg(scores, beta=BETA)).sum()
    if method == "ipo":
        chosen = torch.where(batch.first_wins, batch.first, batch.second)
        rejected = torch.where(batch.first_wins, batch.second, batch.first)
        arms = (log_policy[chosen], log_policy[rejected], LOG_REFERENCE[chosen], LOG_REFERENCE[rejected])
        return (batch.weight * ipo(PairScores(*arms), tau=BETA)).sum()
    fixed = log_policy.detach()
    baseline = {"pg": 0.0, "pg_reward": (fixed.exp() * REWARD).sum(), "pg_regularised": value(fixed)}[method]
    return _policy_gradient(log_policy, batch, baseline)


def train(method: str, batches: Iterator[Batch], steps: int, every: int, lr: float = 1e-3) -> dict[int, float]:
    """Regret after every `every` steps of Adam on three logits that start at zero, in float64."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    curve = {0: regret(torch.log_softmax(logits.detach(), 0))}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        objective(method, torch.log_softmax(logits, 0), next(batches)).backward()
        optimizer.step()
        if step % every == 0:
            curve[step] = regret(torch.log_softmax(logits.detach(), 0))
    return curve


def cells(smoke: bool) -> list[Cell]:
    setting = {"pairs": 10_000, "batch": 512, "lr": 1e-3, "steps": 10_000, "every": 100}
    if smoke:
        return [Cell("bandit", "copg", 0, {**setting, "pairs": 1_000, "steps": 200})]
    return [Cell("bandit", method, seed, setting) for method in LABELS for seed in range(5)]


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    curve = train(cell.method, sampled(s["pairs"], s["batch"], cell.seed), s["steps"], s["every"], s["lr"])
    return {"steps": list(curve), "regret": list(curve.values()), "final": curve[s["steps"]]}


def judge(records: list[Result]) -> Outcome:
    steps = records[0]["result"]["steps"]
    final = {m: values(records, "final", method=m) for m in LABELS}
    final = {m: v for m, v in final.items() if v}
    conditions = {
        "copg": lambda v: max(v) < 1e-6,
        "ipo": lambda v: min(v) > 0.1 and max(v) < 0.2,
        "pg": lambda v: min(v) > 0.1,
        "pg_reward": lambda v: min(v) > 1e-3,
        "pg_regularised": lambda v: max(v) < 1e-6,
    }
    met = {m: conditions[m](v) for m, v in final.items()}
    spans = "; ".join(f"{LABELS[m]} {min(v):.2g} to {max(v):.2g}" for m, v in final.items())
    marks = [k for k in (500, 2_000, 5_000, 10_000) if k in steps]
    curves = {m: values(records, "regret", method=m) for m in final}

    def at(method: str, step: int) -> str:
        column = [max(0.0, c[steps.index(step)]) for c in curves[method]]
        mean = interval(column)
        return f"{mean.mean:.1e}" if mean.mean < 1e-3 else f"{mean.mean:.4f} ± {mean.half:.4f}"

    return Outcome(
        holds=all(met.values()),
        verdict=f"Regret after {steps[-1]:,} steps, smallest to largest over {len(final['copg'])} seeds: {spans}.",
        columns=["method", *(f"{k:,} steps" for k in marks)],
        rows=[[LABELS[m], *(at(m, k) for k in marks)] for m in final],
        numbers={"final_regret": final, "met": met, "steps": steps, "mean_regret": _report_means(curves)},
        draw=_report_curves(steps, curves),
    )


def _report_means(curves: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    return {m: [float(f"{sum(c) / len(c):.4g}") for c in zip(*runs, strict=True)] for m, runs in curves.items()}


def _report_curves(steps: list[int], curves: dict[str, list[list[float]]]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (method, runs) in enumerate(curves.items()):
            for run in runs:
                # Rounding leaves the regret of a converged policy at +-1e-16: the floor keeps it on the log axis.
                axes.plot(steps, [max(r, 1e-15) for r in run], color=f"C{number}", alpha=0.6, lw=1)
            axes.plot([], [], color=f"C{number}", label=LABELS[method])
        axes.axhline(1e-6, color="grey", ls=":", lw=1)
        axes.set(yscale="log", xlabel="Adam steps", ylabel="regret", title="Three-armed bandit, one line per seed")
        axes.legend(fontsize=8, loc="lower left")

    return draw


CLAIM = Claim(
    name="bandit",
    statement=(
        "On CoPG's three-armed bandit CoPG's regret falls below 1e-6 by 10,000 steps, IPO stays at about .15, and "
        "policy gradient on the same off-policy pairs does not converge unless its baseline is E[R_beta]."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *package_files("llmalign.losses")),
)
