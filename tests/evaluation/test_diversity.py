"""Distinct-n and self-BLEU against numbers worked out by hand."""

import math
import random
from collections import Counter

import pytest

from llmalign.evaluation import distinct_n, self_bleu


def test_distinct_n_by_hand():
    samples = ["a b a b".split(), "a b c".split()]
    # unigrams a b a b a b c: 3 of 7; bigrams ab ba ab ab bc: 3 of 5; trigrams aba bab abc: 3 of 3; 4-grams abab: 1 of 1
    assert [distinct_n(samples, n) for n in (1, 2, 3, 4)] == pytest.approx([3 / 7, 3 / 5, 1, 1])
    assert math.isnan(distinct_n(samples, 5)) and math.isnan(distinct_n([], 1))
    assert distinct_n([[1, 2], [3, 1]], 1) == 0.75
    assert distinct_n(["abab"], 1) == 0.5


def test_self_bleu_by_hand():
    samples = ["a b c".split(), "a b d".split()]
    # Each against the other: unigrams 2/3, bigrams 1/2, trigrams none, so .1/1; equal lengths, no penalty.
    assert self_bleu(samples, n=1) == pytest.approx(2 / 3)
    assert self_bleu(samples, n=2) == pytest.approx((2 / 3 * 1 / 2) ** (1 / 2))
    assert self_bleu(samples, n=3) == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    assert self_bleu(samples, n=5) == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))  # no sample has 4 tokens


def test_counts_are_clipped_and_short_samples_pay():
    # "a a a" against "a b": one of three a's counts: 1/3, no penalty. "a b" against "a a a": 1/2, penalty e^(1 - 3/2).
    assert self_bleu(["a a a".split(), "a b".split()], n=1) == pytest.approx((1 / 3 + math.exp(-0.5) / 2) / 2)


def test_the_reference_of_the_closest_length_counts():
    # lengths 2, 3, 4: for 3 both others are one away, and the shorter one counts: no penalty. All hold a's alone.
    assert self_bleu([["a"] * 2, ["a"] * 3, ["a"] * 4], n=1) == pytest.approx((math.exp(1 - 3 / 2) + 1 + 3 / 4) / 3)


def test_equal_samples_are_wholly_alike_and_disjoint_ones_hardly():
    assert self_bleu(["the cat sat on the mat".split()] * 4) == pytest.approx(1)
    assert self_bleu([["a"], ["a"]]) == pytest.approx(1)
    # No match in any order, six tokens: (.1/6 .1/5 .1/4 .1/3 .1/2)^(1/5)
    expected = (0.1**5 / (6 * 5 * 4 * 3 * 2)) ** (1 / 5)
    assert self_bleu([list("abcdef"), list("ghijkl")]) == pytest.approx(expected)
    assert self_bleu([[], ["a"], ["a"]]) == pytest.approx(2 / 3)


def plain_self_bleu(samples: list[list[int]], n: int) -> float:
    """The definition, sample against sample."""
    total = 0.0
    for place, sample in enumerate(samples):
        others = samples[:place] + samples[place + 1 :]
        logs = 0.0
        for order in range(1, n + 1):
            own, *references = (
                Counter(tuple(one[i : i + order]) for i in range(len(one) - order + 1)) for one in (sample, *others)
            )
            matches = sum(min(count, max(one[gram] for one in references)) for gram, count in own.items())
            logs += math.log(max(matches, 0.1) / sum(own.values())) / n
        closest = min((abs(len(one) - len(sample)), len(one)) for one in others)[1]
        total += math.exp(logs + min(0.0, 1 - closest / len(sample)))
    return total / len(samples)


@pytest.mark.parametrize("seed", range(3))
def test_self_bleu_is_its_definition(seed):
    draw = random.Random(seed)
    samples = [[draw.randrange(4) for _ in range(draw.randrange(5, 12))] for _ in range(9)]
    assert self_bleu(samples) == pytest.approx(plain_self_bleu(samples, 5), rel=1e-12)


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        self_bleu([["a"]])
    for call in (distinct_n, self_bleu):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            call([["a"], ["b"]], 0)
