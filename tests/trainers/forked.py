"""Runs in forked processes, which have imported everything already, one or two that know each other; and signals."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

FORKING = multiprocessing.get_context("fork")


def in_a_child(
    work: Callable[..., None], *given: Any, environment: dict[str, str] | None = None, log: Path | None = None
) -> Any:
    """Some work in a forked process, with no trace of this one's accelerator."""

    def inside() -> None:
        if log is not None:
            file = log.open("a", buffering=1)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            logging.basicConfig(stream=file, level=logging.WARNING, force=True)
        gc.freeze()
        os.environ.update(environment or {})
        AcceleratorState._reset_state(reset_partial_state=True)
        work(*given)

    child = FORKING.Process(target=inside)
    child.start()
    return child


def on_two(log: Path, work: Callable[..., None], *given: Any) -> None:
    """Let two processes work that know each other, and wait for their good end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2)]
    children = [in_a_child(work, *given, environment=rank, log=log) for rank in ranks]
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0], log.read_text()[-4000:]


def on_one(log: Path, work: Callable[..., None], *given: Any) -> None:
    """Let one process work, and wait for its good end."""
    child = in_a_child(work, *given, log=log)
    child.join(300)
    assert child.exitcode == 0, log.read_text()[-4000:]


class Signalled(TrainerCallback):
    """Sends this process SIGTERM when the trainer is at an event of a step, as often as it is told."""

    def __init__(self, event: str, step: int, times: int = 1) -> None:
        self.step, self.times, self.seen = step, times, 0
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.seen:
            self.seen += 1
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)
