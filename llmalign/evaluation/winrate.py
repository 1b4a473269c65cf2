"""Win rates and other means over prompts, each with a 95 % interval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, *, scale: float = 1.0, digits: int = 2) -> str:
        """`mean [low, high]`, all times `scale` (100 for percent)."""
        return _with_interval(self.mean, self.low, self.high, scale, digits)


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, a tie counting one half, with its 95 % interval and the counts behind it.

    `n` = wins + losses + ties. With n = 0 nothing is known: the rate is NaN and the interval [0, 1].
    """

    rate: float
    low: float
    high: float
    n: int
    wins: int
    losses: int
    ties: int

    def text(self, *, scale: float = 1.0, digits: int = 2) -> str:
        """`rate [low, high]`, all times `scale` (100 for percent); says so where there was nothing to compare."""
        return _with_interval(self.rate, self.low, self.high, scale, digits) if self.n else "nothing to compare"


def _with_interval(centre: float, low: float, high: float, scale: float, digits: int) -> str:
    return f"{scale * centre:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def win_rate(
    outcomes: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> WinRate:
    """The win rate of N comparisons, outcomes in [0, 1] (1 won, 0 lost, 0.5 a tie; judge probabilities are fine).

    Without `clusters` the comparisons are taken as independent and the interval is Wilson's score interval; ties make
    it a little too wide, never too narrow. With `clusters` (N prompt ids, several comparisons a prompt) whole prompts
    are drawn in a percentile bootstrap, because comparisons that share a prompt are not independent; where all prompts
    agree the bootstrap has no spread, and Wilson's interval over the prompts is given. In `wins`, `losses` and `ties`
    an outcome counts by the side of one half that it lies on. Raises ValueError for no outcomes, outcomes outside [0,
    1] or lengths that differ.
    """
    values = _checked(outcomes, clusters)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {values.min()} to {values.max()}")
    rate = float(values.mean())
    if clusters is None:
        low, high = wilson(rate, len(values))
    else:
        means = _bootstrap(values, clusters, seed, resamples)
        low, high = _percentiles(means)
        if means.min() == means.max():
            low, high = wilson(rate, len(set(clusters)))
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    return WinRate(rate, low, high, len(values), wins, losses, len(values) - wins - losses)


def length_matched(
    outcomes: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    tolerance: float = 0.15,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WinRate:
    """The win rate over the comparisons whose two outputs are about equally long.

    A comparison counts when its lengths (words or tokens, both in the same unit) differ by at most `tolerance` of the
    longer one, so that neither side can win by length. The prompts that remain may differ from those that fall out:
    this is not AlpacaEval's length-controlled win rate, which models length instead of restricting it. When no
    comparison remains, the result has n = 0. Raises ValueError as `win_rate` does, and for a tolerance outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
    if not len(outcomes) == len(lengths) == len(other_lengths):
        raise ValueError(f"{len(outcomes)} outcomes need as many lengths, got {len(lengths)} and {len(other_lengths)}")
    values = _checked(outcomes, clusters)
    first, second = np.asarray(lengths, dtype=float), np.asarray(other_lengths, dtype=float)
    kept = np.flatnonzero(np.abs(first - second) <= tolerance * np.maximum(first, second)).tolist()
    if len(kept) == 0:
        return WinRate(math.nan, 0.0, 1.0, 0, 0, 0, 0)
    prompts = None if clusters is None else [clusters[i] for i in kept]
    return win_rate(values[kept].tolist(), prompts, seed=seed, resamples=resamples)


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of N values with a percentile bootstrap interval; whole clusters are drawn where they are given.

    Raises ValueError for no values or lengths that differ. The interval is too narrow below about 20 clusters.
    """
    array = _checked(values, clusters)
    low, high = _percentiles(_bootstrap(array, clusters, seed, resamples))
    return Estimate(float(array.mean()), low, high, len(array))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of first minus second over N paired values (two policies on the same prompts), with its bootstrap interval.

    Pairs stay together when they are drawn, so what makes a prompt easy or hard for both cancels. Raises ValueError for
    lengths that differ.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be equally many, got {len(first)} and {len(second)}")
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return bootstrap_mean(gaps.tolist(), clusters, seed=seed, resamples=resamples)


def _checked(values: Sequence[float], clusters: Sequence[Hashable] | None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("at least one value is needed, in a flat list")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    if clusters is not None and len(clusters) != len(array):
        raise ValueError(f"{len(array)} values need as many clusters, got {len(clusters)}")
    return array


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent trials: the p with |rate - p| <= Z sqrt(p (1 - p) / n)."""
    shrink = 1 + Z**2 / n
    centre = (rate + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bootstrap(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None, seed: int, resamples: int
) -> NDArray[np.float64]:
    """Means (resamples,) of samples of as many clusters as there are, drawn with replacement."""
    order = {name: place for place, name in enumerate(dict.fromkeys(clusters or range(len(values))))}
    places = np.array([order[name] for name in (clusters or range(len(values)))])
    sums = np.bincount(places, weights=values)
    counts = np.bincount(places).astype(float)
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, 4_000_000 // len(order))  # bounds the memory where there are many clusters
    for start in range(0, resamples, block):
        drawn = generator.integers(len(order), size=(min(block, resamples - start), len(order)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
