"""How different the samples of one policy are: distinct n-grams, and BLEU of each sample against the others.

Samples are sequences of tokens: ids, words, or a string for its characters. Both numbers depend on how many samples
there are and how long they are; compare only equally many, of about one length.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain

Sample = Sequence[Hashable]
Grams = Counter[tuple[Hashable, ...]]


def distinct_n(samples: Sequence[Sample], n: int) -> float:
    """Distinct-n (https://arxiv.org/abs/1510.03055): different n-grams over all n-grams of all samples, in (0, 1].

    NaN where no sample has n tokens. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    grams = list(chain.from_iterable(_grams(sample, n) for sample in samples))
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(samples: Sequence[Sample], n: int = 5, epsilon: float = 0.1) -> float:
    """Self-BLEU (https://arxiv.org/abs/1802.01886): the mean BLEU-n of each sample against all others, in [0, 1].

    High means alike. Of each sample, the geometric mean of its clipped n-gram precisions of orders 1 to n, times the
    brevity penalty against the other sample of the closest length, the shorter of two. An order without a match counts
    ``epsilon`` matches; orders longer than the sample are left out. An empty sample has BLEU 0. Raises ValueError for
    fewer than two samples and n below 1. Time and memory grow with the number of tokens, not with its square.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if len(samples) < 2:
        raise ValueError(f"self-BLEU compares a sample with the others, so it needs at least 2, got {len(samples)}.")
    precisions = [_log_precisions(samples, order, epsilon) for order in range(1, n + 1)]
    lengths = Counter(len(sample) for sample in samples)
    total = 0.0
    for place, sample in enumerate(samples):
        orders = min(n, len(sample))
        if orders:
            mean = sum(order[place] for order in precisions[:orders]) / orders
            total += math.exp(mean + min(0.0, 1 - _closest_other(lengths, len(sample)) / len(sample)))
    return total / len(samples)


def _log_precisions(samples: Sequence[Sample], order: int, epsilon: float) -> list[float]:
    """Log of each sample's share of n-grams that another sample holds as often; 0 for a sample that is too short."""
    counts: list[Grams] = [Counter(_grams(sample, order)) for sample in samples]
    # The two highest counts of each n-gram in any sample: the highest among the others is one of them.
    highest: dict[tuple[Hashable, ...], tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            first, second = highest.get(gram, (0, 0))
            highest[gram] = (count, first) if count > first else (first, max(second, count))
    logs = []
    for own in counts:
        matches = 0
        for gram, count in own.items():
            first, second = highest[gram]
            matches += min(count, first if count < first else second)
        size = own.total()
        logs.append(math.log((matches or epsilon) / size) if size else 0.0)
    return logs


def _closest_other(lengths: Counter[int], length: int) -> int:
    """Of the lengths of the other samples the closest one, the shorter of two."""
    others = [other for other, count in lengths.items() if count > (other == length)]
    return min(others, key=lambda other: (abs(other - length), other))


def _grams(sample: Sample, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sample[start : start + n]) for start in range(len(sample) - n + 1)]
