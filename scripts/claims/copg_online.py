"""CoPG on sampled completions against TRL's GRPO and RLOO, on the embedded world's own reward, at equal samples.

The same number of completions is sampled in two ways: while training, each used once (by CoPG also again, replayed);
and all from the start before training, used in several passes.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import trl

from claims import sampled, sampled_report
from claims.cells import Cell, Result, Store
from claims.report import Claim, Figure, Interval, Outcome, values
from llmalign.trainers.copg import OnlineCoPGTrainer
from llmalign.trainers.sampled_configs import OnlineCoPGConfig

KINDS: dict[str, tuple[Any, Any]] = {
    "copg": (OnlineCoPGTrainer, OnlineCoPGConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}
FIXED = {"data": "start", "rollout": "all", "passes": 3}
#: how the completions are used, and the learning rate: the best of a grid in a run of another seed; both where two tied
METHODS: dict[str, dict[str, Any]] = {
    "copg": {"lr": 1e-3},
    "rloo": {"lr": 1e-3},
    "grpo": {"lr": 1e-3},
    "copg-replay": {"lr": 1e-3, "replay": 16},
    "copg-start": {"lr": 3e-4, **FIXED},
    "rloo-start": {"lr": 3e-4, **FIXED},
    "rloo-start-faster": {"lr": 1e-3, **FIXED},
    "grpo-start": {"lr": 3e-4, **FIXED},
    "grpo-start-faster": {"lr": 1e-3, **FIXED},
    "grpo-start-fresh": {"lr": 3e-4, **FIXED, "rollout": "as fresh"},
}
LABELS = {
    "copg": "CoPG",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "copg-replay": "CoPG, half replayed",
    "copg-start": "CoPG, the start's",
    "rloo-start": "RLOO, the start's, 3e-4",
    "rloo-start-faster": "RLOO, the start's, 1e-3",
    "grpo-start": "GRPO, the start's, 3e-4",
    "grpo-start-faster": "GRPO, the start's, 1e-3",
    "grpo-start-fresh": "GRPO, the start's as if fresh",
}
#: each with CoPG in front, which the others of TRL are compared with
REPORTED = {
    "While training": ("copg", "rloo", "grpo", "copg-replay"),
    "Of the start alone": tuple(method for method in LABELS if "-start" in method),
}


def build_trainer(cell: Cell, folder: str, **given: Any) -> Any:
    """The trainer of the cell's method; TRL's have their defaults where the cell says nothing else.

    Completions of the start are one rollout that holds all of them, so that the ratios of TRL's losses are against the
    model that sampled; or rollouts "as fresh", so that the ratios are against the policy of the moment.
    """
    s = cell.setting
    shared = sampled.arguments(cell, folder)
    trainer_class, config = KINDS[cell.method.split("-")[0]]
    if "replay" in s:
        shared |= {"replay_prompts": s["replay"], "replay_capacity": s["rollouts"] * s["prompts"]}
    if s.get("data") == "start":
        drawn = sampled.Recorded(given["model"], given["processing_class"], cell)
        trainer_class = recorded(trainer_class, drawn)
        shared |= {"steps_per_generation": s["rollouts"]} if s["rollout"] == "all" else {"num_iterations": 1}
    return trainer_class(args=config(**shared), **given)


def recorded(trainer_class: Any, drawn: sampled.Recorded) -> Any:
    """The trainer with completions that were drawn before instead of sampled."""

    class OnRecorded(trainer_class):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any) -> Any:
            return (drawn(prompt_ids), None) if issubclass(trainer_class, trl.GRPOTrainer) else drawn(prompt_ids)

    return OnRecorded


def cells(smoke: bool) -> list[Cell]:
    if not smoke:
        return [Cell("copg_online", m, seed, {**sampled.SHAPE, **s}) for seed in (1, 2, 3) for m, s in METHODS.items()]
    own = {m: {**sampled.SHAPE, **s, **sampled.SMOKE} for m, s in METHODS.items()}
    own["copg-replay"]["replay"] = 2
    return [Cell("copg_online", m, 0, s) for m, s in own.items()]


def experiment(cell: Cell, store: Store) -> Result:
    return sampled.experiment(cell, store, build_trainer)


def _report_leads(records: list[Result]) -> dict[str, dict[str, Interval]]:
    """CoPG's lead over each of TRL's methods in the same group."""
    ran = {record["cell"]["method"] for record in records}
    return {
        group: {m: sampled_report.lead(records, own, m) for m in others if m in ran and not m.startswith("copg")}
        for group, (own, *others) in REPORTED.items()
    }


def judge(records: list[Result]) -> Outcome:
    leads = _report_leads(records)
    found = [method for method in LABELS if values(records, "last_reward", method=method)]
    first = fmean(run[0] for m in found for run in values(records, "reward", method=m))
    said = "; ".join(
        f"{group.lower()}: " + ", ".join(f"over {LABELS[m]} {gap.text(2)}" for m, gap in gaps.items())
        for group, gaps in leads.items()
    )
    fresh = leads["While training"].values()
    fixed = [gap for method, gap in leads["Of the start alone"].items() if not method.endswith("fresh")]
    return Outcome(
        holds=all(gap.high >= 0 for gap in fresh) and all(gap.low > 0 for gap in fixed),
        verdict=f"At the start the reward is {first:.2f}. CoPG's lead in reward - beta KL at the end; {said}.",
        columns=["method", *sampled_report.COLUMNS],
        rows=[[LABELS[m], *sampled_report.row(records, m)] for m in found],
        numbers=sampled_report.numbers(records, found),
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    for axes, (group, methods) in zip(figure.subplots(1, 2, sharey=True), REPORTED.items(), strict=True):
        sampled_report.draw(axes, records, {m: LABELS[m] for m in methods}, "reward")
        axes.set(title=group, xlabel="completions sampled" if group != "Of the start alone" else "of the last pass")
        axes.legend(fontsize=7)


CLAIM = Claim(
    name="copg_online",
    statement=(
        "With the same number of completions and the learning rate of each tuned on one grid, measured by reward less "
        "beta KL on held-out prompts: on fresh completions CoPG is not below TRL's RLOO and GRPO (no 95 % interval of "
        "a difference, paired by seed, lies below 0), and on completions of the start alone it is above both with "
        "their ratio to the start (the intervals lie above 0)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *sampled.SOURCES),
)
