"""The regression behind length control: optimality, an independent solver, and what it does to length."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from llmalign.evaluation.length_control import control_length, fit, length_feature


def rows(seed: int, n: int = 300):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = 1 / (1 + np.exp(-(x @ [1.5, -0.4, 0.0] + rng.normal(size=n) * 0.5)))
    return x, y, rng.uniform(0.1, 1, n)


@pytest.mark.parametrize("penalty", [1e-4, 0.02, 1.0, 100.0, 1e4])
def test_optimal_by_its_own_conditions(penalty: float) -> None:
    x, y, weights = rows(0)
    w = fit(x, y, weights, penalty)
    gradient = penalty * x.T @ (weights * (1 / (1 + np.exp(-x @ w)) - y))
    # Zero in the subdifferential: -sign(w) where w is not 0, within [-1, 1] where it is.
    tolerance = 1e-3 * max(1.0, penalty)
    assert np.abs(gradient[w != 0] + np.sign(w[w != 0])).max(initial=0) < tolerance
    assert np.abs(gradient[w == 0]).max(initial=0) <= 1 + tolerance
    if penalty == 1e-4:
        assert not w.any()


@pytest.mark.parametrize("penalty", [0.05, 3.0])
def test_equals_another_solver(penalty: float) -> None:
    x, y, weights = rows(1)
    # A soft label is two rows, one of each class, weighted by its probability.
    other = LogisticRegression(
        l1_ratio=1.0, solver="saga", C=penalty, fit_intercept=False, tol=1e-9, max_iter=20_000
    ).fit(np.concatenate([x, x]), [1] * len(y) + [0] * len(y), np.concatenate([weights * y, weights * (1 - y)]))
    assert fit(x, y, weights, penalty) == pytest.approx(other.coef_[0], abs=1e-4)


def test_a_judge_that_likes_length_alone_is_seen_through() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.integers(100, 900, 600).astype(float), rng.integers(100, 900, 600).astype(float) + 400
    lengths = length_feature(first, second)
    preferences = 1 / (1 + np.exp(2 * lengths))
    found = control_length(lengths, preferences)
    assert preferences.mean() > 0.7
    assert found.preferences.mean() == pytest.approx(0.5, abs=0.02)
    assert found.length == pytest.approx(-2, abs=0.1) and found.difficulty is None


def test_the_feature() -> None:
    first, second = np.array([10.0, 20.0, 40.0]), np.array([13.0, 20.0, 30.0])
    gaps = np.array([-3.0, 0.0, 10.0])
    assert length_feature(first, second) == pytest.approx(np.tanh(gaps / gaps.std(ddof=1)))
    assert not length_feature(first, first - 5).any()


def test_rows_without_a_preference_are_predicted_and_not_fitted() -> None:
    x, y, _ = rows(3)
    whole = control_length(x[:, 0], y, x[:, 1])
    extra = control_length(np.append(x[:, 0], 5.0), np.append(y, np.nan), np.append(x[:, 1], 0.3))
    assert extra.preferences[:-1] == pytest.approx(whole.preferences, abs=1e-9) and len(extra.preferences) == 301
    with pytest.raises(ValueError, match="at least 5 rows"):
        control_length(x[:9, 0], np.array([0.5] * 4 + [np.nan] * 5))
