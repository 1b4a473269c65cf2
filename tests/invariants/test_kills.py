"""SIGKILL at random instants, of every trainer: what goes on afterwards ends at the bytes of an undisturbed run."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmalign.trainers.resuming import ASIDE, find_resumable
from tests.invariants.every_trainer import STEPS, TRAINERS, gone_on
from tests.trainers.forked import in_a_child

KILLS = 20


def finish(child: Any, log: Path) -> None:
    child.join(300)
    assert child.exitcode == 0, log.read_text()[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a finished run: its model's and those of its last checkpoint, a critic's too."""
    files = [*folder.glob("*.safetensors"), *(folder / f"checkpoint-{STEPS}").rglob("*.safetensors")]
    assert len(files) >= 2
    return {
        f"{file.relative_to(folder)} {name}": value for file in sorted(files) for name, value in load_file(file).items()
    }


@dataclass
class Whole:
    """An undisturbed run: its weights, and how long it took before its first checkpoint and for each step after it."""

    weights: dict[str, torch.Tensor]
    first: float
    step: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """The undisturbed run of a kind of trainer, once for all."""
    known: dict[str, Whole] = {}

    def of(kind: str) -> Whole:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            begun = time.perf_counter()
            child = in_a_child(gone_on, kind, folder, log=folder / "log")
            while not (folder / "checkpoint-1").exists() and child.exitcode is None:
                child.join(0.002)
            first = time.perf_counter() - begun
            finish(child, folder / "log")
            known[kind] = Whole(weights(folder), first, (time.perf_counter() - begun - first) / STEPS)
        return known[kind]

    return of


def kill(kind: str, folder: Path, whole: Whole, rng: random.Random, *, saving: bool) -> str:
    """Start a run and kill it, while it writes a checkpoint or at any instant; what the kill has met."""
    log, step = folder / "log", rng.randint(1, STEPS)
    folder.mkdir()
    child = in_a_child(gone_on, kind, folder, log=log)
    if saving:  # the folder for it is there during a save alone
        awaited, longest = folder / ASIDE / f"checkpoint-{step}", 0.03
    else:  # from the checkpoint before on, or from the start
        awaited = folder / f"checkpoint-{step - 1}" if step > 1 else folder
        longest = 1.5 * whole.step if step > 1 else whole.first
    while not awaited.exists() and child.exitcode is None:
        time.sleep(0.0002)
    child.join(rng.uniform(0, longest))
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    if child.exitcode == 0:
        return "the end"
    if (folder / ASIDE).exists():
        return "a save"
    return "a step" if any(folder.glob("checkpoint-*")) else "before the first checkpoint"


def killings() -> list[Any]:
    """Every trainer in turn, each other time while a checkpoint is written; a handful are run every day."""
    kinds = list(TRAINERS)
    drawn = [(number, kinds[number % len(kinds)], bool(number // len(kinds) % 2 == 0)) for number in range(KILLS)]
    quick = {kinds.index("pairs-lora"), kinds.index("mdpo"), len(kinds) + kinds.index("groups")}
    return [pytest.param(*one, marks=() if one[0] in quick else pytest.mark.slow) for one in drawn]


@pytest.mark.parametrize("number, kind, saving", killings())
def test_killed_at_a_random_instant_it_ends_at_the_same_bytes(
    number: int, kind: str, saving: bool, undisturbed: Any, tmp_path: Path
) -> None:
    whole, folder, seed = undisturbed(kind), tmp_path / kind, random.randrange(10**9)
    met = kill(kind, folder, whole, random.Random(seed), saving=saving)
    newest, skipped = find_resumable(folder)
    print(f"{kind}: seed {seed} met {met}; goes on from {newest and newest.name}")
    assert not skipped, (seed, met, skipped)
    child = in_a_child(gone_on, kind, folder, log=folder / "log")
    finish(child, folder / "log")
    found = weights(folder)
    assert found.keys() == whole.weights.keys(), (seed, met)
    wrong = [name for name, value in whole.weights.items() if not torch.equal(found[name], value)]
    assert not wrong, (seed, met, newest, wrong)
