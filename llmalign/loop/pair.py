"""The stage `pair`: from judged completions to the rows that a round trains on."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llmalign.data.pairing import row_rng, select_pairs
from llmalign.errors import UserError
from llmalign.loop.judge import outcome, plan_of, run_plans
from llmalign.loop.run import Run
from llmalign.loop.stages import Made, Row, write_rows
from llmalign.rewards.tournament import SAME, TIE, Chosen, Comparison

PAIRS = "pairs.jsonl"
TRUNCATED = "truncated"


def pair(run: Run, folder: Path, samples: Iterable[Row], judged: Iterable[Row], seed: int) -> Made:
    """Write `pairs.jsonl`: pairs of completions by comparisons or rewards, or groups of them with their rewards."""
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    prompts = 0
    for sample, verdict in zip(samples, judged, strict=True):
        prompts += 1
        rows += _group(run, sample, verdict, dropped) if run.groups else _pairs(run, sample, verdict, seed, dropped)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common() if count) or "no prompts"
        raise UserError(
            f"no pair is left to train on ({reasons}): sample more or hotter (samples_per_prompt, temperature), or "
            "look at the oracle"
        )
    rows = [{"row_id": number, **row} for number, row in enumerate(rows)]
    write_rows(folder / PAIRS, rows)
    counts = {
        "prompts": prompts,
        "groups" if run.groups else "pairs": len(rows),
        "dropped": {reason: count for reason, count in dropped.items() if count},
    }
    measured = {} if run.groups else {"chosen_longer": _share_longer(rows)}
    return Made([PAIRS], counts, measured)


def _pairs(run: Run, sample: Row, verdict: Row, seed: int, dropped: Counter[str]) -> list[Row]:
    if "rewards" in verdict:
        return _rows(run, sample, _by_reward(run, sample, verdict["rewards"], seed, dropped), dropped)
    chosen = _replayed(run, sample, verdict, seed)
    dropped.update(_told_apart(run, sample, verdict, chosen.dropped))
    different = [pair for pair in chosen.pairs if sample["completions"][pair[0]] != sample["completions"][pair[1]]]
    dropped[SAME] += len(chosen.pairs) - len(different)
    return _rows(run, sample, different, dropped)


def _by_reward(
    run: Run, sample: Row, rewards: list[float | None], seed: int, dropped: Counter[str]
) -> list[Comparison]:
    texts, select = sample["completions"], run.loop.select
    # Independent pairs are all pairs of every two neighbours.
    size, strategy = (2, "all_pairs") if select == "independent" else (len(texts), select)
    pairs: list[Comparison] = []
    for first in range(0, len(texts) - len(texts) % size, size):
        own = slice(first, first + size)
        selection = select_pairs(
            rewards[own], texts[own], strategy=strategy, margin=run.loop.margin, rng=row_rng(seed, sample["place"])
        )
        dropped.update(selection.dropped)
        pairs += [(first + chosen, first + rejected) for chosen, rejected in selection.pairs]
    return pairs


def _told_apart(run: Run, sample: Row, verdict: Row, reasons: dict[str, int]) -> dict[str, int]:
    """Why pairs were dropped, with ties of equal answers counted as such; a tournament ties in its last comparison."""
    made = verdict["comparisons"]
    decisive = made[-1:] if run.loop.select in ("best_worst", "best_random") else made
    texts = sample["completions"]
    same = min(reasons.get(TIE, 0), sum(texts[one] == texts[other] for one, other, _ in decisive))
    return {**reasons, TIE: reasons.get(TIE, 0) - same, SAME: same} if same else reasons


def _replayed(run: Run, sample: Row, verdict: Row, seed: int) -> Chosen:
    """What the plan comes to on the recorded comparisons."""
    known = {(one, other): math.nan if p is None else p for one, other, p in verdict["comparisons"]}
    return run_plans(
        [plan_of(run, sample, seed)],
        lambda asked: [outcome(run, seed, sample["place"], *pair, known[pair]) for _, pair in asked],
    )[0]


def _group(run: Run, sample: Row, verdict: Row, dropped: Counter[str]) -> list[Row]:
    """A prompt with its rewarded completions, as CoPG takes them; fewer than two teach nothing."""
    rewarded = [index for index, reward in enumerate(verdict["rewards"]) if reward is not None]
    known = [index for index in rewarded if _usable(run, sample, index)]
    dropped.update({"failed": len(verdict["rewards"]) - len(rewarded), TRUNCATED: len(rewarded) - len(known)})
    if len(known) < 2:
        dropped["fewer_than_two"] += 1
        return []
    kept = {key: [sample[key][index] for index in known] for key in ("completions", "completion_ids")}
    rewards = [verdict["rewards"][index] for index in known]
    return [{"prompt": sample["prompt"], **kept, "rewards": rewards, "prompt_ids": sample["prompt_ids"]}]


def _rows(run: Run, sample: Row, pairs: list[Comparison], dropped: Counter[str]) -> list[Row]:
    usable = [pair for pair in pairs if all(_usable(run, sample, index) for index in pair)]
    dropped[TRUNCATED] += len(pairs) - len(usable)
    return [
        {
            "prompt": sample["prompt"],
            "chosen": sample["completions"][chosen],
            "rejected": sample["completions"][rejected],
            "prompt_ids": sample["prompt_ids"],
            "chosen_ids": sample["completion_ids"][chosen],
            "rejected_ids": sample["completion_ids"][rejected],
        }
        for chosen, rejected in usable
    ]


def _usable(run: Run, sample: Row, index: int) -> bool:
    """Whether a completion has a token to score, and is not one that `truncated: drop` leaves out."""
    return bool(sample["completion_ids"][index]) and (run.loop.truncated == "keep" or sample["ended"][index])


def _share_longer(rows: list[Row]) -> float:
    """Share of pairs whose chosen completion has more tokens; near 1, length is what is learnt."""
    return sum(len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in rows) / len(rows)
