"""Annotations: which rows meet, what a judge's probability becomes, and what an interrupted call leaves."""

import json
import math
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.evaluation.annotate import annotate, match
from llmalign.evaluation.annotations import read_annotations
from llmalign.judges import is_switched, logprob_preference
from tests.evaluation.annotated import FOLDER, lines, needs_files


class Longer:
    """Prefers the longer answer with P = .8, cannot judge a question mark, and counts what it is asked."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.dies_after = dies_after

    def preferences(self, prompts, first, second):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise UserError("the judge is gone")
        self.asked += list(zip(prompts, first, second, strict=True))
        return [math.nan if "?" in b else 0.8 if len(a) > len(b) else 0.2 for a, b in zip(first, second, strict=True)]


def rows(answers: dict[str, str], generator: str, **more) -> list[dict]:
    return [{"instruction": i, "output": text, "generator": generator, **more} for i, text in answers.items()]


REFERENCE = rows({"a": "long answer", "b": "x", "c": "same", "d": "long answer"}, "base", dataset="ref")
OUTPUTS = rows({"a": "short", "b": "longer", "c": "same", "d": "?"}, "mine")


def test_preferences_are_alpaca_evals(tmp_path: Path) -> None:
    judge, out = Longer(), tmp_path / "annotations.json"
    counts = annotate(OUTPUTS, REFERENCE, judge, annotator="longer", out=out)
    found = read_annotations(out)
    assert [row["preference"] for row in found] == [pytest.approx(1.2), pytest.approx(1.8), 1.5, None]
    assert found[0] == {
        "dataset": "ref", "instruction": "a", "output_1": "long answer", "generator_1": "base", "output_2": "short",
        "generator_2": "mine", "annotator": "longer", "preference": pytest.approx(1.2),
    }  # fmt: skip
    assert (counts.judged, counts.identical, counts.failed, counts.kept, counts.unmatched) == (2, 1, 1, 0, 0)
    assert ("c", "same", "same") not in judge.asked


def test_a_second_call_asks_for_what_failed_alone(tmp_path: Path) -> None:
    out = tmp_path / "annotations.json"
    annotate(OUTPUTS, REFERENCE, Longer(), annotator="longer", out=out)
    judge = Longer()
    counts = annotate(OUTPUTS, REFERENCE, judge, annotator="longer", out=out)
    assert [question[0] for question in judge.asked] == ["d"] and counts.kept == 2 and counts.failed == 1
    other = Longer()
    annotate(OUTPUTS, REFERENCE, other, annotator="another", out=out)
    assert len(other.asked) == 3


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    reference = rows({str(i): "x" * (i % 5 + 1) for i in range(20)}, "base")
    outputs = rows({str(i): "y" * (i % 3 + 2) for i in range(20)}, "mine")
    whole, out = tmp_path / "whole.json", tmp_path / "stopped.json"
    annotate(outputs, reference, Longer(), annotator="j", out=whole, at_a_time=4)
    with pytest.raises(UserError, match="gone"):
        annotate(outputs, reference, Longer(dies_after=8), annotator="j", out=out, at_a_time=4)
    assert sum(row["preference"] is None for row in read_annotations(out)) == 12
    judge = Longer()
    annotate(outputs, reference, judge, annotator="j", out=out, at_a_time=4)
    assert len(judge.asked) == 12 and out.read_bytes() == whole.read_bytes()


def test_what_does_not_match_is_said(caplog: pytest.LogCaptureFixture) -> None:
    matched, unmatched = match(rows({"a": "1", "z": "2"}, "m"), rows({"a": "1", "b": "2", "c": "3"}, "r"))
    assert [row["instruction"] for row in matched] == ["a"] and unmatched == 1
    assert "1 outputs have no reference" in caplog.text and "2 references have no output" in caplog.text
    with pytest.raises(UserError, match="share no instruction"):
        match(rows({"a": "1"}, "m"), rows({"b": "1"}, "r"))


def test_repeated_instructions_meet_in_order() -> None:
    twice = [*rows({"a": "1"}, "m"), *rows({"a": "2"}, "m"), *rows({"a": "3"}, "m")]
    matched, _ = match(twice, [*rows({"a": "r1"}, "r"), *rows({"a": "r2"}, "r")])
    assert [(row["output_1"], row["output_2"]) for row in matched] == [("r1", "1"), ("r2", "2"), ("r2", "3")]


def test_a_file_of_another_kind_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"note": "mine"}]))
    with pytest.raises(UserError, match="has no 'instruction'"):
        annotate(OUTPUTS, REFERENCE, Longer(), annotator="j", out=tmp_path / "a.json")
    assert "mine" in (tmp_path / "a.json").read_text()


def test_a_missing_output_is_a_failed_row_and_not_asked(tmp_path: Path) -> None:
    """Of either side; an empty answer that was given is judged."""
    reference = rows({"a": "x", "b": "x", "c": "x"}, "base")
    reference[1] |= {"output": "", "error": "HTTP 500"}
    outputs = rows({"a": "", "b": "", "c": ""}, "mine")
    outputs[0]["error"] = "HTTP 400: too long"
    judge = Longer()
    counts = annotate(outputs, reference, judge, annotator="j", out=tmp_path / "a.json")
    found = read_annotations(tmp_path / "a.json")
    assert [row["preference"] for row in found] == [None, None, pytest.approx(1.2)]
    assert [row.get("reason") for row in found] == [
        "mine has no output: HTTP 400: too long", "base has no output: HTTP 500", None
    ]  # fmt: skip
    assert (counts.judged, counts.identical, counts.failed) == (1, 0, 2) and len(judge.asked) == 1
    assert not any("error" in row for row in found)


def test_the_judges_reasons_stand_beside_rows_without_a_preference(tmp_path: Path) -> None:
    judge, out = Longer(), tmp_path / "a.json"
    more = {"reasons": lambda: [None, None, "cannot tell"]}
    annotate(OUTPUTS, REFERENCE, judge, annotator="j", out=out, **more)
    assert [row.get("reason") for row in read_annotations(out)] == [None, None, None, "cannot tell"]
    known = [dict(row, output="known") if row["output"] == "?" else row for row in OUTPUTS]
    annotate(known, REFERENCE, judge, annotator="j", out=out)
    assert not any("reason" in row for row in read_annotations(out))


def test_other_judgements_are_lost_only_where_that_is_meant(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    annotate(OUTPUTS, REFERENCE, Longer(), annotator="j", out=out)
    before = out.read_bytes()
    for outputs, annotator in ((OUTPUTS, "another"), (OUTPUTS[:1], "j")):
        judge = Longer()
        with pytest.raises(UserError, match="judgements of other outputs or by another judge.*--overwrite"):
            annotate(outputs, REFERENCE, judge, annotator=annotator, out=out, replace=False)
        assert out.read_bytes() == before and not judge.asked
    more = [*OUTPUTS, *rows({"e": "y"}, "mine")]
    counts = annotate(more, [*REFERENCE, *rows({"e": "x"}, "base")], Longer(), annotator="j", out=out, replace=False)
    assert (counts.kept, counts.judged) == (2, 1)


def test_repeated_instructions_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        match([*rows({"a": "1"}, "m"), *rows({"a": "2"}, "m")], rows({"a": "r1"}, "r"))
    assert "1 outputs and 0 references repeat an instruction" in caplog.text


@needs_files
def test_published_judge_answers_are_read_alike() -> None:
    """805 answers of a real judge, whose letters are m (the baseline) and M (the model)."""
    answers = lines(FOLDER / "vicuna-7b.raw_judge.jsonl.gz")
    assert len(answers) == 805
    for row in answers:
        if row["same_output"]:
            assert row["preference"] == 1.5
            continue
        shown_first = logprob_preference(dict(row["top_logprobs"]), ("m", "M"))
        assert shown_first is not None
        first = 1 - shown_first if is_switched(row["instruction"]) else shown_first
        assert 2 - first == pytest.approx(row["preference"], abs=1e-6)
