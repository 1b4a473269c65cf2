"""Image runs: two processes end at the weights of one, and a killed run goes on to those of an undisturbed one."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.tiny import build_tiny
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.processes import end_processes, load_group_users
from tests.diffusion.drawing import captions, online
from tests.diffusion.training import pairs, trainer

FORKING = multiprocessing.get_context("fork")  # what takes seconds to import is there already


def start(log: Path, environment: dict[str, str], work: Callable[..., None], *given: Any) -> Any:
    """Let a forked process do some work, with no trace of this one's accelerator."""

    def inside() -> None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        gc.freeze()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        work(*given)

    process = FORKING.Process(target=inside)
    process.start()
    return process


def built(pipe: Any, folder: Path, **changes: Any) -> DiffusionPreferenceTrainer:
    """Seven rows in steps of four: the last step of an epoch has three."""
    options = {
        "max_steps": 5, "beta": 200.0, "learning_rate": 1e-3, "caption_dropout": 0.3, "random_flip": "image",
        "evaluation": pairs(3, seed=1), "eval_timesteps": 2,
    }  # fmt: skip
    return trainer(pipe, folder, rows=pairs(7), **{**options, **changes})


def trained(kind: str, adapted: bool, folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        load_group_users()
    sizes = {"per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 2}
    run = built(build_tiny(kind), folder, peft=adapted, **sizes)
    assert run.accelerator.num_processes == world, "the processes do not know each other"
    for model in (run.model, run.reference):  # roundings, of which Adam makes much, are none then
        if model is not None:
            model.double()
    run.train()
    assert type(run.model_wrapped).__name__ == ("DistributedDataParallel" if world > 1 else "Denoiser")
    measured = run.evaluate()
    if run.is_world_process_zero():
        (folder / "measured.json").write_text(json.dumps({"train": run.state.log_history, "eval": measured}))
        own = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
        torch.save(own, folder / "weights.pt")
    if world > 1:
        end_processes(together=True)


def results(folder: Path) -> tuple[list[dict[str, float]], dict[str, float], dict[str, torch.Tensor]]:
    measured = json.loads((folder / "measured.json").read_text())
    steps = [entry for entry in measured["train"] if "loss" in entry]
    return steps, measured["eval"], torch.load(folder / "weights.pt")


def in_one_and_in_two(tmp_path: Path, work: Callable[..., None], *given: Any) -> tuple[Path, Path]:
    """Let one process, and two that know each other, do some work in a folder each; the folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{}, *({"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2))]
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "two"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    logs = [tmp_path / f"log-{number}" for number in range(3)]
    children = [
        start(log, environment, work, *given, folder)
        for log, environment, folder in zip(logs, ranks, folders, strict=True)
    ]
    for child, log in zip(children, logs, strict=True):
        child.join(300)
        assert child.exitcode == 0, log.read_text()[-3000:]
    return folders[0], folders[1]


@pytest.mark.parametrize(
    "kind, adapted",
    [
        ("sd", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sd", False), ("sd3", False), ("flux", True))),
    ],
)
def test_two_processes_equal_one(kind, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("llmalign.diffusion.latents.PART_ROWS", 4)  # each encodes a part
    folders = in_one_and_in_two(tmp_path, trained, kind, adapted)
    (alone, measured_alone, weights_alone), (together, measured, weights) = results(folders[0]), results(folders[1])
    assert [entry["step"] for entry in alone] == [1, 2, 3, 4, 5] and alone[-1]["epoch"] == 2.5
    for one, two in zip(alone, together, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "error/chosen", "error/winner_ratio_average"):
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6), (one["step"], key)
    for key, value in measured_alone.items():
        if not key.endswith(("_runtime", "_per_second", "_time")):
            assert measured[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    for name, weight in weights_alone.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12, msg=name)


def drawn_and_trained(folder: Path) -> None:
    """Three rounds of five pairs, of which one process draws three and the other two."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        load_group_users()
    run = online(
        build_tiny("sd"), folder, rounds=3, pairs_per_round=5, per_device_train_batch_size=10 // world, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, beta=5.0, evaluation=captions(3, first=9), per_device_eval_batch_size=2,
    )  # fmt: skip
    assert run.accelerator.num_processes == world, "the processes do not know each other"
    run.train()
    measured = run.evaluate()
    if run.is_world_process_zero():
        (folder / "measured.json").write_text(json.dumps({"train": run.state.log_history, "eval": measured}))
        torch.save(
            {name: value for name, value in run.model.named_parameters() if value.requires_grad}, folder / "weights.pt"
        )
    if world > 1:
        end_processes(together=True)


def test_two_processes_draw_and_learn_what_one_does(tmp_path):
    folders = in_one_and_in_two(tmp_path, drawn_and_trained)
    (alone, measured_alone, weights_alone), (together, measured, weights) = map(results, folders)
    assert [entry["step"] for entry in alone] == [1, 2, 3, 4, 5, 6] == [entry["step"] for entry in together]
    for one, two in zip(alone, together, strict=True):
        for key in ("loss", "grad_norm", "reward", "ratios/clipped", "pairs/preferred", "rewards/margins"):
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-4), (one["step"], key)
    assert measured["eval_reward"] == pytest.approx(measured_alone["eval_reward"], rel=1e-3)
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    moved = max(weight.abs().max() for name, weight in weights_alone.items() if "lora_B" in name)
    assert moved > 1e-2, "from zero"


# Kills


def saving(pipe: Any, folder: Path) -> DiffusionPreferenceTrainer:
    return built(pipe, folder, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=2)


def resumed(pipe: Any, folder: Path) -> None:
    run = saving(pipe, folder)
    run.train(resume_from_checkpoint=any((folder / "out").glob("checkpoint-*")))
    run.save_model()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 12])
def test_a_killed_run_ends_at_the_same_weights(kills, tmp_path):
    pipe = build_tiny("sd")
    begun = time.perf_counter()
    whole = start(tmp_path / "log", {}, resumed, pipe, tmp_path / "whole")
    whole.join(300)
    assert whole.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    took = time.perf_counter() - begun
    expected = load_file(tmp_path / "whole" / "out" / LORA_FILE)
    rng = random.Random()
    seen = []
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        child = start(tmp_path / f"log-{number}", {}, resumed, pipe, folder)
        child.join(rng.uniform(0.2, 1.0) * took)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        seen.append(sorted(path.name for path in (folder / "out").glob("*")) if (folder / "out").is_dir() else [])
        again = start(tmp_path / f"log-{number}", {}, resumed, pipe, folder)
        again.join(300)
        assert again.exitcode == 0, (seen, (tmp_path / f"log-{number}").read_text()[-3000:])
        found = load_file(folder / "out" / LORA_FILE)
        assert found.keys() == expected.keys()
        assert not [name for name, value in expected.items() if not torch.equal(found[name], value)], seen
