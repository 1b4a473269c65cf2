"""The stage `evaluate`: how a round's model compares with the start and with the round before, on held-out prompts."""

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmalign.evaluation.winrate import bootstrap_mean, win_rate
from llmalign.loop.cache import LOGPS, score_rows
from llmalign.loop.comparisons import Comparisons, Pair
from llmalign.loop.judge import rewards_of
from llmalign.loop.run import Run
from llmalign.loop.sample import SAMPLES, sample
from llmalign.loop.stages import Made, Row, read_rows, wait_for, write_rows
from llmalign.rewards.preference import Oracle, RewardOracle, by_reward

POLICY, REFERENCE = "policy", "reference"  # folders of log-probs
REWARDS = "rewards.jsonl"
Kept = Callable[[Oracle], Comparisons]  # the comparisons of an oracle that are kept

MOST_CANDIDATES = 64  # responses of a prompt, among which a best one is looked for


def sample_held_out(run: Run, number: int, folder: Path, seed: int) -> Made:
    """Sample a round's answers to the held-out prompts, and score them under its model and under the reference."""
    made = sample(run, folder, run.model(number), run.eval_prompts(), run.loop.eval_samples, seed)
    wait_for(folder / SAMPLES)
    # The start is not scored: it is the reference, unless another is named, and then nothing is learnt of a round.
    if number:
        rows = list(read_rows(folder / SAMPLES))
        for name, model in ((POLICY, run.model(number)), (REFERENCE, run.reference)):
            score_rows(run, folder / name, rows, model)
    return made


def measure(
    run: Run, folder: Path, earlier: list[list[Row]], oracle: Oracle | RewardOracle, open_kept: Kept
) -> dict[str, Any]:
    """What a round's answers are like; `earlier` are the rows of all rounds before, from the start on.

    Each with a 95 % interval over prompts: the win rate against the start and against the round before (answer i
    against answer i, a comparison that failed left out), the length in tokens, the divergence from the reference in
    nats an answer (its KL divergence where temperature and top_p are 1), the reward where the oracle gives one and,
    with an exact oracle and two or more answers a prompt, the duality gap. `open_kept` opens an oracle's comparisons.
    """
    rows = list(read_rows(folder / SAMPLES))
    measured = {"length": _over_prompts(rows, [[len(ids) for ids in row["completion_ids"]] for row in rows])}
    if earlier:
        policy, reference = (read_rows(folder / name / LOGPS) for name in (POLICY, REFERENCE))
        ratios = [np.subtract(p["logps"], r["logps"]).tolist() for p, r in zip(policy, reference, strict=True)]
        measured["kl"] = _over_prompts(rows, ratios)
    if isinstance(oracle, RewardOracle):
        rewards = rewards_of(run, rows, oracle)
        write_rows(folder / REWARDS, _row_by_row(rows, rewards))
        return measured | _by_reward(rows, list(read_rows(folder / REWARDS)), earlier)
    with open_kept(oracle) as comparisons:
        if earlier:
            measured["against_start"] = _against(run, rows, earlier[0], comparisons)
            measured["against_previous"] = _against(run, rows, earlier[-1], comparisons)
        if oracle.exact and run.loop.eval_samples > 1:
            measured["duality_gap"] = duality_gap(run, rows, [*earlier, rows], comparisons)
    return measured


def duality_gap(run: Run, rows: list[Row], pool: list[list[Row]], comparisons: Comparisons) -> dict[str, Any]:
    """How far the best response found beats the policy, 2 max_y P(y > policy | x) - 1, a mean over prompts.

    Candidates are all completions of the prompt in `pool`, the policy's own and those of earlier rounds. The best is
    chosen on one half of the policy's completions and measured on the other, and the other way round, so that it is not
    the luckiest: a lower estimate of the gap, which may fall below 0 by chance.
    """
    gaps: list[list[float]] = []
    for place, row in enumerate(rows):
        own = row["completions"]
        candidates = list(dict.fromkeys(text for rounds in reversed(pool) for text in rounds[place]["completions"]))
        candidates = candidates[:MOST_CANDIDATES]
        asked = [_pair(run, row, one, other) for one in candidates for other in own]
        values = np.array(comparisons.ask(asked)).reshape(len(candidates), len(own))
        values = values[:, ~np.isnan(values).any(axis=0)]  # without what could not be judged
        if values.shape[1] < 2:
            gaps.append([])
            continue
        halves = values[:, 0::2].mean(axis=1), values[:, 1::2].mean(axis=1)
        found = [measured[np.argmax(chosen)] for chosen, measured in (halves, halves[::-1])]
        gaps.append([2 * float(np.mean(found)) - 1])
    return _over_prompts(rows, gaps)


def _against(run: Run, rows: list[Row], others: list[Row], comparisons: Comparisons) -> dict[str, Any]:
    """The win rate over another round on the same prompts, completion by completion."""
    asked, clusters = [], []
    for row, other in zip(rows, others, strict=True):
        for own, against in zip(row["completions"], other["completions"], strict=True):
            asked.append(_pair(run, row, own, against))
            clusters.append(row["place"])
    return _win_rate(comparisons.ask(asked), clusters)


def _row_by_row(rows: list[Row], rewards: list[float | None]) -> list[Row]:
    given = iter(rewards)
    return [{"rewards": list(islice(given, len(row["completions"])))} for row in rows]


def _by_reward(rows: list[Row], rewards: list[Row], earlier: list[list[Row]]) -> dict[str, Any]:
    """The mean reward, and the win rates where the higher reward wins; earlier rows bring their `rewards`."""
    known = [[value for value in row["rewards"] if value is not None] for row in rewards]
    measured = {"reward": _over_prompts(rows, known)}
    places = [row["place"] for row in rows for _ in row["completions"]]
    if earlier:
        for name, others in (("against_start", earlier[0]), ("against_previous", earlier[-1])):
            pairs = zip(_flat(rewards), _flat(others), strict=True)
            measured[name] = _win_rate([by_reward(own, other) for own, other in pairs], places)
    return measured


def _flat(rows: list[Row]) -> list[float]:
    """The rewards of all rows, NaN for one that failed."""
    return [math.nan if value is None else value for row in rows for value in row["rewards"]]


def _win_rate(outcomes: list[float], clusters: list[int]) -> dict[str, Any]:
    known = [(p, cluster) for p, cluster in zip(outcomes, clusters, strict=True) if not math.isnan(p)]
    if not known:
        return {"mean": None, "low": 0.0, "high": 1.0, "n": 0, "failed": len(outcomes)}
    rate = win_rate([p for p, _ in known], [cluster for _, cluster in known])
    return {"mean": rate.rate, "low": rate.low, "high": rate.high, "n": rate.n, "failed": len(outcomes) - rate.n}


def _pair(run: Run, row: Row, first: str, second: str) -> Pair:
    return Pair(row["prompt"], first, second, {name: row[name] for name in run.loop.oracle_columns or ()})


def _over_prompts(rows: list[Row], values: list[list[float]]) -> dict[str, Any]:
    """A mean over all values, with an interval that draws whole prompts."""
    flat = [(value, row["place"]) for row, own in zip(rows, values, strict=True) for value in own]
    if not flat:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return asdict(bootstrap_mean([value for value, _ in flat], [place for _, place in flat]))
