"""The commands from the outside: help, doctor's status and output, resuming, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmalign.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"Say something kind about {i}.",
            "chosen": f" What a lovely {i} it is.",
            "rejected": " No." * (i % 3 + 1),
        }
        for i in range(32)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, model: Path, data: Path, **values: object) -> str:
    settings = {
        "method": "rpo",
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "beta": 0.1,
        "eta": 0.5,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "max_length": 128,
        "logging_steps": 1,
        "alarm_prompts": 0,
        "report_to": "none",
        "disable_tqdm": True,
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "x.yaml"], ["doctor"]])
def test_help_says_how(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "llmalign" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["tarin"], ["quickstart", "--nonsense", "1"]])
def test_unknown_commands_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_doctor_is_content_with_good_rows(
    pairs_file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(pairs_file), "--model", str(tiny_model_dir), "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert "32 rows of pairs" in out and "row 3" in out and "mask 1" in out


def test_doctor_lists_what_is_wrong_and_exits_with_one(
    pairs_file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pairs_file.open("a") as file:
        file.write(json.dumps({"prompt": "a.", "chosen": " b", "rejected": " b"}) + "\n")
    command = ["doctor", str(pairs_file), "--model", str(tiny_model_dir), "--max_length", "24"]
    assert main(command) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "max_truncated" in out and "1 of 33 rows (3.0%) have the same text" in out
    allowed = ["--max_truncated", "1", "--max_dropped", "1", "--max_identical", "0.05"]
    assert main([*command, *allowed]) == 0


def test_doctor_reads_groups_through_columns(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "groups.jsonl"
    row = {
        "instruction": "Say something.",
        "outputs": [{"text": " Yes.", "score": 1.0}, {"text": " No.", "score": 0.0}],
    }
    path.write_text(json.dumps(row) + "\n")
    columns = "{prompt: instruction, completions: outputs.text, rewards: outputs.score}"
    status = main(["doctor", str(path), "--model", str(tiny_model_dir), "--kind", "groups", "--columns", columns])
    assert status == 0 and "reward 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--row", "99"], "row_id 99"), (["--splitt", "x"], "`splitt`"), (["--model", "/absent"], "/absent")],
)
def test_doctor_says_what_it_cannot_do(
    pairs_file: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["doctor", str(pairs_file), "--model", str(tiny_model_dir), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_resume_ends_where_the_whole_run_ended(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    """The evaluation before training is taken from the first run, and the weights are the same to the bit."""
    held = {"held": {"path": str(pairs_file), "max_rows": 8}}
    written = recipe(tmp_path, tiny_model_dir, pairs_file, eval_datasets=held)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", written, "--output_dir", str(whole)]) == 0
    assert main(["train", written, "--output_dir", str(cut)]) == 0
    for left_over in (
        "model.safetensors",
        "metrics.json",
        "checkpoint-4/model.safetensors",
        "checkpoint-4/optimizer.pt",
    ):
        (cut / left_over).unlink()
    assert main(["train", written, "--output_dir", str(cut), "--resume", "auto"]) == 0
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, cut))
    assert first["before"] == second["before"] and first["after"] == second["after"]


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = ["train", recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=2), "--output_dir", str(out)]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    assert main([*arguments, "--resume", "auto"]) == 0
    assert "finished already" in caplog.text
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_resuming_with_another_value_is_refused(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=2)
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["train", written, *output]) == 0
    assert main(["train", written, *output, "--resume", "auto", "--beta", "0.2"]) == 2
    assert "beta 0.1 -> 0.2" in capsys.readouterr().err


def test_rows_are_held_out_where_no_evaluation_set_is_named(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Path
) -> None:
    written = recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=1, eval_strategy="steps", holdout_rows=3)
    assert main(["train", written, "--output_dir", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["before"]["loss"] != result["after"]["loss"]


def test_training_without_any_evaluation_says_so(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=1, eval_strategy="steps")
    assert main(["train", written, "--output_dir", str(tmp_path / "out")]) == 0
    assert "nothing is measured before and after" in caplog.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["after"] == {}


def test_overlong_rows_are_left_out_and_counted(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    with pairs_file.open("a") as file:
        file.write(json.dumps({"prompt": "Say it at length.", "chosen": " word" * 200, "rejected": " No."}) + "\n")
    written = recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=1, max_truncated=0.0)
    assert main(["train", written, "--output_dir", str(tmp_path / "kept")]) == 2
    assert main(["train", written, "--output_dir", str(tmp_path / "left"), "--overlong", "drop"]) == 0
    found = json.loads((tmp_path / "left" / "metrics.json").read_text())["data"]["train"]["findings"]
    assert found["truncated"] == {"count": 1, "rows": [32]}


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_methods_of_trl_get_only_the_rows_that_fit(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Path, method: str
) -> None:
    with pairs_file.open("a") as file:
        file.write(json.dumps({"prompt": "Say it at length.", "chosen": " word" * 200, "rejected": " No."}) + "\n")
    written = tmp_path / f"{method}.yaml"
    written.write_text(
        f"method: {method}\nmodel_name_or_path: {tiny_model_dir}\ndataset_name: {pairs_file}\noverlong: drop\n"
        "max_steps: 1\nmax_length: 128\nnum_train_epochs: 1\nreport_to: none\ndisable_tqdm: true\n"
    )
    assert main(["train", str(written), "--output_dir", str(tmp_path / "out")]) == 0


def launch_two(written: str, output_dir: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "train.py"), written, "--output_dir", str(output_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_end_at_the_weights_of_one(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    """Real data parallelism: 2 x 4 rows a step and 1 x 8 rows a step are the same step."""
    written = recipe(tmp_path, tiny_model_dir, pairs_file, max_steps=3, use_cpu=True)
    done = launch_two(written, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rpo on ") == 1, "only the main process prints"
    result = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 3)
    assert main(["train", written, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"]) == 0
    start = load_file(tiny_model_dir / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-3
    assert all(torch.isfinite(value).all() for value in two.values())


@pytest.mark.slow
def test_what_one_of_two_processes_refuses_ends_both(tmp_path: Path, tiny_model_dir: Path, pairs_file: Path) -> None:
    """Only the main process looks for another run in the output folder; the other one waits for it."""
    (tmp_path / "taken" / "checkpoint-1").mkdir(parents=True)
    done = launch_two(recipe(tmp_path, tiny_model_dir, pairs_file, use_cpu=True), tmp_path / "taken")
    assert done.returncode != 0
    assert done.stderr.count("llmalign: ") == 1 and "holds another run (checkpoint-1)" in done.stderr
