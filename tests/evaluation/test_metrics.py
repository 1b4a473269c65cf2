"""The measures as `evaluate` metrics, loaded without a network."""

import pytest

from llmalign.evaluation.alpaca import summarize
from llmalign.evaluation.metrics import DistinctN, LengthControlledWinRate, PreferenceAccuracy, WinRate
from tests.evaluation.annotated import row


def test_win_rate() -> None:
    found = WinRate().compute(predictions=[1.0, 0.0, 0.5, 1.0], references=["a", "b", "c", "d"])
    assert found["win_rate"] == 0.625 and (found["wins"], found["losses"], found["ties"], found["n"]) == (2, 1, 1, 4)


def test_length_controlled_win_rate_is_that_of_the_annotations() -> None:
    rows = [row(1 + (i % 5) / 4, str(i), (10 + i, 30 - i)) for i in range(20)]
    columns = {name: [r[name] for r in rows] for name in ("instruction", "output_1", "output_2")}
    metric = LengthControlledWinRate(constants=False)
    found = metric.compute(predictions=[r["preference"] for r in rows], **columns)
    wanted = summarize(rows).as_dict()
    assert found["length_controlled_winrate"] == wanted["length_controlled_winrate"] is not None
    assert found["win_rate"] == wanted["win_rate"]


def test_preference_accuracy_counts_a_tie_as_one_half() -> None:
    found = PreferenceAccuracy().compute(predictions=[1.0, 2.0, 3.0, 0.0], references=[0.0, 2.0, 4.0, -1.0])
    assert found["accuracy"] == 0.625 and found["low"] <= 0.625 <= found["high"] and found["n"] == 4


def test_distinct_n() -> None:
    assert DistinctN().compute(predictions=["a b a b", "c d"], n=2) == {"distinct_2": 3 / 4}


def test_batches_add_up() -> None:
    metric = PreferenceAccuracy()
    metric.add_batch(predictions=[1.0], references=[0.0])
    metric.add_batch(predictions=[0.0], references=[1.0])
    assert metric.compute()["accuracy"] == pytest.approx(0.5)
