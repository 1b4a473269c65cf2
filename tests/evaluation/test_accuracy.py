"""Preference accuracy against log-probs that transformers' own logits give."""

import math

import pytest
import torch

from llmalign.data.formats import DataSource, load
from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.evaluation.accuracy import pair_accuracy, pair_margins
from llmalign.inference import load_for_inference
from llmalign.trainers.preparation import prepare_pairs

ROWS = 12


@pytest.fixture(scope="module")
def tiny():
    return load_for_inference(str(ensure_tiny()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rows(tiny):
    pairs = load([DataSource(path="sample:pairs", max_rows=ROWS)], kind="pairs")
    return list(prepare_pairs(pairs, tiny[1], max_length=None))


def by_hand(model, row) -> float:
    def logp(completion) -> float:
        ids = torch.tensor([row["prompt_ids"] + completion])
        logits = type(model).forward(model, input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"])
        return sum(float(logits[start + i - 1, token]) for i, token in enumerate(completion))

    with torch.no_grad():
        return logp(row["chosen_ids"]) - logp(row["rejected_ids"])


def test_margins_are_those_of_the_logits(tiny, rows) -> None:
    model, tokenizer = load_for_inference("embedded:tiny", dtype="float32", device="cpu")
    expected = [by_hand(tiny[0], row) for row in rows]
    assert pair_margins(model, rows, pad_token_id=tokenizer.pad_token_id) == pytest.approx(expected, abs=2e-4)


def test_a_reference_is_taken_off_and_a_tie_is_one_half() -> None:
    rows = [{"prompt_ids": [i]} for i in range(4)]
    assert pair_accuracy(rows, [1.0, -1.0, 3.0, 0.0]).mean == (1 + 0 + 1 + 0.5) / 4
    assert pair_accuracy(rows, [1.0, -1.0, 3.0, 0.0], [2.0, -2.0, 3.0, 0.5]).mean == (0 + 1 + 0.5 + 0) / 4


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    margins = [1.0, 1.0, -1.0, -1.0] * 10
    apart = pair_accuracy([{"prompt_ids": [i]} for i in range(40)], margins)
    together = pair_accuracy([{"prompt_ids": [i // 2]} for i in range(40)], margins)
    assert together.mean == apart.mean == 0.5
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(2), rel=0.1)


def test_no_pair_is_refused(tiny, rows) -> None:
    with pytest.raises(ValueError, match="at least one"):
        pair_accuracy([], [])
    with pytest.raises(UserError, match="prompt alone"):
        pair_margins(tiny[0], rows, pad_token_id=0, max_length=2)


def test_a_base_column_changes_nothing(tiny) -> None:
    """RPO's rows have a third completion, which is no side of the pair."""
    pairs = load([DataSource(path="sample:pairs", max_rows=ROWS)], kind="pairs")
    with_base = pairs.add_column("base", pairs["rejected"])
    plain, based = (list(prepare_pairs(rows, tiny[1], max_length=None)) for rows in (pairs, with_base))
    assert "base_ids" in based[0]
    margins = [pair_margins(tiny[0], rows, pad_token_id=tiny[1].pad_token_id) for rows in (plain, based)]
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)
