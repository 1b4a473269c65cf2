"""Bradley-Terry strengths of many models from their comparisons: P(i beats j) = sigmoid(s_i - s_j)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row, known_preference

Array = NDArray[np.float64]

ELO = 400 / math.log(10)  # points a nat: 400 points are odds of ten to one
PRIOR = 0.01  # weight of s^2 / 2 in nats: keeps finite a model that wins or loses everything
RESAMPLES = 500
_STEPS, _TOLERANCE = 100, 1e-10


@dataclass(frozen=True)
class Strength:
    """A model's strength in Elo points above the mean of all, its 95 % interval, and its comparisons."""

    elo: float
    low: float
    high: float
    n: int


def bradley_terry(rows: Sequence[Row], *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Strength]:
    """The strengths of all models in annotations, the strongest first; preferences are soft outcomes.

    argmax sum q log sigmoid(s_2 - s_1) + (1 - q) log sigmoid(s_1 - s_2) - PRIOR |s|^2 / 2, with q = preference - 1;
    intervals draw whole instructions. Raises UserError where the rows name no generators, and for models that no chain
    of comparisons joins. Not covered: length control.
    """
    kept = [(row, p - 1) for row in rows if (p := known_preference(row["preference"])) is not None]
    for number, (row, _) in enumerate(kept):
        if not all(isinstance(row.get(f"generator_{side}"), str) for side in (1, 2)):
            raise UserError(f"judged row {number} names no generator_1 and generator_2, so nobody can be ranked")
    kept = [(row, q) for row, q in kept if row["generator_1"] != row["generator_2"]]
    names = sorted({row[f"generator_{side}"] for row, _ in kept for side in (1, 2)})
    if len(names) < 2:
        raise UserError("a ranking needs comparisons between at least two models")
    place = {name: number for number, name in enumerate(names)}
    clusters = {text: number for number, text in enumerate(dict.fromkeys(str(row["instruction"]) for row, _ in kept))}
    pairs: dict[tuple[int, int], int] = {}
    found = [(clusters[str(row["instruction"])], pairs.setdefault(_pair(row, place), len(pairs)), q) for row, q in kept]
    ends = np.array(list(pairs))
    _check_joined(names, ends)
    # Wins of the second and of the first model, by instruction and by pair.
    wins = np.zeros((2, len(clusters), len(pairs)))
    for cluster, pair, q in found:
        wins[0, cluster, pair] += q
        wins[1, cluster, pair] += 1 - q
    strengths = _fit(wins.sum(axis=1), ends, len(names))
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(len(clusters), size=len(clusters)), minlength=len(clusters))
        drawn.append(_fit(np.einsum("c,scp->sp", counts, wins), ends, len(names), strengths))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    games = np.zeros(len(names))
    np.add.at(games, ends.ravel(), np.repeat(wins.sum(axis=(0, 1)), 2))
    order = np.argsort(-strengths)
    return {names[i]: Strength(ELO * strengths[i], ELO * low[i], ELO * high[i], round(float(games[i]))) for i in order}


def _pair(row: Row, place: dict[str, int]) -> tuple[int, int]:
    return place[row["generator_1"]], place[row["generator_2"]]


def _check_joined(names: list[str], ends: NDArray[np.int64]) -> None:
    joined = {0}
    while more := {int(i) for pair in ends for i in pair if joined & set(pair.tolist())} - joined:
        joined |= more
    if len(joined) < len(names):
        apart = next(name for i, name in enumerate(names) if i not in joined)
        raise UserError(f"no chain of comparisons joins {names[0]} and {apart}, so they cannot be ranked together")


def _fit(wins: Array, ends: NDArray[np.int64], count: int, start: Array | None = None) -> Array:
    """Newton's method on the penalised log-likelihood, which is concave; strengths (count,) with mean 0, in nats."""
    s = np.zeros(count) if start is None else start.copy()
    first, second = ends[:, 0], ends[:, 1]
    total = wins.sum(axis=0)
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(s[first] - s[second]))  # of the second model
        slope = wins[0] - total * p
        gradient = -PRIOR * s
        np.add.at(gradient, second, slope)
        np.add.at(gradient, first, -slope)
        curvature = total * p * (1 - p)
        hessian = PRIOR * np.eye(count)
        np.add.at(hessian, (first, first), curvature)
        np.add.at(hessian, (second, second), curvature)
        np.add.at(hessian, (first, second), -curvature)
        np.add.at(hessian, (second, first), -curvature)
        step = np.linalg.solve(hessian, gradient)
        # A long step leaves the region where the quadratic model holds.
        s = s + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < _TOLERANCE:
            break
    return s - s.mean()
