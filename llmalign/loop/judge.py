"""The stage `judge`: an oracle's comparisons, or rewards, of the sampled completions."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.errors import UserError
from llmalign.loop.comparisons import Comparisons, Count, Pair
from llmalign.loop.run import Run
from llmalign.loop.stages import Made, Row, write_rows
from llmalign.rewards.preference import RewardOracle
from llmalign.rewards.tournament import PLANS, Chosen, Comparison, Plan

logger = logging.getLogger(__name__)

JUDGED = "judged.jsonl"
JUDGE_PROMPTS = 256  # prompts whose comparisons are asked for together


def judge(run: Run, folder: Path, samples: list[Row], comparisons: Comparisons, seed: int) -> Made:
    """Write `judged.jsonl`: of each prompt the comparisons (first, second, P) that its plan asked for."""
    before = comparisons.count.copy()
    rows: list[Row] = []
    for first in _batches(run, samples, "Judging"):
        batch = samples[first : first + JUDGE_PROMPTS]
        records: list[list[list[Any]]] = [[] for _ in batch]

        def ask(asked: list[tuple[int, Comparison]], batch: list[Row] = batch, records: Any = records) -> list[float]:
            given = comparisons.ask([_pair(run, batch[row], pair) for row, pair in asked])
            for (row, (one, other)), p in zip(asked, given, strict=True):
                records[row].append([one, other, None if math.isnan(p) else p])
            return [
                outcome(run, seed, batch[row]["place"], *pair, p) for (row, pair), p in zip(asked, given, strict=True)
            ]

        run_plans([plan_of(run, row, seed) for row in batch], ask)
        rows += [{"place": row["place"], "comparisons": own} for row, own in zip(batch, records, strict=True)]
    write_rows(folder / JUDGED, rows)
    spent = comparisons.count - before
    _refuse_nothing(spent)
    total = sum(len(row["comparisons"]) for row in rows)
    unknown = sum(p is None for row in rows for *_, p in row["comparisons"])
    identical = sum(
        samples[place]["completions"][one] == samples[place]["completions"][other]
        for place, row in enumerate(rows)
        for one, other, _ in row["comparisons"]
    )
    counts = {"prompts": len(rows), "comparisons": total, "identical": identical, "failed": unknown}
    return Made([JUDGED], counts, cost={"asked": spent.asked, "found": spent.found})


def score(run: Run, folder: Path, samples: list[Row], oracle: RewardOracle) -> Made:
    """Write `judged.jsonl`: of each prompt the rewards of its completions, null for one that failed."""
    rows: list[Row] = []
    for first in _batches(run, samples, "Rewarding"):
        batch = samples[first : first + JUDGE_PROMPTS]
        rewards = iter(rewards_of(run, batch, oracle))
        rows += [{"place": row["place"], "rewards": [next(rewards) for _ in row["completions"]]} for row in batch]
    write_rows(folder / JUDGED, rows)
    values = [value for row in rows for value in row["rewards"]]
    known = [value for value in values if value is not None]
    if not known:
        raise UserError("no completion has a reward: put the reward right and start the same command again")
    return Made(
        [JUDGED],
        {"prompts": len(rows), "rewards": len(values), "failed": len(values) - len(known)},
        {"mean_reward": sum(known) / len(known)},
    )


def rewards_of(run: Run, rows: list[Row], oracle: RewardOracle) -> list[float | None]:
    """Rewards of all completions of some rows, row by row; None for one that failed."""
    flat = [
        (row, text, ids) for row in rows for text, ids in zip(row["completions"], row["completion_ids"], strict=True)
    ]
    columns = {name: [row[name] for row, _, _ in flat] for name in run.loop.oracle_columns or ()}
    given = oracle.rewards(
        [row["prompt"] for row, _, _ in flat],
        [text for _, text, _ in flat],
        completion_ids=[ids for _, _, ids in flat],
        **columns,
    )
    return [None if math.isnan(value) else value for value in given]


def run_plans(plans: Sequence[Plan], ask: Callable[[list[tuple[int, Comparison]]], list[float]]) -> list[Chosen | None]:
    """Take all plans through their levels together; None for one of whose comparisons an outcome is not known (NaN)."""
    results: list[Chosen | None] = [None] * len(plans)
    levels: dict[int, list[Comparison]] = {}
    for number, plan in enumerate(plans):
        levels[number] = next(plan)
    while levels:
        asked = [(number, pair) for number, level in levels.items() for pair in level]
        outcomes = iter(ask(asked))
        following: dict[int, list[Comparison]] = {}
        for number, level in levels.items():
            own = [next(outcomes) for _ in level]
            if any(map(math.isnan, own)):
                continue
            try:
                following[number] = plans[number].send(own)
            except StopIteration as stop:
                results[number] = stop.value
        levels = following
    return results


def plan_of(run: Run, row: Row, seed: int) -> Plan:
    """The plan of a prompt's completions; what it draws depends on the round and the prompt's place alone."""
    return PLANS[run.loop.select](len(row["completion_ids"]), random.Random(f"{seed}:{row['place']}"))


def outcome(run: Run, seed: int, place: int, first: int, second: int, p: float) -> float:
    """The outcome of a comparison: P itself, or under `labels: sampled` 1 with probability P and else 0."""
    if run.loop.labels == "likelier" or p == 0.5 or math.isnan(p):
        return p
    return float(random.Random(f"{seed}:{place}:{first}:{second}").random() < p)


def _pair(run: Run, row: Row, pair: Comparison) -> Pair:
    columns = {name: row[name] for name in run.loop.oracle_columns or ()}
    return Pair(row["prompt"], row["completions"][pair[0]], row["completions"][pair[1]], columns)


def _batches(run: Run, samples: list[Row], what: str) -> Any:
    return tqdm(range(0, len(samples), JUDGE_PROMPTS), desc=what, unit="batch", disable=run.config.disable_tqdm)


def _refuse_nothing(spent: Count) -> None:
    if spent.asked and spent.failed == spent.asked:
        raise UserError(
            f"the oracle gave no answer to any of {spent.asked} comparisons; see the warnings above, put it right and "
            "start the same command again"
        )
