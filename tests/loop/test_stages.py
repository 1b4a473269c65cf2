"""Stages: done once, found again, done again where what went in or came out has changed, never half there."""

import json
import logging
import os
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.loop import stages
from llmalign.loop.stages import (
    Made,
    Manifest,
    digest_of,
    file_digest,
    finished,
    read_manifest,
    read_rows,
    run_stage,
    wait_for,
    write_bytes,
    write_json,
    write_manifest,
    write_rows,
)


class Stopped(BaseException):
    """What ends a process, which no handler of errors catches."""


class Work:
    """Writes a.txt and b.txt, and counts how often and what it found."""

    def __init__(self, folder: Path, text: str = "result") -> None:
        self.folder, self.text = folder, text
        self.found: list[list[str]] = []

    def make(self, folder: Path) -> Made:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        for name in ("a.txt", "b.txt"):
            write_bytes(folder / name, f"{self.text} {name}".encode())
        return Made(["a.txt", "b.txt"], {"rows": 2, "dropped": {"tie": 1}}, {"mean": 0.5}, {"tokens": 7})

    def run(self, **inputs: str) -> Manifest:
        return run_stage(self.folder, inputs=inputs or {"model": "m", "rows": "r"}, seed=3, make=self.make)

    @property
    def times(self) -> int:
        return len(self.found)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "round-1" / "sample")


def test_a_stage_is_done_once_and_found_again(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    first = work.run()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="llmalign"):
        assert work.run() == first == read_manifest(work.folder) and work.times == 1
    assert [record.getMessage() for record in caplog.records] == ["round-1/sample: done already."]
    assert sorted(path.name for path in work.folder.iterdir()) == ["a.txt", "b.txt", "manifest.json", "plan.json"]


def test_the_manifest_says_what_went_in_and_what_came_out(work: Work) -> None:
    found = work.run()
    assert (found.stage, found.seed, found.inputs) == ("round-1/sample", 3, {"model": "m", "rows": "r"})
    assert found.outputs["a.txt"] == {"sha256": file_digest(work.folder / "a.txt"), "bytes": 12}
    assert found.hashes() == {name: file_digest(work.folder / name) for name in ("a.txt", "b.txt")}
    assert (found.counts, found.measured, found.pruned) == ({"rows": 2, "dropped": {"tie": 1}}, {"mean": 0.5}, [])
    assert found.cost["tokens"] == 7 and found.cost["seconds"] >= 0
    assert {"llmalign", "python", "torch", "transformers", "trl", "peft"} == set(found.versions)


def test_a_digest_is_of_what_is_said_and_not_of_how(work: Work) -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    assert work.run().digest() == Work(work.folder.parent / "other").run().digest()
    assert work.run().digest() != Work(work.folder.parent / "third", "another").run().digest()


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"model": "n", "rows": "r"}, "was made of other model: it is done again."),
        ({"model": "n", "rows": "s"}, "was made of other model and rows: it is done again."),
        ({"model": "m"}, "was made of other rows: it is done again."),
        ({"model": "m", "rows": "r", "oracle": "o"}, "was made of other oracle: it is done again."),
    ],
)
def test_other_inputs_are_said_and_everything_is_done_again(
    inputs: dict[str, str], said: str, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    work.run()
    (work.folder / "shards").mkdir()
    assert work.run(**inputs).inputs == inputs
    assert f"{work.folder} {said}" in caplog.text and work.found[1] == ["plan.json"]
    assert work.run(**inputs) and work.times == 2


@pytest.mark.parametrize("damage", ["missing", "longer", "same length"])
def test_a_result_that_is_not_whole_is_said_and_everything_is_done_again(
    damage: str, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    first = work.run()
    path = work.folder / "b.txt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("result", "rezult" if damage == "same length" else "a result"))
    again = work.run()
    reason = "is missing" if damage == "missing" else "has changed since it was written"
    assert f"{path} {reason}: the stage is done again." in caplog.text
    assert work.found[1] == ["plan.json"] and again.hashes() == first.hashes()


def test_what_was_pruned_need_not_be_there(work: Work) -> None:
    manifest = work.run()
    manifest.pruned = ["b.txt"]
    write_manifest(work.folder, manifest)
    (work.folder / "b.txt").unlink()
    assert work.run() == manifest and work.times == 1
    (work.folder / "a.txt").unlink()
    work.run()
    assert work.times == 2


def stop_in(monkeypatch: pytest.MonkeyPatch, name: str, *, before: bool, times: int = 1) -> None:
    """The `times`-th call of a function of `os` from now on ends the process, before or after its work."""
    original, calls = getattr(os, name), []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == times and before:
            raise Stopped
        result = original(*args, **kwargs)
        if len(calls) == times:
            raise Stopped
        return result

    monkeypatch.setattr(os, name, stopping)


def test_partial_work_of_the_same_inputs_is_left_to_go_on_from(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, "replace", before=False, times=2)  # the plan, then a.txt
        with pytest.raises(Stopped):
            work.run()
    assert not (work.folder / "manifest.json").exists()
    work.run()
    assert work.found == [["plan.json"], ["a.txt", "plan.json"]]


def test_partial_work_of_other_inputs_is_removed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, "replace", before=False, times=2)
        with pytest.raises(Stopped):
            work.run()
    work.run(model="n")
    assert work.found[1] == ["plan.json"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_stopped_at_any_write_a_stage_looks_unfinished_until_it_is(
    times: int, before: bool, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan, two results, manifest: what was not renamed yet lies aside and is in nobody's way."""
    with monkeypatch.context() as patch:
        stop_in(patch, "replace", before=before, times=times)
        with pytest.raises(Stopped):
            work.run()
    inputs = {"model": "m", "rows": "r"}
    assert (finished(work.folder, inputs) is not None) == (times == 4 and not before)
    found = work.run()
    assert found.hashes() == Work(work.folder.parent / "other").run().hashes()
    assert sorted(path.name for path in work.folder.iterdir()) == ["a.txt", "b.txt", "manifest.json", "plan.json"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("same_inputs", [True, False])
def test_stopped_while_it_removes_a_spoilt_result_a_stage_never_takes_it_for_its_own(
    same_inputs: bool, times: int, before: bool, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest, plan and both results go one after the other; what is left is neither finished nor begun."""
    work.run()
    (work.folder / "b.txt").write_text("spoilt")
    inputs = {"model": "m", "rows": "r"} if same_inputs else {"model": "n"}
    with monkeypatch.context() as patch:
        stop_in(patch, "unlink", before=before, times=times)
        with pytest.raises(Stopped):
            work.run(**inputs)
    work.run(**inputs)
    assert work.found[-1] == ["plan.json"], "a spoilt result was left to go on from"


def test_an_error_in_the_work_leaves_the_stage_unfinished(work: Work) -> None:
    def fails(folder: Path) -> Made:
        write_bytes(folder / "a.txt", b"half")
        raise UserError("the judge is away")

    inputs = {"model": "m", "rows": "r"}
    with pytest.raises(UserError, match="the judge is away"):
        run_stage(work.folder, inputs=inputs, seed=0, make=fails)
    assert finished(work.folder, inputs) is None and (work.folder / "a.txt").read_bytes() == b"half"


@pytest.mark.parametrize("content", ["{", "[]", '{"stage": "sample"}', '{"unknown": 1}'])
def test_a_manifest_of_another_kind_is_refused_with_its_folder(content: str, work: Work) -> None:
    work.run()
    (work.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"is no manifest of this version .*; delete {work.folder} to have its stage"):
        work.run()


def test_a_file_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"one")
    for before, expected in ((True, b"one"), (False, b"three")):
        with monkeypatch.context() as patch:
            stop_in(patch, "replace", before=before)
            with pytest.raises(Stopped):
                write_bytes(path, b"three")
        assert path.read_bytes() == expected
    write_bytes(path, b"four")
    assert path.read_bytes() == b"four" and [one.name for one in path.parent.iterdir()] == ["file"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, o=original, n=name: (order.append(n), o(*a))[1])
    write_bytes(tmp_path / "file", b"one")
    assert order == ["fsync", "replace", "fsync"]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Grüße\u2028\x85 and\r\nmore\n", "ids": [1, 2], "p": None},
        {"prompt": [{"role": "user", "content": "\x00"}], "p": 0.1},
    ]
    write_rows(tmp_path / "rows.jsonl", iter(rows))
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    write_rows(tmp_path / "none.jsonl", [])
    assert list(read_rows(tmp_path / "none.jsonl")) == []
    write_json(tmp_path / "one.json", rows)
    assert json.loads((tmp_path / "one.json").read_text()) == rows


def test_the_other_processes_do_their_share_and_wait_for_the_manifest(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several: it begins nothing, writes no manifest, and returns the one that the main process wrote."""
    inputs, polls, barriers = {"model": "m", "rows": "r"}, [], []

    def other_share(folder: Path) -> Made:
        assert not folder.exists(), "this process is not the one that begins"
        return Made([])

    def poll(seconds: float) -> None:
        polls.append(seconds)
        work.run()  # the main process comes to its end

    monkeypatch.setattr(stages.time, "sleep", poll)
    found = run_stage(
        work.folder, inputs=inputs, seed=3, make=other_share, main=False, barrier=lambda: barriers.append(1)
    )
    assert found == read_manifest(work.folder) and len(polls) == 1 and len(barriers) == 2
    again = run_stage(work.folder, inputs=inputs, seed=3, make=other_share, main=False)
    assert again == found
    wait_for(work.folder / "a.txt")  # is there, so there is nothing to wait for
    assert len(polls) == 1
