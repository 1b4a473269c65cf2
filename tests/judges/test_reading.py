"""From answers to probabilities: by hand, and against recorded answers of a real judge."""

import gzip
import json
import math
from pathlib import Path

import pytest

from llmalign.judges import is_switched, letter_preference, logprob_preference

LETTERS = ("A", "B")


@pytest.mark.parametrize(
    "logprobs, expected",
    [
        ({"A": math.log(0.6), "B": math.log(0.2)}, 0.75),
        ({" A": math.log(0.3), "A\n": math.log(0.3), "B": math.log(0.2), "a": -0.1}, 0.75),
        ({"A": -3.0, "The": -0.1}, 1.0),
        ({"B": -30.0, "The": -0.1}, 0.0),
        ({"A": -2000.0, "B": -2000.0}, 0.5),
        ({"The": -0.1, "AB": -3.0, "": -4.0}, None),
        ({}, None),
    ],
)
def test_log_probs(logprobs: dict[str, float], expected: float | None) -> None:
    found = logprob_preference(logprobs, LETTERS)
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A", 1.0), (" B\n", 0.0), ("**A**", 1.0), ("Answer: B.", 0.0), ("(B)", 0.0), ("B, since B is right", 0.0),
        ("", None), ("neither", None), ("A or B", None), ("A better answer is B", None), ("Both", None), ("AB", None),
        ("a", None), ("A_1", None),
    ],
)  # fmt: skip
def test_letters_in_text(text: str, expected: float | None) -> None:
    assert letter_preference(text, LETTERS) == expected


def test_letters_are_no_patterns() -> None:
    assert letter_preference("[1]", ("[1]", "[2]")) == 1.0
    assert letter_preference("2+", ("1+", "2+")) == 0.0
    assert letter_preference("x", (".", "x")) == 0.0


def test_the_order_is_alpaca_evals() -> None:
    """Worked out once with its formula; both seeds and both orders occur."""
    assert [is_switched(text) for text in ("a", "b", "c", "d")] == [True, True, False, False]
    assert [is_switched("a", seed) for seed in range(4)] == [True, False, True, False]


def test_recorded_answers_of_a_real_judge(shared: Path) -> None:
    """805 rows, 803 of them asked: the preference that AlpacaEval computed from each, to its ten digits."""
    path = shared / "datasets" / "alpaca_eval" / "vicuna-7b.raw_judge.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    asked = [row for row in rows if not row["same_output"]]
    assert (len(rows), len(asked)) == (805, 803)
    for row in asked:
        first = logprob_preference(dict(row["top_logprobs"]), ("m", "M"))
        assert first is not None
        preference = 2 - first  # 1: the first answer shown wins
        preference = 3 - preference if is_switched(row["instruction"]) else preference
        assert preference == pytest.approx(row["preference"], abs=1e-7)
