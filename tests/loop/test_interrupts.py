"""Stopped after every single write, rename and removal, a run goes on and ends at the same bytes."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmalign.loop.comparisons import Comparisons
from llmalign.loop.stages import finished, read_manifest
from tests.loop.running import Bench, results

#: one round of everything: shards, a checkpoint, parts to be removed
ONE_ROUND = {
    "rounds": 1, "prompts_per_round": 3, "eval_prompts": 2, "samples_per_prompt": 3, "save_steps": 1,
    "num_train_epochs": 1, "per_device_train_batch_size": 1, "save_total_limit": 1,
}  # fmt: skip
TWO_ROUNDS = {**ONE_ROUND, "rounds": 2, "keep_rounds": 1}


class Stopped(BaseException):
    """What ends a process, which no handler of errors catches."""


class Events:
    """Everything that changes a name in the run's folder or a row in its database, each told apart from the others.

    Once for each the run is stopped right after it, and with `before` right before it too; what the oracle said is lost
    once in any case.
    """

    def __init__(self, log: Path, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.before, self.stops = log, before, 0
        self.seen: Counter[tuple[Any, ...]] = Counter()
        self.lost: list[int] = []  # lines of the oracle's log whose answers were not kept
        for name in ("replace", "rename", "unlink", "rmdir", "remove"):
            monkeypatch.setattr(os, name, self._stopping(name, getattr(os, name)))
        keep = Comparisons._keep

        def keeping(known: Comparisons, fresh: dict[bytes, float]) -> None:
            event = ("keep", *sorted(fresh))
            if fresh and not self.seen[event]:
                self.lost.append(len(self.log.read_text().splitlines()) - 1)
            self._around(event, lambda: keep(known, fresh), before=bool(fresh), after=bool(fresh))

        monkeypatch.setattr(Comparisons, "_keep", keeping)

    def _stopping(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*args: Any, **kwargs: Any) -> Any:
            path = os.fspath(args[-1] if name in ("replace", "rename") else args[0])
            # What shutil.rmtree removes has a name relative to an open folder.
            if not str(path).startswith("out") and kwargs.get("dir_fd") is None:
                return original(*args, **kwargs)
            return self._around((name, str(path)), lambda: original(*args, **kwargs), before=self.before)

        return stopping

    def _around(self, event: tuple[Any, ...], work: Callable[[], Any], *, before: bool, after: bool = True) -> Any:
        self.seen[event] += 1
        times = self.seen[event]
        if times == 1 and before:
            self.stops += 1
            raise Stopped
        result = work()
        if times == 1 + before and after:
            self.stops += 1
            raise Stopped
        return result


def whole(output: Path) -> None:
    """Every manifest that is there tells of files that are whole."""
    for path in output.glob("round-*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        assert finished(path.parent, manifest.inputs) == manifest, path


def interrupted(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool = False, **keys: Any
) -> Events:
    """Go on as often as it takes; compare with a run that nothing stopped."""
    quiet = Bench(tmp_path / "whole", bench.model)
    quiet.write(**keys)
    quiet.run()
    log = tmp_path / "asked.log"
    log.touch()
    bench.write(**keys)
    with monkeypatch.context() as patch:
        patch.setenv("ORACLE_LOG", str(log))
        events = Events(log, before, patch)
        while True:
            try:
                assert bench.iterate() == 0
                break
            except Stopped:
                whole(bench.output)
    assert events.stops > 50
    assert results(bench.output) == results(quiet.output)
    assert {str(path.relative_to(bench.output)) for path in bench.output.rglob("*")} == {
        str(path.relative_to(quiet.output)) for path in quiet.output.rglob("*")
    }
    return events


def asked(log: Path, lost: list[int]) -> list[tuple[str, frozenset[str]]]:
    """Every comparison that the oracle was asked for, without the batches whose answers a stop took away."""
    calls = [json.loads(line) for number, line in enumerate(log.read_text().splitlines()) if number not in lost]
    return [(prompt, frozenset(texts)) for _, *given in calls for prompt, *texts in zip(*given, strict=True)]


def test_stopped_around_every_event_of_a_round_it_ends_at_the_same_bytes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked again is the batch that was answered and not kept, once for each such stop, and nothing else."""
    events = interrupted(bench, tmp_path, monkeypatch, **ONE_ROUND)
    done = asked(tmp_path / "asked.log", events.lost)
    assert len(events.lost) >= 4 and len(done) == len(set(done)) > 0
    names = {event[0] for event in events.seen}
    assert {"replace", "rename", "keep", "rmdir"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_stopped_around_every_event_of_two_rounds_it_ends_at_the_same_bytes(
    keys: dict[str, Any], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = interrupted(bench, tmp_path, monkeypatch, before=True, **TWO_ROUNDS, **keys)
    done = asked(tmp_path / "asked.log", events.lost)
    assert len(done) == len(set(done)) > 0
    weights = "adapter_model.safetensors" if keys else "model.safetensors"
    assert ("unlink", f"out/round-1/train/{weights}") in events.seen, "nothing was pruned"
