"""Bradley-Terry strengths against closed forms and simulated games."""

import math

import numpy as np
import pytest

from llmalign.errors import UserError
from llmalign.evaluation.bradley_terry import ELO, bradley_terry
from tests.evaluation.annotated import row


def test_two_models_have_the_log_odds_of_their_games() -> None:
    rows = [row(2.0 if i % 4 else 1.0, str(i)) for i in range(4000)]  # the model wins 3 of 4
    found = bradley_terry(rows, resamples=50)
    assert list(found) == ["model", "base"]
    assert found["model"].elo - found["base"].elo == pytest.approx(ELO * math.log(3), rel=1e-3)
    assert found["model"].n == 4000 and found["model"].low < found["model"].elo < found["model"].high


def test_strengths_of_simulated_games_come_back() -> None:
    rng = np.random.default_rng(0)
    true = {"a": -0.8, "b": 0.1, "c": 0.7}
    rows = []
    for i in range(3000):
        one, two = rng.choice(list(true), 2, replace=False)
        p = 1 / (1 + math.exp(true[one] - true[two]))
        rows.append(row(2.0 if rng.random() < p else 1.0, str(i), generator_1=str(one), generator_2=str(two)))
    found = bradley_terry(rows, resamples=100)
    assert list(found) == ["c", "b", "a"]
    for name, strength in true.items():
        assert found[name].low < ELO * strength < found[name].high


def test_one_who_always_wins_is_finite() -> None:
    found = bradley_terry([row(2, str(i)) for i in range(20)], resamples=20)
    assert math.isfinite(found["model"].elo) and found["model"].elo > 400


def test_what_cannot_be_ranked_is_said() -> None:
    with pytest.raises(UserError, match="names no generator_1"):
        bradley_terry([{"instruction": "i", "output_1": "", "output_2": "", "preference": 2}])
    with pytest.raises(UserError, match="no chain of comparisons joins"):
        bradley_terry([row(2), row(2, generator_1="x", generator_2="y")])
    with pytest.raises(UserError, match="at least two models"):
        bradley_terry([row(None)])
