"""`llmalign verify`: what it looks at, what it finds, and the status that says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmalign.cli import main
from llmalign.diffusion.tiny import build_tiny
from llmalign.hub.staging import stage
from llmalign.loop.stages import Made, run_stage
from llmalign.trainers.manifest import MANIFEST, files_of, read_manifest, write_manifest, write_model_manifest
from llmalign.verify import verify
from tests.invariants.test_resume import write_pairs
from tests.loop.running import Bench

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = {
        "method": "rpo", "model_name_or_path": str(tiny_model_dir), "max_length": 64, "max_steps": 2, "save_steps": 1,
        "dataset_name": str(write_pairs(folder / "pairs.jsonl", 6)), "per_device_train_batch_size": 2,
        "alarm_prompts": 0, "report_to": "none", "disable_tqdm": True, "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])


def status(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    code = main(["verify", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_whole_run_has_a_line_for_each_part(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = status(capsys, run)
    assert code == 0 and "0 of 3 broken" in said
    found = {one.name: one for one in verify(run)}
    assert list(found) == ["run", "checkpoint-1", "checkpoint-2"]
    assert [one.step for one in found.values()] == [2, 1, 2]
    assert {one.verdict for one in found.values()} == {"whole"}
    manifest = read_manifest(run / "checkpoint-2")
    assert manifest is not None and manifest.processes == 1 and manifest.rows_per_step == 2
    files = [path for path in (run / "checkpoint-2").iterdir() if path.name != MANIFEST]
    assert found["checkpoint-2"].files == len(files) == len(manifest.files)
    assert (
        found["checkpoint-2"].size
        == sum(path.stat().st_size for path in files)
        == sum(one.size for one in manifest.files.values())
    )
    own = read_manifest(run)
    assert own is not None and {MODEL, "config.json", "tokenizer.json"} <= set(own.files)
    assert not set(own.files) & {"metrics.json", "run.json", "README.md", "curves.png", MANIFEST}


@pytest.mark.parametrize(
    "name", [MODEL, "checkpoint-1/optimizer.pt", "run.json", "metrics.json", "checkpoint-2/" + MANIFEST]
)
def test_what_is_cut_off_is_named(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-10])
    for words in ([run], [run, "--quick"]):
        code, said = status(capsys, *words)
        where, _, file = name.rpartition("/")
        assert code == 1 and "1 of 3 broken" in said
        assert f"{where or 'run'}: {file} is cut off or damaged" in said


def test_a_changed_bit_is_found_by_reading_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / MODEL)
    code, said = status(capsys, run)
    assert code == 1 and f"run: {MODEL} is cut off or damaged: its SHA-256 is " in said and "and was " in said
    code, said = status(capsys, run, "--quick")
    assert code == 0 and "whole, by sizes" in said


def test_one_checkpoint_and_one_model_can_be_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(capsys, run / "checkpoint-1")[0] == 0
    (run / "checkpoint-1" / "scheduler.pt").unlink()
    code, said = status(capsys, run / "checkpoint-1")
    assert code == 1 and "checkpoint-1: scheduler.pt is missing" in said
    model = run.parent / "model"
    model.mkdir()
    for name in (*read_manifest(run).files, MANIFEST):  # type: ignore[union-attr]
        shutil.copy(run / name, model)
    assert status(capsys, model)[0] == 0
    change(model / "config.json")
    assert "model: config.json is cut off or damaged" in status(capsys, model)[1]
    (run / "_incomplete" / "checkpoint-3").mkdir(parents=True)
    assert "left over, unused" in " ".join(status(capsys, run)[1].split())


def test_an_unfinished_run_has_no_model_yet_and_its_checkpoints_in_order(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (MODEL, MANIFEST, "metrics.json"):
        (run / name).unlink()
    (run / "checkpoint-1").rename(run / "checkpoint-10")
    found = verify(run)
    assert [one.name for one in found] == ["run", "checkpoint-2", "checkpoint-10"]
    assert found[0].verdict == "no model yet" and not found[0].faults


def test_a_finished_run_without_its_model_is_not_finished(
    finished: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(finished.parent / "recipe.yaml"), "--output_dir", str(run), "--resume", "auto"]
    wanted = (run / MODEL).read_bytes()
    (run / MODEL).write_bytes(wanted[:100])
    assert main(words) == 2
    assert f"{MODEL} is cut off or damaged" in capsys.readouterr().err
    (run / "metrics.json").write_text("{")
    (run / MODEL).write_bytes(wanted)
    assert main(words) == 2 and "metrics.json is cut off or damaged" in capsys.readouterr().err
    (run / MODEL).unlink()
    (run / "metrics.json").unlink()
    assert main(words) == 0 and (run / MODEL).read_bytes() == wanted


def test_weights_alone_are_whole_where_they_were_written_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
    assert status(capsys, newest)[0] == 1
    write_manifest(newest, files_of(newest), step=2, processes=1, rows_per_step=2)
    code, said = status(capsys, newest)
    assert code == 0 and "weights alone (save_only_model), which no run goes on from" in " ".join(said.split())


def test_where_there_is_nothing_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "nowhere", "there is no folder"), (tmp_path / "empty", "nothing to verify")):
        code, said = status(capsys, path)
        assert code == 2 and words in said
    assert status(capsys, tmp_path, "--slow")[0] == 2


def test_an_older_run_is_judged_by_its_structure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in run.rglob(MANIFEST):
        manifest.unlink()
    code, said = status(capsys, run)
    assert code == 0 and said.count("whole in structure (no") == 3
    (run / MODEL).write_bytes((run / MODEL).read_bytes()[:-1])
    code, said = status(capsys, run)
    assert code == 1 and f"run: {MODEL} is cut off or damaged" in said


def test_a_sweep_and_what_was_pulled(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid"
    for name in ("beta=0.1", "beta=0.2"):
        shutil.copytree(run, grid / name)
    (grid / "sweep.json").write_text("{}")
    assert [one.name for one in verify(grid)][:3] == ["grid", "beta=0.1", "beta=0.1/checkpoint-1"]
    change(grid / "beta=0.2" / "checkpoint-2" / MODEL)
    code, said = status(capsys, grid)
    assert code == 1 and "1 of 7 broken" in said and f"beta=0.2/checkpoint-2: {MODEL} is cut off" in said
    pulled = stage(run, tmp_path / "pulled", "A card.").folder
    assert MANIFEST not in {path.name for path in pulled.iterdir()}  # what went to the Hub has its own
    assert status(capsys, pulled)[0] == 0
    change(pulled / MODEL)
    assert f"pulled: {MODEL} is cut off or damaged" in status(capsys, pulled)[1]


def test_a_pipeline_is_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pipeline"
    build_tiny("sd").save_pretrained(folder)
    write_model_manifest(folder, step=3, processes=1)
    names = set(read_manifest(folder).files)  # type: ignore[union-attr]
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"} <= names
    found = verify(folder)
    assert len(found) == 1 and found[0].files == len(names) and found[0].step == 3
    change(folder / "vae" / "diffusion_pytorch_model.safetensors")
    code, said = status(capsys, folder)
    assert code == 1 and "pipeline: vae/diffusion_pytorch_model.safetensors is cut off or damaged" in said


def test_a_stage_of_rounds_is_known_by_its_own_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def make(folder: Path) -> Made:
        (folder / "samples.jsonl").write_text('{"prompt": "one", "completions": ["a", "b", "c", "d"]}\n')
        return Made(["samples.jsonl"])

    run_stage(run / "round-1" / "sample", inputs={"model": "0"}, seed=1, make=make)
    (run / "loop.json").write_text("{}")
    assert [one.name for one in verify(run)] == ["run", "round-1/sample"]
    assert status(capsys, run)[0] == 0
    change(run / "round-1" / "sample" / "samples.jsonl")
    code, said = status(capsys, run)
    assert code == 1 and "round-1/sample: samples.jsonl is cut off or damaged: its SHA-256" in said
    (run / "round-1" / "sample" / MANIFEST).write_text("{")
    assert "the manifest of sample is cut off or damaged" in status(capsys, run)[1]


@pytest.mark.slow
def test_all_that_rounds_leave_is_whole(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path / "bench", tiny_model_dir)
    bench.write(keep_checkpoints=True)
    monkeypatch.chdir(bench.folder)
    assert main(["iterate", "recipe.yaml"]) == 0
    assert status(capsys, "out")[0] == 0
    found = {one.name: one.verdict for one in verify("out")}
    assert {"out", "round-1/sample", "round-2/train", "round-2/evaluate"} <= set(found)
    assert any(name.startswith("round-1/train/checkpoint-") for name in found)
    assert set(found.values()) == {"whole", "no model yet"}
    trained = json.loads((bench.output / "round-2" / "train" / MANIFEST).read_text())
    assert trained["stage"] == "round-2/train"
    change(bench.output / "round-1" / "train" / MODEL)
    assert f"round-1/train: {MODEL} is cut off" in status(capsys, "out")[1]
