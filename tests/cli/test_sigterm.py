"""The commands under SIGTERM: what is learnt is saved, status 0, and a line that goes on to the very same end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmalign import train as training
from llmalign.cli import main
from llmalign.cli.going_on import command_again
from llmalign.errors import UserError
from llmalign.loop import sample as sampling
from llmalign.processes import end_processes
from llmalign.sigterm import COMMAND
from llmalign.trainers.resuming import check_whole, find_resumable
from llmalign.verify import verify
from tests.invariants.launching import ROOT, WITH_DEEPSPEED, build_ops, environment
from tests.invariants.test_resume import write_pairs
from tests.loop.running import Bench
from tests.trainers.forked import Signalled, on_one, on_two

WEIGHTS = "model.safetensors"


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch):
    """Lets the next trainer that a recipe makes get the signal at a step; None: never."""
    original = training._say_what_runs
    wanted: list[int | None] = []

    def say(recipe: Any, trainer: Any) -> None:
        original(recipe, trainer)
        step = wanted.pop(0) if wanted else None
        if step is not None:
            trainer.add_callback(Signalled("on_step_begin", step))

    monkeypatch.setattr(training, "_say_what_runs", say)
    return wanted.append


def write_recipe(folder: Path, model: Path, name: str, **keys: Any) -> str:
    recipe = {
        "method": "rpo", "model_name_or_path": str(model), "dataset_name": str(write_pairs(folder / "pairs.jsonl", 14)),
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 6, "save_steps": 4, "max_length": 64,
        "logging_steps": 1, "alarm_prompts": 0, "report_to": "none", "disable_tqdm": True,
        "output_dir": str(folder / name), **keys,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def last_words(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The sentence about the signal, and the words of the command that it names."""
    *_, sentence, command = capsys.readouterr().err.strip().splitlines()
    program, *words = shlex.split(command)
    assert program == "llmalign"
    return sentence, words


def test_train_saves_and_names_the_line_that_goes_on(
    tiny_model_dir: Path, tmp_path: Path, signal_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, torn = (write_recipe(tmp_path, tiny_model_dir, name) for name in ("whole", "torn"))
    assert main(["train", whole, "--beta", "0.2"]) == 0
    before = signal.getsignal(signal.SIGTERM)
    signal_at(0)  # its first step is ended
    assert main(["train", torn, "--beta", "0.2"]) == 0
    sentence, words = last_words(capsys)
    saved = tmp_path / "torn" / "checkpoint-1"
    assert sentence == f"llmalign: ended by SIGTERM; {saved} is saved. Go on with:"
    assert words == ["train", torn, "--beta", "0.2", "--resume", "auto"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "torn" / "metrics.json").exists()
    check_whole(saved)
    signal_at(3)
    assert main(words) == 0
    assert last_words(capsys)[1] == words
    assert main(words) == 0
    assert (tmp_path / "torn" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_before_a_model_is_loaded_nothing_is_left(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, "run")
    original = training.load_tokenizer

    def signalled(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **options)

    monkeypatch.setattr(training, "load_tokenizer", signalled)
    assert main(["train", recipe]) == 0
    sentence, words = last_words(capsys)
    assert "nothing new was there to save" in sentence and words == ["train", recipe, "--resume", "auto"]
    assert not (tmp_path / "run").exists()


def parity(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [sum(ids) % 7 / 3 for ids in completion_ids]


@pytest.mark.slow
def test_in_the_middle_of_a_rollout_the_rollout_is_saved(
    tiny_model_dir: Path, tmp_path: Path, signal_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n} "}) + "\n" for n in range(6)))
    sampled = {
        "method": "mdpo", "dataset_name": str(data), "reward_funcs": [f"{__file__}:parity"], "num_generations": 4,
        "num_iterations": 2, "max_completion_length": 6, "max_length": None, "alarm_prompts": None,
    }  # fmt: skip
    whole, torn = (write_recipe(tmp_path, tiny_model_dir, name, **sampled) for name in ("whole", "torn"))
    for recipe in (whole, torn):
        kept = yaml.safe_load(Path(recipe).read_text())
        Path(recipe).write_text(yaml.safe_dump({key: value for key, value in kept.items() if value is not None}))
    assert main(["train", whole]) == 0
    signal_at(2)
    assert main(["train", torn]) == 0
    words = last_words(capsys)[1]
    assert (tmp_path / "torn" / "checkpoint-3" / "rollout_0.pt").is_file()
    assert main(words) == 0
    assert (tmp_path / "torn" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_sweep_begins_no_other_run(
    tiny_model_dir: Path, tmp_path: Path, signal_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, "grid", max_steps=2, save_strategy="no")
    signal_at(0)
    assert main(["sweep", recipe, "beta=0.1,0.2"]) == 0
    sentence, words = last_words(capsys)
    assert "beta=0.1/checkpoint-1 is saved" in sentence and words == ["sweep", recipe, "beta=0.1,0.2"]
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["beta=0.1"]
    assert main(words) == 0
    runs = json.loads((tmp_path / "grid" / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished", "finished"]


@pytest.fixture
def bench(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path / "bench", tiny_model_dir)
    made.write(rounds=1, eval_prompts=0)
    monkeypatch.chdir(made.folder)
    return made


@pytest.mark.slow
def test_rounds_stop_in_training(bench: Bench, signal_at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    signal_at(0)
    assert main(["iterate", "recipe.yaml"]) == 0
    sentence, words = last_words(capsys)
    assert "round-1/train/checkpoint-1 is saved" in sentence and words == ["iterate", "recipe.yaml"]
    assert main(words) == 0
    assert (bench.output / "rounds.json").is_file()


def test_rounds_stop_between_trainings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*given: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    monkeypatch.setattr(sampling, "write_shards", signalled)
    assert main(["iterate", "recipe.yaml"]) == 0
    assert "nothing new was there to save" in last_words(capsys)[0]


def in_processes(recipe: str, step: int | None, *words: str) -> None:
    """`llmalign train` as one of the processes that there are; the last one alone gets the signal."""
    rank = int(os.environ.get("RANK", "0"))
    if step is not None and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        original = training._say_what_runs

        def say(made: Any, trainer: Any) -> None:
            original(made, trainer)
            trainer.add_callback(Signalled("on_step_begin", step))

        training._say_what_runs = say
    assert main(["train", recipe, *words]) == 0
    if "RANK" in os.environ:
        end_processes(together=True)


def test_two_processes_end_well_and_one_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, torn = (write_recipe(tmp_path, tiny_model_dir, name) for name in ("whole", "torn"))
    log = tmp_path / "log"
    on_two(log, in_processes, torn, 1, "--per_device_train_batch_size", "2")
    assert (tmp_path / "torn" / "checkpoint-3").is_dir()
    assert log.read_text().count("ended by SIGTERM") == 1
    on_one(log, in_processes, torn, None, "--resume", "auto", "--use_cpu", "true")
    on_one(log, in_processes, whole, None, "--use_cpu", "true")
    losses = [
        [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        for state in (tmp_path / "whole" / "trainer_state.json", tmp_path / "torn" / "trainer_state.json")
    ]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], abs=1e-5)


def launched(recipe: str, config: str, log: Path) -> subprocess.Popen[bytes]:
    words = ["train", recipe, "--accelerate", config, "--num_processes", "2", "--per_device_train_batch_size", "2"]
    with log.open("a") as file:
        command = [sys.executable, "-m", "llmalign.cli", *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=WITH_DEEPSPEED)])
def test_under_a_launcher_the_line_has_the_launcher(config: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    if config == "zero3":
        build_ops()
    recipe, log = write_recipe(tmp_path, tiny_model_dir, "run", max_steps=2000, save_steps=2), tmp_path / "log"
    child = launched(recipe, config, log)
    while not (tmp_path / "run" / "checkpoint-2").is_dir():
        time.sleep(0.05)
        assert child.poll() is None, log.read_text()[-3000:]
    child.terminate()
    assert child.wait(120) == 0, log.read_text()[-3000:]
    sentence, command = [
        line for line in log.read_text().splitlines() if line.startswith(("llmalign: ended", "  llma"))
    ]
    newest = find_resumable(tmp_path / "run", world_size=2)[0]
    assert newest is not None and f"{newest} is saved" in sentence
    words = shlex.split(command)
    assert words[:3] == ["llmalign", "train", recipe] and words[-2:] == ["--resume", "auto"]
    assert words[words.index("--accelerate") + 1] == config and words[words.index("--num_processes") + 1] == "2"
    # Without the launcher one process goes on, with the rows of both, unless each has a part of the state.
    done = int(newest.name.split("-")[1]) + 2
    run_file = tmp_path / "run" / "run.json"
    run_file.write_text(run_file.read_text().replace('"max_steps": 2000', f'"max_steps": {done}'))
    alone = ["--max_steps", str(done), "--resume", "auto"]
    if config == "ddp":
        on_one(log, in_processes, recipe, None, *alone)
        assert "written by 2 process(es)" in log.read_text()
    else:
        with pytest.raises(UserError, match=r"2 process\(es\) wrote it, each with .* and this run has 1; start 2"):
            check_whole(newest, world_size=1)
        done_by_two = [sys.executable, "-m", "llmalign.cli", *words[1:], "--max_steps", str(done)]
        assert subprocess.run(done_by_two, cwd=ROOT, env=environment(), check=False).returncode == 0
    assert (tmp_path / "run" / f"checkpoint-{done}").is_dir()
    assert not [one for one in verify(tmp_path / "run") if one.faults]


def test_the_line_to_go_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train", "my recipe.yaml", "--hub_token", "hf_secret", "--resume=old/checkpoint-4", "--eta", "0.1"]
    assert command_again(given, saved=True) == "llmalign train 'my recipe.yaml' --eta 0.1 --resume auto"
    assert command_again(given, saved=False) == "llmalign train 'my recipe.yaml' --resume=old/checkpoint-4 --eta 0.1"
    monkeypatch.setenv(COMMAND, "llmalign train recipe.yaml --accelerate ddp --num_processes 2")
    assert command_again(["train", "recipe.yaml"], saved=True) == (
        "llmalign train recipe.yaml --accelerate ddp --num_processes 2 --resume auto"
    )
