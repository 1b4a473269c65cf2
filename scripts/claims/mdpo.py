"""MDPO, several steps on each rollout held near the sampler, against its m = 1, which is plain policy gradient.

A third method takes the same steps without the divergence: it says which of the two does it.
"""

from pathlib import Path
from typing import Any

from claims import sampled, sampled_report
from claims.cells import Cell, Result, Store
from claims.report import Claim, Figure, Outcome, interval, values
from llmalign.trainers.mdpo import MDPOTrainer
from llmalign.trainers.sampled_configs import MDPOConfig, SampledConfig

STEPS = {"passes": 4}
NO_DIVERGENCE = 1e9
#: the learning rate is the best of the grid in a run of another seed; t falls from `step_size` to `floor`
METHODS: dict[str, dict[str, Any]] = {
    "mdpo": {"lr": 1e-3, "step_size": 1.0, "floor": 0.05, **STEPS},
    "one": {"lr": 1e-3, "step_size": 1.0, "floor": 0.05},
    "free": {"lr": 1e-3, "step_size": NO_DIVERGENCE, "floor": NO_DIVERGENCE, **STEPS},
}
LABELS = {
    "mdpo": "MDPO, m = 4",
    "one": "m = 1, plain policy gradient",
    "free": "m = 4 without the divergence",
}


class OneStepConfig(MDPOConfig):
    """MDPO's options without the rule that asks for two steps a rollout: one is what it is compared with."""

    def __post_init__(self) -> None:
        SampledConfig.__post_init__(self)


def build_trainer(cell: Cell, folder: str, **given: Any) -> MDPOTrainer:
    """The trainer of the cell's method: the same advantages for all."""
    s = cell.setting
    config = OneStepConfig if cell.method == "one" else MDPOConfig
    own = {"step_size": s["step_size"], "step_size_floor": s["floor"]}
    return MDPOTrainer(args=config(**sampled.arguments(cell, folder), **own), **given)


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [Cell("mdpo", m, 0, {**sampled.SHAPE, **s, **sampled.SMOKE}) for m, s in METHODS.items()]
    return [Cell("mdpo", m, seed, {**sampled.SHAPE, **s}) for seed in (1, 2, 3) for m, s in METHODS.items()]


def experiment(cell: Cell, store: Store) -> Result:
    return sampled.experiment(cell, store, build_trainer)


def judge(records: list[Result]) -> Outcome:
    last, way = ({m: values(records, key, method=m) for m in LABELS} for key in ("last_reward", "mean_reward"))
    first = interval([run[0] for m in LABELS for run in values(records, "reward", method=m)]).mean

    def lead(found: dict[str, list[float]], rival: str) -> Any:
        return interval([a - b for a, b in zip(found["mdpo"], found[rival], strict=True)])

    return Outcome(
        holds=lead(last, "one").low > 0,
        verdict=(
            f"The reward on held-out prompts starts at {first:.2f}. MDPO's lead, paired by seed: over m = 1 "
            f"{lead(last, 'one').text(2)} at the end and {lead(way, 'one').text(2)} on the way; over m = 4 without the "
            f"divergence {lead(last, 'free').text(2)} and {lead(way, 'free').text(2)}."
        ),
        columns=["method", *sampled_report.COLUMNS],
        rows=[[LABELS[m], *sampled_report.row(records, m)] for m in LABELS],
        numbers=sampled_report.numbers(records, list(LABELS)),
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
        "each rollout ends with a higher reward on held-out prompts than with one, which is plain policy gradient (the "
        "95 % interval of the difference above 0, paired by seed)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *sampled.SOURCES),
)
