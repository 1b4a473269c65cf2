"""Rounds that are there already: found again, gone on from, refused, made again."""

import json
import logging
import shutil
from typing import Any

import pytest

from llmalign.loop.stages import describe
from tests.loop.conftest import ONE_BATCH
from tests.loop.running import Bench, everything, prompts, results
from tests.loop.scoring import close, columns, loaded, scored

STAGES = ("sample", "judge", "pair", "cache", "train", "evaluate")


def test_a_finished_run_is_found_and_no_byte_changes(
    again: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(again.output)
    monkeypatch.setenv("ORACLE_LOG", str(again.folder / "asked.log"))
    with caplog.at_level(logging.INFO, logger="llmalign"):
        assert again.iterate() == 0
    done = [record.getMessage() for record in caplog.records if record.getMessage().endswith("done already.")]
    assert len(done) == 1 + 2 * len(STAGES) and not any("..." in record.getMessage() for record in caplog.records)
    assert not (again.folder / "asked.log").exists()
    assert everything(again.output) == before


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"eta": 0.2}, "eta 0.1 -> 0.2"),
        ({"temperature": 0.9}, "temperature 1.0 -> 0.9"),
        ({"samples_per_prompt": 6}, "samples_per_prompt 4 -> 6"),
        ({"learning_rate": 0.02}, "learning_rate 0.01 -> 0.02"),
        ({"select": "independent"}, "select 'best_worst' -> 'independent'"),
        ({"seed": 7}, "seed 42 -> 7"),
        ({"preference_function": "oracle.py:sometimes"}, "preference_function 'oracle.py:preferred' ->"),
        ({"eval_prompts": 2}, "eval_prompts 3 -> 2"),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_with_key_and_values(
    keys: dict[str, Any], named: str, again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(again.output)
    again.write(**{**ONE_BATCH, **keys})
    assert again.iterate() == 2
    said = capsys.readouterr().err
    assert "The run in out was started with another recipe (" in said and named in said
    assert "Traceback" not in said and everything(again.output) == before


@pytest.mark.parametrize("changed", ["oracle", "prompts", "model"])
def test_what_the_recipe_names_may_not_change_either(
    changed: str, again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another version of the function, other prompts in the file, other weights in the folder."""
    before = everything(again.output)
    if changed == "oracle":
        path = again.folder / "oracle.py"
        path.write_text(path.read_text().replace("0.9 if gap", "0.8 if gap"))
    elif changed == "prompts":
        again.write_prompts(prompts(13))
    else:
        path = again.model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\x40")  # the last number, as 2.0
    assert again.iterate() == 2
    said = capsys.readouterr().err
    assert ("was judged by another oracle" if changed == "oracle" else "was started with another recipe") in said
    assert everything(again.output) == before


def test_rounds_can_be_added_and_old_weights_pruned(finished: Bench, bench: Bench) -> None:
    """One round, then a second one: the bytes of two rounds at once, but for the weights that the recipe gives up."""
    bench.write(**ONE_BATCH, rounds=1, keep_rounds=1)
    bench.run()
    assert (bench.output / "round-1" / "train" / "model.safetensors").is_file(), "the last model was given up"
    bench.write(**ONE_BATCH, rounds=2, keep_rounds=1)
    bench.run()
    whole, grown = results(finished.output), results(bench.output)
    del whole["round-1/train/model.safetensors"]
    assert grown == whole
    assert bench.manifest(1, "train")["pruned"] == ["model.safetensors"]
    assert bench.manifest(2, "train")["pruned"] == []
    before = everything(bench.output)
    bench.run()  # finished: what was given up is not missed
    assert everything(bench.output) == before


@pytest.mark.slow
def test_a_pruned_run_goes_on_with_more_rounds(again: Bench) -> None:
    """The third round starts from the second one's weights, its reference is the start: neither is ever given up."""
    again.write_prompts(prompts(15))
    again.output = again.folder / "fresh"
    again.write(**ONE_BATCH, rounds=2, keep_rounds=1)
    again.run()
    again.write(**ONE_BATCH, rounds=3, keep_rounds=2)
    again.run()
    models = [path.parent.parent.name for path in sorted(again.output.glob("round-*/train/model.safetensors"))]
    assert models == ["round-2", "round-3"]
    rows = again.rows(3, "cache", "rows.jsonl")
    close(columns(rows, "ref"), scored(loaded(again.model), rows))
    close(columns(rows, "last"), scored(loaded(again.output / "round-2" / "train"), rows))


def test_prompts_shared_out_among_all_rounds_hold_their_number(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """With prompts_per_round left open, more rounds would give the finished ones other prompts."""
    bench.write(prompts_per_round=None, preference_function="oracle.py:short")
    assert bench.iterate() == 2  # begun, and stopped by its oracle
    before = everything(bench.output)
    bench.write(prompts_per_round=None, preference_function="oracle.py:short", rounds=3)
    assert bench.iterate() == 2
    assert "rounds 2 -> 3" in capsys.readouterr().err and everything(bench.output) == before


@pytest.mark.parametrize(
    ("place", "redone"),
    [
        ("round-1/judge/judged.jsonl", ["round-1/judge"]),
        ("round-2/sample/samples.jsonl", ["round-2/sample"]),
        ("round-0/evaluate/samples.jsonl", ["round-0/evaluate"]),
    ],
)
def test_a_result_edited_by_hand_is_made_again_and_said(
    place: str, redone: list[str], again: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes out is the same as before, so what was made of it still stands."""
    before = results(again.output)
    path = again.output / place
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    with caplog.at_level(logging.INFO, logger="llmalign"):
        assert again.iterate() == 0
    assert f"out/{place} has changed since it was written: the stage is done again." in caplog.text
    said = [record.getMessage() for record in caplog.records]
    assert [text.removesuffix(" ...") for text in said if text.endswith(" ...")] == redone
    assert results(again.output) == before


def test_a_model_is_never_thrown_away(again: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the first round's pairs taken out, its manifest put right: what was trained is of other rows, and stays.

    Neither is a model that was edited trained again, unless its folder is deleted.
    """
    folder, weights = again.output / "round-1" / "pair", again.output / "round-1" / "train" / "model.safetensors"
    rows = (folder / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    whole, trained = b"".join(rows), weights.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    for content in (b"".join(rows[:1]), whole):
        (folder / "pairs.jsonl").write_bytes(content)
        manifest["outputs"]["pairs.jsonl"] = describe(folder / "pairs.jsonl")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if content is not whole:
            assert again.iterate() == 2
            assert "out/round-1/train holds a trained model that is not what its manifest" in capsys.readouterr().err
            assert weights.read_bytes() == trained
    before = results(again.output)
    assert again.iterate() == 0 and results(again.output).keys() >= before.keys()
    weights.write_bytes(trained[:-2] + b"  ")
    assert again.iterate() == 2
    assert "or delete the folder to have it trained again" in capsys.readouterr().err
    shutil.rmtree(weights.parent)
    assert again.iterate() == 0 and weights.read_bytes() == trained


def test_weights_that_were_pruned_and_are_needed_again_are_asked_for(
    again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second round's samples are spoilt, and the model that they come from is gone: said, or made again."""
    again.write(**ONE_BATCH, keep_rounds=1)
    assert again.iterate() == 0 and not (again.output / "round-1" / "train" / "model.safetensors").exists()
    before = results(again.output)
    (again.output / "round-2" / "sample" / "samples.jsonl").write_text("spoilt\n")
    status = again.iterate()
    if status == 0:
        assert results(again.output) == before
    else:
        said = capsys.readouterr().err
        assert status == 2 and "Traceback" not in said and "round-1" in said
        assert "pruned" in said or "keep_rounds" in said, said
