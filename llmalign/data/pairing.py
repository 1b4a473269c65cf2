"""Preference pairs out of answers with rewards, or out of judged comparisons: which ones, and why not the others.

Everything is counted: `Selection.dropped` maps a reason of `REASONS` to a number. Chance comes from the generator that
is handed in; `row_rng` makes one for each row, so that a row's pairs depend neither on the other rows nor their order.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmalign.errors import UserError

BEST_WORST, BEST_RANDOM, ALL_PAIRS = STRATEGIES = ("best_worst", "best_random", "all_pairs")
REASONS = {
    "unscored": "answers without a finite reward",
    "empty": "empty answers",
    "alone": "prompts with fewer than two answers left",
    "unjudged": "comparisons without a preference in [1, 2]",
    "identical": "pairs of the same answer",
    "ties": "pairs of equal rewards",
    "below_margin": "pairs below the margin",
    "repeated": "pairs that repeat one of the same prompt",
    "over_limit": "pairs over the limit of a prompt",
}
NEUTRAL = 1.5  # the preference of a tie, also written as 0


@dataclass(frozen=True)
class Selection:
    """Pairs as indices (chosen, rejected) into the answers, and what was dropped, by reason."""

    pairs: tuple[tuple[int, int], ...] = ()
    dropped: Counter[str] = field(default_factory=Counter)


def row_rng(seed: int, row_id: int) -> random.Random:
    """The generator of one row: the same for the same (seed, row_id), whatever was drawn for other rows."""
    return random.Random(f"{seed}:{row_id}")


def select_pairs(
    rewards: Sequence[float | None],
    completions: Sequence[Any],
    *,
    strategy: str,
    rng: random.Random,
    margin: float = 0.0,
    max_pairs: int | None = None,
) -> Selection:
    """The pairs of one prompt's answers, whose rewards differ by more than 0 and by `margin` or more.

    best_worst: the best against the worst. best_random: the best against one of the others that qualify, drawn
    uniformly. all_pairs: each with each, a text against another text once; of more than `max_pairs` a random subset.
    Of equal rewards the first is the best, or the worst. Answers are compared with `==`, so they may be texts,
    conversations or token ids. An answer whose reward is None or not finite is left out. The best_... strategies give
    one pair, or count one under the reason of the worst.

    Raises UserError for rewards and completions of unequal number, an unknown strategy, a margin that is negative or
    not finite, and `max_pairs` below 1 or beside another strategy than all_pairs. Not covered: equal answers with
    different rewards, which may then win one pair and lose another.
    """
    check_options(strategy, margin, max_pairs)
    if len(rewards) != len(completions):
        raise UserError(f"Every completion needs a reward; got {len(completions)} and {len(rewards)}.")
    values = {index: float(reward) for index, reward in enumerate(rewards) if reward is not None}
    group = _Group({index: value for index, value in values.items() if math.isfinite(value)}, completions, margin)
    dropped = Counter({"unscored": len(rewards) - len(group.rewards)})
    if len(group.rewards) < 2:
        return Selection((), +(dropped + Counter(["alone"])))
    pairs, reasons = _all(group) if strategy == ALL_PAIRS else _best(group, strategy, rng)
    if max_pairs is not None and len(pairs) > max_pairs:
        reasons["over_limit"] = len(pairs) - max_pairs
        pairs = [pairs[place] for place in sorted(rng.sample(range(len(pairs)), max_pairs))]
    return Selection(tuple(pairs), +(dropped + reasons))


def select_comparison(preference: float | None, completions: Sequence[Any], *, margin: float = 0.0) -> Selection:
    """The pair of two judged answers: `preference` is 1 where the first wins, 2 where the second does, 1.5 or 0 a tie.

    The margin is the judge's confidence 2 |preference - 1.5|, from 0 to 1. A preference that is None, NaN or outside
    [1, 2] is counted as unjudged. Raises UserError for a margin outside [0, 1] and other than two completions.
    """
    if not 0.0 <= margin <= 1.0:
        raise UserError(f"The margin of judged comparisons is a confidence and must be in [0, 1], got {margin}.")
    if len(completions) != 2:
        raise UserError(f"A comparison has two answers, got {len(completions)}.")
    value = NEUTRAL if preference == 0 else preference
    if value is None or not 1.0 <= value <= 2.0:
        return Selection((), Counter(["unjudged"]))
    group = _Group({0: 2.0 - value, 1: value - 1.0}, completions, margin)  # their difference is the confidence
    pairs, reasons = _all(group)
    return Selection(tuple(pairs), reasons)


def check_options(strategy: str, margin: float, max_pairs: int | None = None) -> None:
    """Raise UserError for options of `select_pairs` that cannot be followed."""
    if strategy not in STRATEGIES:
        raise UserError(f"{strategy!r} is no strategy; known are: {', '.join(STRATEGIES)}.")
    if not (math.isfinite(margin) and margin >= 0.0):
        raise UserError(f"The margin must be zero or a positive finite number, got {margin}.")
    if max_pairs is not None and strategy != ALL_PAIRS:
        raise UserError(f"A limit of pairs for each prompt is for all_pairs; {strategy} makes one pair in any case.")
    if max_pairs is not None and max_pairs < 1:
        raise UserError(f"The limit of pairs for each prompt must be at least 1, got {max_pairs}.")


class _Group:
    """The scored answers of one prompt, by index."""

    def __init__(self, rewards: dict[int, float], completions: Sequence[Any], margin: float) -> None:
        self.rewards, self.margin = rewards, margin
        # The first equal answer stands for an answer, since lists of token ids cannot be hashed.
        self.text = {i: next(j for j in rewards if completions[j] == completions[i]) for i in rewards}

    def fault(self, chosen: int, rejected: int) -> str | None:
        """Why this is no pair, where the reward of `chosen` is not the lower one."""
        gap = self.rewards[chosen] - self.rewards[rejected]
        if self.text[chosen] == self.text[rejected]:
            return "identical"
        if gap == 0.0:
            return "ties"
        # .3 - .1 is a little less than .2, in float32 still less, and whoever writes a margin of .2 means to keep it.
        return None if gap >= self.margin or math.isclose(gap, self.margin, rel_tol=1e-6) else "below_margin"


def _best(group: _Group, strategy: str, rng: random.Random) -> tuple[list[tuple[int, int]], Counter[str]]:
    best = max(group.rewards, key=group.rewards.__getitem__)
    others = sorted((index for index in group.rewards if index != best), key=group.rewards.__getitem__)
    faults = [group.fault(best, other) for other in others]
    fit = [other for other, fault in zip(others, faults, strict=True) if fault is None]
    if not fit:
        return [], Counter([str(faults[0])])
    return [(best, fit[0] if strategy == BEST_WORST else rng.choice(fit))], Counter()


def _all(group: _Group) -> tuple[list[tuple[int, int]], Counter[str]]:
    pairs: list[tuple[int, int]] = []
    reasons: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    for left, right in itertools.combinations(group.rewards, 2):
        pair = (left, right) if group.rewards[left] >= group.rewards[right] else (right, left)
        texts = (group.text[pair[0]], group.text[pair[1]])
        fault = group.fault(*pair) or ("repeated" if texts in seen else None)
        if fault is None:
            pairs.append(pair)
            seen.add(texts)
        else:
            reasons[fault] += 1
    return pairs, reasons
