"""The stage `judge`: an oracle's comparisons, or rewards, of the sampled completions."""

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.errors import UserError
from llmalign.loop.comparisons import Comparisons, Pair
from llmalign.loop.run import Run
from llmalign.loop.shards import SHARDS
from llmalign.loop.stages import Made, Row, batches, read_rows, write_rows
from llmalign.rewards.preference import RewardOracle
from llmalign.rewards.tournament import PLANS, Chosen, Comparison, Plan

logger = logging.getLogger(__name__)

JUDGED = "judged.jsonl"
JUDGE_PROMPTS = 256  # prompts whose comparisons are asked for together


def judge(run: Run, folder: Path, samples: Iterable[Row], comparisons: Comparisons, seed: int) -> Made:
    """Write `judged.jsonl`: of each prompt the comparisons (first, second, P) that its plan asked for."""
    rows: list[Row] = []
    identical = 0
    for batch in _batches(run, samples, "Judging"):
        records = [_Record(row) for row in batch]
        _judge_batch(run, records, comparisons, seed)
        rows += [{"place": record.row["place"], "comparisons": record.comparisons} for record in records]
        identical += sum(record.identical() for record in records)
    write_rows(folder / JUDGED, rows)
    total = sum(len(row["comparisons"]) for row in rows)
    unknown = sum(p is None for row in rows for *_, p in row["comparisons"])
    refuse_failures("comparisons", unknown, total, run.loop.max_failed)
    counts = {"prompts": len(rows), "comparisons": total, "identical": identical, "failed": unknown}
    return Made([JUDGED], counts, cost={"asked": comparisons.asked, "found": comparisons.found})


def score(run: Run, folder: Path, samples: Iterable[Row], oracle: RewardOracle) -> Made:
    """Write `judged.jsonl`: of each prompt the rewards of its completions, null for one that failed; by shard."""
    rows: list[Row] = []
    for number, batch in enumerate(_batches(run, samples, "Rewarding")):
        shard = folder / SHARDS / f"{number:05d}.jsonl"
        if not shard.is_file():
            rewards = iter(rewards_of(run, batch, oracle))
            own = ({"place": row["place"], "rewards": [next(rewards) for _ in row["completions"]]} for row in batch)
            write_rows(shard, own)
        rows += read_rows(shard)
    write_rows(folder / JUDGED, rows)
    values = [value for row in rows for value in row["rewards"]]
    known = [value for value in values if value is not None]
    try:
        refuse_failures("rewards", len(values) - len(known), len(values), run.loop.max_failed)
    except UserError:
        for shard in (folder / SHARDS).iterdir():  # what failed is asked for again
            if any(None in row["rewards"] for row in read_rows(shard)):
                shard.unlink()
        raise
    return Made(
        [JUDGED],
        {"prompts": len(rows), "rewards": len(values), "failed": len(values) - len(known)},
        {"mean_reward": sum(known) / len(known)},
    )


def refuse_failures(what: str, failed: int, total: int, limit: float) -> None:
    """Raise UserError where more of the oracle's answers are missing than the recipe allows, or all; say it else."""
    if failed == total or failed > limit * total:
        way_out = "put the oracle right" if failed == total else "put the oracle right or raise max_failed"
        raise UserError(
            f"{failed} of {total} {what} failed (max_failed: {limit:g}); see the warnings above, {way_out}, and start "
            "the same command again: what was answered is kept"
        )
    if failed:
        logger.warning("%d of %d %s failed; what depends on them is left out and counted.", failed, total, what)


@dataclass
class _Record:
    """A prompt with its completions, and what was compared of them: (first, second, P or None)."""

    row: Row
    comparisons: list[tuple[int, int, float | None]] = field(default_factory=list)

    def identical(self) -> int:
        """How many of the comparisons were of equal answers."""
        texts = self.row["completions"]
        return sum(texts[first] == texts[second] for first, second, _ in self.comparisons)


def _judge_batch(run: Run, records: list[_Record], comparisons: Comparisons, seed: int) -> None:
    """Take the plans of some prompts through their levels, and record what they asked for."""

    def ask(asked: list[tuple[int, Comparison]]) -> list[float]:
        outcomes = []
        given = comparisons.ask([_pair(run, records[number].row, pair) for number, pair in asked])
        for (number, pair), p in zip(asked, given, strict=True):
            record = records[number]
            record.comparisons.append((*pair, None if math.isnan(p) else p))
            outcomes.append(outcome(run, seed, record.row["place"], *pair, p))
        return outcomes

    run_plans([plan_of(run, record.row, seed) for record in records], ask)


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


def run_plans(plans: Sequence[Plan], ask: Callable[[list[tuple[int, Comparison]]], list[float]]) -> list[Chosen]:
    """Take all plans through their levels together, to what each comes to."""
    results: dict[int, Chosen] = {}
    levels: dict[int, list[Comparison]] = {}
    for number, plan in enumerate(plans):
        levels[number] = next(plan)
    while levels:
        asked = [(number, pair) for number, level in levels.items() for pair in level]
        outcomes = iter(ask(asked))
        following: dict[int, list[Comparison]] = {}
        for number, level in levels.items():
            own = [next(outcomes) for _ in level]
            try:
                following[number] = plans[number].send(own)
            except StopIteration as stop:
                results[number] = stop.value
        levels = following
    return [results[number] for number in range(len(plans))]


def plan_of(run: Run, row: Row, seed: int) -> Plan:
    """The plan of a prompt's completions; what it draws depends on the round and the prompt's place alone."""
    return PLANS[run.loop.select](len(row["completion_ids"]), random.Random(f"{seed}:{row['place']}"))


def outcome(run: Run, seed: int, place: int, first: int, second: int, p: float) -> float:
    """The outcome of a comparison: P itself, or under `labels: sampled` 1 with probability P and else 0."""
    if run.loop.labels == "likelier" or p == 0.5 or math.isnan(p):
        return p
    # One draw for both orders: a pair that meets twice has one outcome.
    drawn = random.Random(f"{seed}:{place}:{min(first, second)}:{max(first, second)}").random()
    return float(drawn < p) if first < second else float(drawn >= 1 - p)


def _pair(run: Run, row: Row, pair: Comparison) -> Pair:
    columns = {name: row[name] for name in run.loop.oracle_columns or ()}
    return Pair(row["prompt"], row["completions"][pair[0]], row["completions"][pair[1]], columns)


def _batches(run: Run, samples: Iterable[Row], what: str) -> Iterator[list[Row]]:
    return iter(tqdm(batches(samples, JUDGE_PROMPTS), desc=what, unit="batch", disable=run.config.disable_tqdm))
