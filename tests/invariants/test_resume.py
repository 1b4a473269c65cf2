"""Killed with SIGKILL and resumed by `--resume auto`, `llmalign train` ends at the bytes of the undisturbed run."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmalign.cli import main
from llmalign.trainers.resuming import find_resumable

STEPS = 24
LAST = f"checkpoint-{STEPS}"
CASES = {
    "full": {"method": "rpo", "beta": 0.1, "eta": 0.1},
    "lora": {"method": "rpo", "beta": 0.1, "eta": 0.1, "use_peft": True, "lora_r": 4},
    "accumulation": {"method": "rdpo", "flip_rate": 0.1, "gradient_accumulation_steps": 2},
}


def write_pairs(path: Path, rows: int) -> Path:
    words = ["river", "boat", "soup", "letter", "morning", "answer", "question"]
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            word, other = words[row % 7], words[(row * 3 + 1) % 7]
            pair = {
                "prompt": f"Say a word about the {word} {row}.",
                "chosen": f" The {word} was calm{' and good' * (row % 3)}.",
                "rejected": f" What is the {other}{' of course' * (row % 2)}?",
            }
            file.write(json.dumps(pair) + "\n")
    return path


def write_recipe(folder: Path, model: Path, output_dir: Path, case: dict) -> Path:
    recipe = {
        "model_name_or_path": str(model),
        "dataset_name": str(write_pairs(folder / "train.jsonl", 60)),
        "eval_datasets": {"held_out": {"path": str(write_pairs(folder / "test.jsonl", 6))}},
        "eval_strategy": "steps",
        "eval_steps": 8,
        "max_steps": STEPS,
        "save_steps": 4,
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 64,
        "logging_steps": 4,
        "alarm_prompts": 2,
        "alarm_new_tokens": 8,
        "report_to": "none",
        "output_dir": str(output_dir),
        **case,
    }
    path = folder / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def forked(recipe: str, options: tuple[str, ...], log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(["train", recipe, *options]))


class Run:
    """`llmalign train` in its own process, started afresh or, seconds sooner, forked from one that has imported."""

    def __init__(self, recipe: Path, *options: str, afresh: bool = False) -> None:
        self.log = recipe.with_suffix(".log")
        if afresh:
            command = [sys.executable, "-m", "llmalign.cli", "train", str(recipe), *options]
            with self.log.open("ab") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, cwd=Path(__file__).parents[2])
            self.pid, self.wait, self.code = process.pid, process.wait, process.poll
        else:
            forking = multiprocessing.get_context("forkserver")
            forking.set_forkserver_preload(["llmalign.train"])
            child = forking.Process(target=forked, args=(str(recipe), options, str(self.log)))
            child.start()
            self.pid, self.wait, self.code = child.pid, child.join, lambda: child.exitcode

    def finish(self) -> None:
        self.wait(300)
        assert self.code() == 0, self.log.read_text()[-4000:]

    def kill_when(self, moment: Callable[[], bool]) -> None:
        while not moment():
            assert self.code() is None, self.log.read_text()[-4000:]
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        self.wait(60)
        assert self.code() == -signal.SIGKILL, "the run was over before it could be killed"


def losses(output_dir: Path) -> list[tuple[int, float]]:
    history = json.loads((output_dir / LAST / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[key]) for entry in history for key in ("loss", "eval_held_out_loss") if key in entry]


@pytest.mark.slow  # test_kills.py has quick ones
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_ends_at_the_same_bytes(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    recipes = [write_recipe(tmp_path, tiny_model_dir, folder, CASES[name]) for folder in (whole, torn)]
    # One is killed between two checkpoints, two while they write: the folder for that is there during a save alone.
    moment = (torn / "checkpoint-8").exists if name == "lora" else (torn / "_incomplete" / "checkpoint-12").exists
    reference, victim = Run(recipes[0]), Run(recipes[1], "--resume", "auto", afresh=name == "full")
    victim.kill_when(moment)
    newest, skipped = find_resumable(torn)
    assert newest is not None and newest.name in ("checkpoint-8", "checkpoint-12") and not skipped
    resumed = Run(recipes[1], "--resume", "auto", afresh=name == "full")
    resumed.finish()
    assert f"Resuming from {newest}, the newest whole checkpoint." in resumed.log.read_text()
    reference.finish()

    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (torn / weights).read_bytes() == (whole / weights).read_bytes()
    assert (torn / weights).read_bytes() != (whole / "checkpoint-20" / weights).read_bytes()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (torn / LAST / file).read_bytes() == (whole / LAST / file).read_bytes(), file
    assert losses(torn) == losses(whole) and len(losses(torn)) == 10
    files = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in torn.iterdir()) == files
    assert {"README.md", "checkpoint-20", LAST} < set(files) and "checkpoint-16" not in files


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of four steps that is over; its checkpoints are 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    short = {**CASES["full"], "max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    recipe = write_recipe(folder, tiny_model_dir, folder / "run", short)
    assert main(["train", str(recipe)]) == 0
    return recipe


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("optimizer.pt", "the optimizer state (optimizer.pt) is missing"),
        ("scheduler.pt", "the scheduler state (scheduler.pt) is missing"),
        ("rng_state.pth", "the random state (rng_state.pth) is missing"),
    ],
)
def test_a_missing_state_ends_the_command_with_its_sentence(
    missing: str, sentence: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = finished.parent / "run" / "checkpoint-4"
    kept = damaged.with_name("kept")
    shutil.copytree(damaged, kept)
    (damaged / missing).unlink()
    before = sorted(path for path in (finished.parent / "run").rglob("*"))
    try:
        assert main(["train", str(finished), "--resume", str(damaged)]) != 0
        assert sentence in said(capsys)
        assert sorted(path for path in (finished.parent / "run").rglob("*")) == before
    finally:
        shutil.rmtree(damaged)
        kept.rename(damaged)


def test_a_folder_with_another_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(finished)]) != 0
    assert "holds another run (checkpoint-2); go on with it by --resume auto" in said(capsys)
    assert main(["train", str(finished), "--resume", "auto", "--eta", "0.7"]) != 0
    assert "was started with another recipe (eta 0.1 -> 0.7)" in said(capsys)
