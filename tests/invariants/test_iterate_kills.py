"""Killed with SIGKILL at any instant, `llmalign iterate` goes on and ends at the bytes of an undisturbed run."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main
from llmalign.loop.stages import finished, read_manifest
from tests.loop.running import Bench, everything, results

pytestmark = pytest.mark.slow

KILLS = 10
LORA = {"use_peft": True, "lora_r": 4}
SIZES = {"samples_per_prompt": 6, "save_steps": 1, "save_total_limit": 1}


def forked(folder: str, log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    gc.freeze()  # what the libraries made on import need not be looked through at the end of every stage
    os.chdir(folder)
    os.environ["ORACLE_LOG"] = f"{folder}/asked.log"
    sys.exit(main(["iterate", "recipe.yaml"]))


class Afresh(subprocess.Popen):
    """A process of its own, with what a forked one has: hashes of texts, too, are salted anew."""

    def join(self, seconds: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(seconds)

    @property
    def exitcode(self) -> int | None:
        return self.poll()


class Command:
    """`llmalign iterate` in a process started afresh or, seconds sooner, forked from one that has imported all."""

    child: Any

    def __init__(self, bench: Bench, *, afresh: bool = False) -> None:
        self.log = bench.folder / "run.log"
        if afresh:
            own = {"ORACLE_LOG": str(bench.folder / "asked.log"), "PYTHONPATH": str(Path(__file__).parents[2])}
            command = [sys.executable, "-m", "llmalign.cli", "iterate", "recipe.yaml"]
            with self.log.open("ab") as file:
                self.child = Afresh(command, cwd=bench.folder, env=os.environ | own, stdout=file, stderr=file)
            return
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["llmalign.loop", "llmalign.cli"])
        self.child = forking.Process(target=forked, args=(str(bench.folder), str(self.log)))
        self.child.start()

    def over(self, seconds: float | None = None) -> bool:
        """Whether the run has come to its end, waiting for it so long."""
        self.child.join(seconds)
        if self.child.exitcode is None:
            return False
        assert self.child.exitcode == 0, self.log.read_text()[-4000:]
        return True

    def kill(self) -> None:
        os.kill(self.child.pid, signal.SIGKILL)
        self.child.join()
        assert self.child.exitcode == -signal.SIGKILL

    def kill_when(self, moment: Callable[[], bool]) -> None:
        while not moment():
            assert not self.over(0.001), "the run was over before it could be killed"
        self.kill()


class Undisturbed:
    """A run that nothing stopped: its results, its files, and how long it took."""

    def __init__(self, folder: Path, model: Path, *, afresh: bool = False, **keys: Any) -> None:
        bench = Bench(folder, model)
        bench.write(**keys)
        started = time.perf_counter()
        assert Command(bench, afresh=afresh).over()
        self.seconds = time.perf_counter() - started
        self.results, self.files = results(bench.output), set(everything(bench.output))


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("whole"), tiny_model_dir, **SIZES)


class Torn:
    """A run that is killed again and again, and what the oracle was asked each time."""

    def __init__(self, folder: Path, model: Path, **keys: Any) -> None:
        self.bench = Bench(folder, model)
        self.bench.write(**keys)
        self.starts: list[int] = []  # lines of the oracle's log when a process began

    def start(self, *, afresh: bool = False) -> Command:
        self.starts.append(len(self.calls()))
        return Command(self.bench, afresh=afresh)

    def calls(self) -> list[list[Any]]:
        log = self.bench.folder / "asked.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    def check_stages(self) -> None:
        """Every manifest that is there tells of files that are whole."""
        for path in self.bench.output.glob("round-*/*/manifest.json"):
            manifest = read_manifest(path.parent)
            assert finished(path.parent, manifest.inputs) == manifest, path

    def check_payments(self) -> None:
        """A comparison is asked again only if its batch was the last one of a process that was killed.

        The oracle writes a batch down before it answers, and answers are kept batch by batch: a kill between the two
        takes one batch away. Whatever was answered before that batch was kept, and is never asked for again.
        """
        calls = self.calls()
        in_flight = {start - 1 for start in self.starts if start > 0}
        paid: set[tuple[str, frozenset[str]]] = set()
        for number, (_, *given) in enumerate(calls):
            batch = {(prompt, frozenset(texts)) for prompt, *texts in zip(*given, strict=True)}
            assert not batch & paid, f"call {number} asks again for what was answered"
            if number not in in_flight:
                paid |= batch

    def check_end(self, whole: Undisturbed) -> None:
        assert results(self.bench.output) == whole.results
        assert set(everything(self.bench.output)) == whole.files
        self.check_payments()


def test_killed_at_ten_random_instants_it_ends_at_the_same_bytes(
    whole: Undisturbed, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Instants between the start of a process and as long as an undisturbed run takes; whenever one is over before its
    kill, its end is looked at and another run begins."""
    rng, kills, runs = random.Random(5), 0, []
    while kills < KILLS or not runs[-1].over:
        if not runs or runs[-1].over:
            runs.append(Torn(tmp_path / f"torn-{len(runs)}", tiny_model_dir, **SIZES))
            runs[-1].over = False
        torn = runs[-1]
        command = torn.start()
        if kills < KILLS and not command.over(rng.uniform(0.1, whole.seconds)):
            command.kill()
            kills += 1
            torn.check_stages()
        elif command.over():
            torn.over = True
            torn.check_end(whole)
    assert kills == KILLS


@pytest.mark.parametrize("stage", ["sample/shards/00000.jsonl", "cache/ref/shards", "train/checkpoint-1", "judge"])
def test_killed_inside_a_stage_it_goes_on_in_it(
    stage: str, whole: Undisturbed, tiny_model_dir: Path, tmp_path: Path
) -> None:
    torn = Torn(tmp_path / "torn", tiny_model_dir, **SIZES)
    torn.start().kill_when((torn.bench.output / "round-2" / stage).exists)
    torn.check_stages()
    assert torn.start().over()
    torn.check_end(whole)


def test_an_adapter_is_gone_on_with(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Killed while the first round's adapter is trained, and while the second one's is; every process starts afresh,
    and writes the adapter's settings, which are sets, in the same order."""
    adapted = Undisturbed(tmp_path / "whole", tiny_model_dir, afresh=True, **SIZES, **LORA)
    torn = Torn(tmp_path / "torn", tiny_model_dir, **SIZES, **LORA)
    for number in (1, 2):
        folder = torn.bench.output / f"round-{number}" / "train"
        torn.start(afresh=True).kill_when((folder / "checkpoint-1").exists)
        torn.check_stages()
    command = torn.start(afresh=True)
    assert command.over() and "Resuming from out/round-2/train/checkpoint-" in command.log.read_text()
    torn.check_end(adapted)
    assert [name for name in adapted.results if name.endswith("adapter_model.safetensors")] == [
        f"round-{number}/train/adapter_model.safetensors" for number in (1, 2)
    ]
