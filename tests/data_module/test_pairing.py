"""Which pairs are made of scored answers and of judged ones, worked out by hand."""

import math
import random
from collections import Counter

import pytest

from llmalign.data.pairing import REASONS, STRATEGIES, row_rng, select_comparison, select_pairs
from llmalign.errors import UserError

TEXTS = ["a", "b", "c", "d"]


def select(rewards, completions=None, strategy="best_worst", seed=0, **options):
    completions = TEXTS[: len(rewards)] if completions is None else completions
    return select_pairs(rewards, completions, strategy=strategy, rng=random.Random(seed), **options)


@pytest.mark.parametrize(
    ("rewards", "pairs", "dropped"),
    [
        ([1.0, 3.0, 0.0, 2.0], [(1, 2)], {}),
        ([3.0, 0.0, 3.0, 0.0], [(0, 1)], {}),  # of equal rewards the first wins, and the first loses
        ([1.0, 1.0, 1.0], [], {"ties": 1}),
        ([1.0], [], {"alone": 1}),
        ([], [], {"alone": 1}),
        ([None, 2.0, math.nan, 1.0], [(1, 3)], {"unscored": 2}),
        ([math.inf, 2.0, -math.inf, 1.0], [(1, 3)], {"unscored": 2}),
        ([None, 2.0, math.nan], [], {"unscored": 2, "alone": 1}),
    ],
)
def test_best_against_worst(rewards, pairs, dropped) -> None:
    found = select(rewards)
    assert list(found.pairs) == pairs and found.dropped == Counter(dropped)
    assert set(found.dropped) <= set(REASONS) and 0 not in found.dropped.values()


def test_every_pair_is_kept_or_counted() -> None:
    #          a    b    c    d
    rewards = [2.0, 0.0, 2.0, 1.0]
    found = select(rewards, strategy="all_pairs")
    assert found.pairs == ((0, 1), (0, 3), (2, 1), (3, 1), (2, 3))
    assert found.dropped == Counter({"ties": 1})
    found = select(rewards, strategy="all_pairs", margin=2.0)
    assert found.pairs == ((0, 1), (2, 1)) and found.dropped == Counter({"ties": 1, "below_margin": 3})


def test_equal_answers_are_no_pair_and_no_pair_is_made_twice() -> None:
    found = select([3.0, 1.0, 1.0, 0.0], ["x", "y", "y", "x"], strategy="all_pairs")
    # x3-y1 once and not twice, x3-x0 and y1-y1 never, y1-x0 once and not twice.
    assert found.pairs == ((0, 1), (1, 3))
    assert found.dropped == Counter({"repeated": 2, "identical": 2})
    best = select([3.0, 1.0, 0.0], ["x", "y", "x"])
    assert best.pairs == ((0, 1),) and not best.dropped  # the worst answer that is another one
    assert select([3.0, 1.0], ["x", "x"]).dropped == Counter({"identical": 1})
    assert select([1.0, 1.0], ["x", "x"]).dropped == Counter({"identical": 1})


def test_without_a_pair_the_reason_of_the_worst_is_counted() -> None:
    found = select([3.0, 2.9, 0.0], ["x", "y", "x"], margin=1.0)
    assert not found.pairs and found.dropped == Counter({"identical": 1})


def test_completions_may_be_token_ids_or_conversations() -> None:
    ids = [[1, 2], [1], [1, 2]]
    assert select([1.0, 0.5, 0.0], ids).pairs == ((0, 1),)
    turns = [[{"role": "assistant", "content": text}] for text in "xyx"]
    assert select([1.0, 0.5, 0.0], turns).pairs == ((0, 1),)


@pytest.mark.parametrize(("margin", "kept"), [(0.0, 1), (0.2, 1), (0.2001, 0), (5.0, 0)])
def test_a_gap_of_exactly_the_margin_is_kept(margin, kept) -> None:
    """In floating point .3 - .1 is below .2."""
    assert 0.3 - 0.1 < 0.2
    found = select([0.1, 0.3], margin=margin)
    assert len(found.pairs) == kept and found.dropped["below_margin"] == 1 - kept


@pytest.mark.parametrize("margin, others", [(0.0, {1, 2, 3}), (1.5, {1, 3})])
def test_best_random_draws_uniformly_among_those_that_qualify(margin, others) -> None:
    rewards, n = [3.0, 0.0, 2.0, 1.0], 3000
    drawn = Counter()
    for row in range(n):
        found = select_pairs(rewards, TEXTS, strategy="best_random", rng=row_rng(0, row), margin=margin)
        ((best, other),) = found.pairs
        assert best == 0 and not found.dropped
        drawn[other] += 1
    assert set(drawn) == others
    share = 1 / len(others)
    for count in drawn.values():  # within four standard deviations
        assert abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))


def test_a_limit_takes_a_random_subset_in_order() -> None:
    rewards = [3.0, 2.0, 1.0, 0.0]
    whole = select(rewards, strategy="all_pairs")
    assert len(whole.pairs) == 6
    seen = Counter()
    for row in range(600):
        found = select_pairs(rewards, TEXTS, strategy="all_pairs", rng=row_rng(1, row), max_pairs=2)
        assert found.dropped == Counter({"over_limit": 4})
        assert len(found.pairs) == 2 and list(found.pairs) == [pair for pair in whole.pairs if pair in found.pairs]
        seen.update(found.pairs)
    assert set(seen) == set(whole.pairs) and all(140 < count < 260 for count in seen.values())  # 200 are expected
    assert select(rewards, strategy="all_pairs", max_pairs=6) == whole
    assert select(rewards, strategy="all_pairs", max_pairs=5).dropped == Counter({"over_limit": 1})


@pytest.mark.parametrize(("strategy", "limit"), [("best_random", None), ("all_pairs", 2)])
def test_the_order_of_rows_changes_nothing(strategy, limit) -> None:
    def made(rows):
        rewards = [3.0, 0.0, 2.0, 1.0]
        return {
            row: select_pairs(rewards, TEXTS, strategy=strategy, rng=row_rng(4, row), max_pairs=limit) for row in rows
        }

    assert made(range(50)) == made(reversed(range(50))) and len(set(map(str, made(range(50)).values()))) > 2


def test_a_row_has_a_generator_of_its_own() -> None:
    assert row_rng(0, 7).random() == row_rng(0, 7).random()
    draws = {row_rng(seed, row).random() for seed in range(3) for row in range(300)}
    assert len(draws) == 900
    assert row_rng(1, 11).random() != row_rng(11, 1).random() != row_rng(111, 0).random()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chosen_is_always_the_better_one_by_the_margin(strategy) -> None:
    rng = random.Random(5)
    for row in range(200):
        k = rng.randint(0, 6)
        rewards = [rng.choice([None, math.nan, *range(5)]) for _ in range(k)]
        answers = [rng.choice("pqrs") for _ in range(k)]
        margin = rng.choice([0.0, 1.0, 2.0])
        found = select_pairs(rewards, answers, strategy=strategy, rng=row_rng(0, row), margin=margin)
        for chosen, rejected in found.pairs:
            assert rewards[chosen] - rewards[rejected] >= max(margin, 1) and answers[chosen] != answers[rejected]
        scored = sum(reward is not None and math.isfinite(reward) for reward in rewards)
        assert found.dropped["unscored"] == k - scored
        told = len(found.pairs) + found.dropped.total() - found.dropped["unscored"] - found.dropped["alone"]
        assert found.dropped["alone"] == (scored < 2)
        assert told == (0 if scored < 2 else math.comb(scored, 2) if strategy == "all_pairs" else 1)


@pytest.mark.parametrize(
    ("preference", "margin", "pairs", "dropped"),
    [
        (1.0, 0.0, [(0, 1)], {}),
        (2.0, 0.0, [(1, 0)], {}),
        (1.4, 0.0, [(0, 1)], {}),
        (1.9, 0.8, [(1, 0)], {}),  # 2 (1.9 - 1.5) is .8 but for rounding
        (1.9, 0.81, [], {"below_margin": 1}),
        (1.5, 0.0, [], {"ties": 1}),
        (0.0, 0.0, [], {"ties": 1}),
        (0, 0.5, [], {"ties": 1}),
        (None, 0.0, [], {"unjudged": 1}),
        (-1.0, 0.0, [], {"unjudged": 1}),
        (math.nan, 0.0, [], {"unjudged": 1}),
        (2.01, 0.0, [], {"unjudged": 1}),
        (0.99, 0.0, [], {"unjudged": 1}),
        (math.inf, 0.0, [], {"unjudged": 1}),
    ],
)
def test_comparisons(preference, margin, pairs, dropped) -> None:
    found = select_comparison(preference, ["a", "b"], margin=margin)
    assert list(found.pairs) == pairs and found.dropped == Counter(dropped)


def test_a_judge_of_one_answer_twice_is_not_believed() -> None:
    assert select_comparison(1.0, ["a", "a"]).dropped == Counter({"identical": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "best"}, "'best' is no strategy; known are: best_worst, best_random, all_pairs"),
        ({"margin": -0.1}, "margin must be zero or a positive finite number, got -0.1"),
        ({"margin": math.nan}, "margin must be zero or a positive"),
        ({"max_pairs": 2}, "is for all_pairs; best_worst makes one"),
        ({"strategy": "all_pairs", "max_pairs": 0}, "must be at least 1, got 0"),
        ({"completions": ["a"]}, "got 1 and 2"),
    ],
)
def test_options_that_cannot_be_followed(options, words) -> None:
    with pytest.raises(UserError, match=words):
        select([1.0, 0.0], **options)


@pytest.mark.parametrize("margin", [-0.1, 1.1, math.nan])
def test_the_margin_of_a_judge_is_a_confidence(margin) -> None:
    with pytest.raises(UserError, match="confidence and must be in"):
        select_comparison(1.0, ["a", "b"], margin=margin)
