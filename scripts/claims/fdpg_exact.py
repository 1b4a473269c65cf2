"""f-DPG on ten outcomes: whether the gradient of every divergence leads the policy to its target.

The expectation over samples is taken exactly, as a sum over all outcomes, so nothing but the loss is tested: on
policy, and with a fixed uniform proposal. One target gives every outcome a share; the other forbids three of them,
which the two divergences that are infinite there cannot be asked to reach.
"""

from pathlib import Path

import torch
from torch import Tensor

from claims.cells import Cell, Result, Store, package_files
from claims.report import Claim, Figure, Outcome, values
from llmalign.losses import DIVERGENCES, fdpg

OUTCOMES = 10
FORBIDDEN = 3
CASES = {
    "all_on": {"target": "all", "proposal": "policy"},
    "all_off": {"target": "all", "proposal": "uniform"},
    "some_on": {"target": "some", "proposal": "policy"},
    "some_off": {"target": "some", "proposal": "uniform"},
}
LABELS = {
    "forward_kl": "KL(p, pi)",
    "reverse_kl": "KL(pi, p)",
    "tv": "total variation",
    "js": "Jensen-Shannon",
    "chi2_forward": "chi2(p, pi)",
    "chi2_reverse": "chi2(pi, p)",
}
INFINITE = frozenset({"reverse_kl", "chi2_reverse"})


def target(kind: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """log P (N,), unnormalised, -inf where an outcome is forbidden, and p (N,)."""
    log_target = torch.randn(OUTCOMES, generator=rng, dtype=torch.float64) + 1.5
    if kind == "some":
        log_target[torch.randperm(OUTCOMES, generator=rng)[:FORBIDDEN]] = -torch.inf
    return log_target, torch.softmax(log_target, 0)


def expected_loss(log_policy: Tensor, log_target: Tensor, divergence: str, proposal: str) -> Tensor:
    """E_q of `losses.fdpg` over all outcomes, whose gradient is that of D_f(pi | p)."""
    log_q = log_policy.detach() if proposal == "policy" else torch.full_like(log_policy, 1 / OUTCOMES).log()
    log_z = float(torch.logsumexp(log_target, 0))
    return (log_q.exp() * fdpg(log_policy, log_q, log_target, log_z, divergence)).sum()


def train(divergence: str, case: dict[str, str], seed: int, steps: int, lr: float, every: int) -> dict[int, float]:
    """max |pi - p| after every `every` steps of Adam on the logits, whose rate falls linearly to 0."""
    rng = torch.Generator().manual_seed(seed)
    log_target, p = target(case["target"], rng)
    logits = torch.randn(OUTCOMES, generator=rng, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    curve = {}
    for step in range(steps + 1):
        if step % every == 0:
            curve[step] = float((torch.softmax(logits.detach(), 0) - p).abs().max())
        optimizer.zero_grad()
        expected_loss(torch.log_softmax(logits, 0), log_target, divergence, case["proposal"]).backward()
        optimizer.step()
        schedule.step()
    return curve


def cells(smoke: bool) -> list[Cell]:
    shape = {"steps": 3000, "lr": 0.05, "every": 30}
    if smoke:
        return [Cell("fdpg_exact", "js", 0, {**CASES["all_on"], **shape, "steps": 60})]
    return [
        Cell("fdpg_exact", divergence, seed, {**case, **shape})
        for divergence in DIVERGENCES
        for case in CASES.values()
        if case["target"] == "all" or divergence not in INFINITE
        for seed in (1, 2, 3)
    ]


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    curve = train(cell.method, s, cell.seed, s["steps"], s["lr"], s["every"])
    return {"steps": list(curve), "distance": list(curve.values()), "final": curve[s["steps"]]}


def judge(records: list[Result]) -> Outcome:
    present = [m for m in LABELS if values(records, "final", method=m)]
    final = {m: {name: values(records, "final", method=m, **case) for name, case in CASES.items()} for m in present}
    worst = {m: max(max(found) for found in final[m].values() if found) for m in present}
    steps = records[0]["result"]["steps"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, method in enumerate(present):
            for name, case in CASES.items():
                for run in values(records, "distance", method=method, **case):
                    style = "-" if name.endswith("on") else ":"
                    axes.plot(steps, [max(x, 1e-12) for x in run], style, color=f"C{number}", alpha=0.6, lw=1)
            axes.plot([], [], color=f"C{number}", label=LABELS[method])
        axes.axhline(1e-3, color="grey", ls="--", lw=1)
        axes.set(
            yscale="log", xlabel="Adam steps", ylabel="max |pi - p|", title="Ten outcomes (dotted: uniform proposal)"
        )
        axes.legend(fontsize=8)

    return Outcome(
        holds=max(worst.values()) < 1e-3,
        verdict=(
            f"Largest |pi - p| after {steps[-1]:,} steps over all targets, proposals and seeds: "
            + "; ".join(f"{LABELS[m]} {worst[m]:.1e}" for m in present)
            + "."
        ),
        columns=["divergence", "p > 0, on policy", "p > 0, uniform", "p = 0 on three, on policy", "uniform"],
        rows=[[LABELS[m], *(f"{max(f):.1e}" if f else "infinite" for f in final[m].values())] for m in present],
        numbers={"final": final, "steps": steps},
        draw=draw,
    )


CLAIM = Claim(
    name="fdpg_exact",
    statement=(
        "In a finite space the f-DPG gradient of each of six divergences leads the policy to the target, to within "
        "1e-3 in every probability, on policy and from a uniform proposal, also where the target forbids outcomes."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *package_files("llmalign.losses")),
)
