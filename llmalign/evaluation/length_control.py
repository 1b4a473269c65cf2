"""AlpacaEval's length-controlled win rate: a logistic regression of preferences on length, difficulty and the model.

    P(model wins row i) = sigmoid(a tanh(d_i / sd(d)) + b difficulty_i + c),  d_i = len(output_1) - len(output_2)

Length-controlled preferences are those of the fitted model at d = 0 (Dubois et al. 2024, arXiv 2404.04475).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES = np.logspace(-4, 4, 10)  # C: one over the weight of the L1 norm
FOLDS = 5
GAMED_WEIGHT = 0.1  # of each row of two baselines that were made to win by length: half of 0.2
_STEPS, _INNER, _TOLERANCE = 200, 50, 1e-9


@dataclass(frozen=True)
class Gamed:
    """Judged rows of baselines that differ in length alone, M of them; they keep `a` away from what a model did.

    `lengths` tanh(d / sd(d)), `difficulty`, `preferences` in [0, 1], each (M,).
    """

    lengths: Array
    difficulty: Array
    preferences: Array


@dataclass(frozen=True)
class LengthControl:
    """The fit: preferences (N,) in [0, 1] at equal lengths, coefficients of length, difficulty and model, and C."""

    preferences: Array
    length: float
    difficulty: float | None
    model: float
    penalty: float


def length_feature(first: Array, second: Array) -> Array:
    """tanh(d / sd(d)) of the lengths (N,) in characters of two outputs, sd with ddof 1; 0 where all d are equal."""
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    spread = gaps.std(ddof=1) if len(gaps) > 1 else 0.0
    return np.tanh(gaps / spread) if spread > 0 else np.zeros(len(gaps))


def control_length(
    lengths: Array, preferences: Array, difficulty: Array | None = None, gamed: Gamed | None = None
) -> LengthControl:
    """Fit preferences (N,) in [0, 1] on `lengths` (N,), what `length_feature` gives, and `difficulty` (N,) if known.

    Soft labels, L1 penalty, C by cross-validation over rows in five folds, fitted again on all. A row whose preference
    is NaN is not fitted but predicted, as the official code does. `gamed` rows need `difficulty`. Raises ValueError for
    fewer judged rows than folds, and for gamed rows without difficulties. Not covered: the official code's choice of C
    where two values are nearly tied, which depends on the CPU.
    """
    judged = ~np.isnan(preferences)
    if judged.sum() < FOLDS:
        raise ValueError(f"the length-controlled win rate needs at least {FOLDS} rows, got {int(judged.sum())}")
    if gamed is not None and difficulty is None:
        raise ValueError("gamed rows come with difficulties, so the model's rows need theirs")
    ones = np.ones(len(preferences))
    own = np.column_stack([lengths, ones] if difficulty is None else [lengths, difficulty, ones])
    x, y, weights = own[judged], preferences[judged], ones[judged]
    if gamed is not None:
        extra = np.column_stack([gamed.lengths, gamed.difficulty, np.zeros(len(gamed.lengths))])
        # The gamed rows first, as the official code has them: which rows share a fold depends on it.
        x, y = np.concatenate([extra, x]), np.concatenate([gamed.preferences, y])
        weights = np.concatenate([np.full(len(extra), GAMED_WEIGHT), weights])
    penalty = _choose(x, y, weights)
    fitted = fit(x, y, weights, penalty)
    own[:, 0] = 0.0
    by_difficulty = None if difficulty is None else float(fitted[1])
    return LengthControl(_sigmoid(own @ fitted), float(fitted[0]), by_difficulty, float(fitted[-1]), penalty)


def fit(x: Array, y: Array, weights: Array, penalty: float, start: Array | None = None) -> Array:
    """argmin_w |w|_1 + C sum_i weights_i (log(1 + e^(x_i w)) - y_i x_i w), of x (N, K), y (N,) in [0, 1]; proximal
    Newton steps with a line search, to 1e-9 of the optimum's value."""
    w = np.zeros(x.shape[1]) if start is None else start.copy()
    value = _objective(w, x, y, weights, penalty)
    for _ in range(_STEPS):
        p = _sigmoid(x @ w)
        gradient = penalty * (x.T @ (weights * (p - y)))
        curvature = weights * np.maximum(p * (1 - p), 1e-10)
        hessian = penalty * (x.T * curvature) @ x + 1e-10 * np.eye(len(w))
        step = _lasso_step(w, gradient, hessian) - w
        # What the quadratic model promises; a step that keeps a hundredth of it is taken.
        promised = gradient @ step + np.abs(w + step).sum() - np.abs(w).sum()
        size = 1.0
        while (new := _objective(w + size * step, x, y, weights, penalty)) > value + 0.01 * size * promised:
            size /= 2
            if size < 1e-10:
                return w
        w, before, value = w + size * step, value, new
        if before - value <= _TOLERANCE * max(abs(value), 1.0):
            break
    return w


def _choose(x: Array, y: Array, weights: Array) -> float:
    """The C with the least weighted soft log loss on held-out folds, a mean over folds; the smallest among equals."""
    losses = np.zeros(len(PENALTIES))
    folds = np.arange(len(y))[::-1] % FOLDS
    for fold in range(FOLDS):
        kept, held = folds != fold, folds == fold
        w: Array | None = None
        for place, penalty in enumerate(PENALTIES):
            w = fit(x[kept], y[kept], weights[kept], float(penalty), w)
            scores = x[held] @ w
            losses[place] += float(np.mean(weights[held] * (np.logaddexp(0, scores) - y[held] * scores)))
    return float(PENALTIES[int(np.argmin(losses))])


def _lasso_step(w: Array, gradient: Array, hessian: Array) -> Array:
    """argmin_v g (v - w) + (v - w) H (v - w) / 2 + |v|_1, coordinate by coordinate."""
    v = w.copy()
    for _ in range(_INNER):
        largest = 0.0
        for k in range(len(v)):
            slope = gradient[k] + hessian[k] @ (v - w)
            target = v[k] - slope / hessian[k, k]
            moved = np.sign(target) * max(abs(target) - 1 / hessian[k, k], 0.0)
            largest = max(largest, abs(moved - v[k]))
            v[k] = moved
        if largest < 1e-12:
            break
    return v


def _objective(w: Array, x: Array, y: Array, weights: Array, penalty: float) -> float:
    scores = x @ w
    return float(np.abs(w).sum() + penalty * np.sum(weights * (np.logaddexp(0, scores) - y * scores)))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))
