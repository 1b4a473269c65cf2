"""Which of K answers to compare, and which pairs to train on, as a plan that asks for comparisons level by level.

A plan is a generator over indices of answers: it yields the comparisons (first, second) of a level, is sent the
outcome of each (1 the first won, 0 it lost, 0.5 a tie, or anything between; NaN, not known), and returns its pairs
(chosen, rejected). A comparison that is not known costs a tournament its pair, and elsewhere itself alone.

All plans of a batch of prompts go through their levels together, so that an oracle sees large batches; the same plan
sent the same outcomes comes to the same pairs, so that a selection can be made again from recorded ones.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from llmalign.errors import UserError

Comparison = tuple[int, int]

TIE, DISAGREED, SAME, FAILED = "tie", "winner_lost_to_loser", "same_answer", "failed"


@dataclass(frozen=True)
class Chosen:
    """Pairs (chosen, rejected) of a prompt's answers, and why others were dropped: reason to count."""

    pairs: list[Comparison] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


Plan = Generator[list[Comparison], Sequence[float], Chosen]


def best_worst(count: int, rng: random.Random) -> Plan:
    """INPO's tournament (arXiv 2407.00617, appendix B): K = 8 takes 4 + 3 + 3 + 1 = 11 comparisons.

    Answers meet in twos, winners meet winners and losers meet losers; of a tie the first is the winner. The last winner
    then meets the last loser, and the pair is kept only if it wins. An odd one out goes on without a comparison.
    """
    outcomes = yield _in_twos(range(count))
    if any(map(math.isnan, outcomes)):
        return Chosen(dropped={FAILED: 1})
    top, bottom = _advance(range(count), outcomes, winners=True), _advance(range(count), outcomes, winners=False)
    while len(top) > 1 or len(bottom) > 1:
        upper, lower = _in_twos(top), _in_twos(bottom)
        outcomes = yield [*upper, *lower]
        if any(map(math.isnan, outcomes)):
            return Chosen(dropped={FAILED: 1})
        top = _advance(top, outcomes[: len(upper)], winners=True)
        bottom = _advance(bottom, outcomes[len(upper) :], winners=False)
    return (yield from _kept_if_it_wins(top[0], bottom[0]))


def best_random(count: int, rng: random.Random) -> Plan:
    """The winner of a knock-out against another answer drawn at random, kept only if it wins."""
    top: Sequence[int] = range(count)
    while len(top) > 1:
        outcomes = yield _in_twos(top)
        if any(map(math.isnan, outcomes)):
            return Chosen(dropped={FAILED: 1})
        top = _advance(top, outcomes, winners=True)
    other = rng.choice([index for index in range(count) if index != top[0]])
    return (yield from _kept_if_it_wins(top[0], other))


def all_pairs(count: int, rng: random.Random) -> Plan:
    """Every pair of answers, the winner against the loser."""
    return (yield from _each(list(combinations(range(count), 2))))


def independent(count: int, rng: random.Random) -> Plan:
    """Answers in twos, each in one pair: draws of two from the policy, as INPO's Proposition 6 asks."""
    return (yield from _each(_in_twos(range(count))))


PLANS: dict[str, Callable[[int, random.Random], Plan]] = {
    "best_worst": best_worst, "best_random": best_random, "all_pairs": all_pairs, "independent": independent,
}  # fmt: skip


def comparisons_of(select: str, count: int) -> int:
    """How many comparisons a plan takes for `count` answers. Raises UserError for an unknown one or too few answers."""
    if select not in PLANS:
        raise UserError(f"select takes {', '.join(PLANS)}; got {select!r}")
    if count < 2:
        raise UserError(f"samples_per_prompt must be at least 2 to compare answers, got {count}")
    plan, total = PLANS[select](count, random.Random(0)), 0
    try:
        level = next(plan)
        while True:
            total += len(level)
            level = plan.send([1.0] * len(level))
    except StopIteration:
        return total


def _kept_if_it_wins(best: int, worst: int) -> Plan:
    if best == worst:
        return Chosen(dropped={DISAGREED: 1})
    (outcome,) = yield [(best, worst)]
    if outcome == 0.5 or math.isnan(outcome):
        return Chosen(dropped={TIE if outcome == 0.5 else FAILED: 1})
    return Chosen([(best, worst)]) if outcome > 0.5 else Chosen(dropped={DISAGREED: 1})


def _each(comparisons: list[Comparison]) -> Plan:
    outcomes = yield comparisons
    pairs = []
    dropped: Counter[str] = Counter()
    for (first, second), outcome in zip(comparisons, outcomes, strict=True):
        if math.isnan(outcome) or outcome == 0.5:
            dropped[TIE if outcome == 0.5 else FAILED] += 1
        else:
            pairs.append((first, second) if outcome > 0.5 else (second, first))
    return Chosen(pairs, dict(dropped))


def _in_twos(entrants: Sequence[int]) -> list[Comparison]:
    return list(zip(entrants[::2], entrants[1::2], strict=False))


def _advance(entrants: Sequence[int], outcomes: Sequence[float], *, winners: bool) -> list[int]:
    """Who goes on from a level; of a tie the first is the winner."""
    met = _in_twos(entrants)
    gone_on = [
        first if (outcome >= 0.5) == winners else second for (first, second), outcome in zip(met, outcomes, strict=True)
    ]
    return gone_on + list(entrants[2 * len(met) :])
