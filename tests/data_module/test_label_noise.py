"""Labels flipped on purpose, and the rate of flips found again."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from llmalign.data.formats import load
from llmalign.data.label_noise import estimate_flip_rate, flip
from llmalign.errors import UserError


def pairs(count: int) -> Dataset:
    return Dataset.from_list(
        [
            {"row_id": i, "chosen": f"w{i}", "rejected": f"l{i}", "margin": 0.5 + i, "ref_chosen_logps": -1.0 * i,
             "ref_rejected_logps": -2.0}
            for i in range(count)
        ]
    )  # fmt: skip


def test_a_flipped_row_has_everything_exchanged():
    clean = pairs(200)
    noisy = flip(clean, 0.3, seed=1, margins=["margin"])
    for before, after in zip(clean, noisy, strict=True):
        swap = after["flipped"]
        assert (after["chosen"], after["rejected"]) == (before["chosen"], before["rejected"])[:: -1 if swap else 1]
        logps = (before["ref_chosen_logps"], before["ref_rejected_logps"])[:: -1 if swap else 1]
        assert (after["ref_chosen_logps"], after["ref_rejected_logps"]) == logps
        assert after["margin"] == (-before["margin"] if swap else before["margin"])
    assert noisy.features["flipped"].dtype == "bool"


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_the_share_of_flips_is_the_rate(rate):
    flipped = np.array(flip(pairs(4000), rate, seed=3)["flipped"][:])
    assert abs(flipped.mean() - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000)


def test_flips_depend_on_seed_and_row_alone():
    clean = pairs(300)

    def flipped(rows, rate=0.4, seed=7) -> set[int]:
        return {row["row_id"] for row in flip(rows, rate, seed) if row["flipped"]}

    assert flipped(clean) == flipped(clean) == flipped(clean.shuffle(seed=1))
    assert flipped(clean.select(range(100, 200))) == {i for i in flipped(clean) if 100 <= i < 200}
    assert flipped(clean, rate=0.2) < flipped(clean, rate=0.4)
    assert flipped(clean, seed=8) != flipped(clean)


def test_a_stream_is_flipped_as_its_rows_come(write):
    rows = [{"prompt": f"{i} ", "chosen": f"w{i}", "rejected": f"l{i}"} for i in range(50)]
    stream = load(write("a.jsonl", rows), kind="pairs", streaming=True)
    noisy = list(flip(stream, 0.5, seed=0))
    assert noisy == list(flip(stream, 0.5, seed=0))
    assert 10 < sum(row["flipped"] for row in noisy) < 40
    assert all((row["chosen"][0] == "l") == row["flipped"] for row in noisy)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_the_range(rate):
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        flip(pairs(2), rate, seed=0)


def test_rows_that_cannot_be_flipped():
    with pytest.raises(UserError, match="by row_id"):
        flip(pairs(2).remove_columns("row_id"), 0.1, seed=0)
    with pytest.raises(UserError, match="flipping twice"):
        flip(flip(pairs(2), 0.1, seed=0), 0.1, seed=0)
    with pytest.raises(UserError, match="tokenized already"):
        flip(pairs(2).add_column("chosen_ids", [[1], [2]]), 0.1, seed=0)


def oracle() -> dict:
    file = Path(__file__).parents[1] / "data" / "language-losses.json"
    return json.loads(file.read_text(encoding="utf-8"))["rdpo"]["mixture_nll_flip_estimate"]


def nll(margins, rate: float) -> float:
    """The mixture's mean negative log-likelihood, written out."""
    total = 0.0
    for margin in margins:
        agree = 1 / (1 + math.exp(-margin))
        total -= math.log((1 - rate) * agree + rate * (1 - agree))
    return total / len(margins)


def test_the_recorded_estimate():
    recorded = oracle()
    found = estimate_flip_rate(recorded["mm"])
    assert abs(found.rate - recorded["eps_hat"]) <= 0.0005  # its grid has steps of .001
    assert recorded["nll_at_eps_hat"] - 1e-6 <= found.nll <= recorded["nll_at_eps_hat"]
    assert found.n == 8


def test_the_estimate_is_the_minimum_and_the_interval_the_likelihood_s():
    rng = random.Random(0)
    margins = [rng.gauss(2.0, 1.5) * (1 if rng.random() > 0.2 else -1) for _ in range(400)]
    found = estimate_flip_rate(margins)
    assert found.nll == pytest.approx(nll(margins, found.rate), abs=1e-12)
    assert all(nll(margins, step / 500) >= found.nll for step in range(250))
    for end in (found.low, found.high):
        assert 2 * len(margins) * (nll(margins, end) - found.nll) == pytest.approx(3.841458820694124, abs=1e-6)
    assert 0 < found.low < found.rate < found.high < 0.5
    assert str(found).startswith(f"flip rate {found.rate:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_interval_holds_the_true_rate_of_a_calibrated_scorer(rate):
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gap = rng.normal(0, 3, 500)
        label = np.where(rng.random(500) < 1 / (1 + np.exp(-gap)), 1, -1)
        label = np.where(rng.random(500) < rate, -label, label)
        found = estimate_flip_rate(gap * label)
        held += found.low <= rate <= found.high
    assert held >= 34  # 38 expected of 40; 33 or fewer has a probability below .02


def test_agreement_alone_gives_rate_zero():
    found = estimate_flip_rate([5.0, 4.0, 6.0, 3.0])
    assert found.rate == 0.0 and found.low == 0.0 and found.high > 0.1


def test_extreme_margins_stay_finite():
    found = estimate_flip_rate([800.0] * 9 + [-800.0])
    assert found.rate == pytest.approx(0.1, abs=1e-9) and math.isfinite(found.nll)
    assert 0 < found.low < 0.1 < found.high < 0.5


def test_a_loose_interval_is_said(caplog):
    assert estimate_flip_rate([1.0, -0.5, 1.0]).high == 0.5
    assert "the interval reaches .5" in caplog.text


@pytest.mark.parametrize(
    "margins, words",
    [
        ([], "got none"),
        ([1.0, float("nan")], "margin of pair 1 is nan"),
        ([float("inf")], "margin of pair 0 is inf"),
        ([-1.0, -2.0, 0.5], "the best fit is .5"),
        ([1.0, -1.0], "the best fit is .5"),
    ],
)
def test_margins_that_give_no_estimate(margins, words):
    with pytest.raises(UserError, match=words):
        estimate_flip_rate(margins)
