"""MDPO, several steps on each rollout held near the sampler, against its m = 1, which is plain policy gradient.

A third method takes the same steps without the divergence: it says which of the two does it.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from claims import sampled, sampled_report
from claims.cells import Cell, Result, Store
from claims.report import Claim, Figure, Outcome, values
from llmalign.trainers.mdpo import MDPOTrainer
from llmalign.trainers.sampled_configs import MDPOConfig, SampledConfig

STEPS = {"passes": 4}
NO_DIVERGENCE = 1e9
SEEDS = range(11, 19)  # with three the difference is within chance; on these nothing was looked at before
PLAIN = {"step_size": 1.0, "floor": 0.05}
#: the learning rate is the best of a grid in a run of another seed, both where two tied; t falls to `floor`
METHODS: dict[str, dict[str, Any]] = {
    "mdpo": {"lr": 3e-4, **PLAIN, **STEPS},
    "one": {"lr": 1e-3, **PLAIN},
    "one-faster": {"lr": 3e-3, **PLAIN},
    "free": {"lr": 1e-3, "step_size": NO_DIVERGENCE, "floor": NO_DIVERGENCE, **STEPS},
}
LABELS = {
    "mdpo": "MDPO, m = 4, 3e-4",
    "mdpo-faster": "MDPO, m = 4, 1e-3",
    "one": "m = 1, 1e-3",
    "one-faster": "m = 1, 3e-3",
    "free": "m = 4 without the divergence, 1e-3",
}


class OneStepConfig(MDPOConfig):
    """MDPO's options without the rule that asks for two steps a rollout: one is what it is compared with."""

    def __post_init__(self) -> None:
        SampledConfig.__post_init__(self)


def build_trainer(cell: Cell, folder: str, **given: Any) -> MDPOTrainer:
    """The trainer of the cell's method: the same advantages for all."""
    s = cell.setting
    config = OneStepConfig if s["passes"] == 1 else MDPOConfig
    own = {"step_size": s["step_size"], "step_size_floor": s["floor"]}
    return MDPOTrainer(args=config(**sampled.arguments(cell, folder), **own), **given)


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [Cell("mdpo", m, 0, {**sampled.SHAPE, **s, **sampled.SMOKE}) for m, s in METHODS.items()]
    # MDPO at the rate of the run without the divergence shows what the divergence does.
    methods = METHODS | {"mdpo-faster": METHODS["mdpo"] | {"lr": METHODS["free"]["lr"]}}
    return [Cell("mdpo", m, seed, {**sampled.SHAPE, **s}) for seed in SEEDS for m, s in methods.items()]


def experiment(cell: Cell, store: Store) -> Result:
    return sampled.experiment(cell, store, build_trainer)


def judge(records: list[Result]) -> Outcome:
    found = [method for method in LABELS if values(records, "last_reward", method=method)]
    first = fmean(run[0] for m in found for run in values(records, "reward", method=m))
    leads = {m: sampled_report.lead(records, "mdpo", m) for m in ("one", "one-faster", "free")}
    return Outcome(
        holds=all(leads[m].low > 0 for m in ("one", "one-faster")),
        verdict=(
            f"At the start the reward is {first:.2f}. MDPO's lead in reward - beta KL at the end, paired by seed: "
            + ", ".join(f"over {LABELS[m]} {gap.text(2)}" for m, gap in leads.items())
            + "."
        ),
        columns=["method", *sampled_report.COLUMNS],
        rows=[[LABELS[m], *sampled_report.row(records, m)] for m in found],
        numbers=sampled_report.numbers(records, found),
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    titles = {"reward": "Reward on held-out prompts", "kl": "KL to the start, nats"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        sampled_report.draw(axes, records, LABELS, key)
        axes.set(title=f"{title}: mean, 95 %", xlabel="completions sampled")
        axes.legend(fontsize=8)


CLAIM = Claim(
    name="mdpo",
    statement=(
        "With the same number of completions and the learning rate of each tuned on one grid, MDPO with four steps on "
        "each rollout ends with more reward less beta KL on held-out prompts than with one, which is plain policy "
        "gradient (the 95 % interval of the difference above 0, paired by seed)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *sampled.SOURCES),
)
