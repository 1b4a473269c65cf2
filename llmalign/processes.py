"""What the processes of one run do together: tell each other what happened, fail, and part."""

import contextlib
import gc
import math
import time
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available

from llmalign.errors import UserError

T = TypeVar("T")
SHOWN_WITHIN = 60.0  # seconds that a network file system may take to show a file


def from_all_processes(own: T) -> list[T]:
    """What every process passed, in the order of their ranks; all call it together."""
    if not _in_a_group():
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def from_first_process(work: Callable[[], T]) -> T:
    """What `work`, which must not raise, gives on the first process, on all of them; all call this together."""
    if not _in_a_group():
        return work()
    own: Any = work() if torch.distributed.get_rank() == 0 else None
    return from_all_processes(own)[0]


def fail_together(fault: str | None) -> None:
    """Raise UserError on every process where any of them has a `fault`; all call it together.

    An error that one process raised alone would leave the others waiting for it in their next exchange.
    """
    raise_first(from_all_processes(fault))


def raise_first(faults: list[str | None]) -> None:
    """Raise UserError with the first fault of `from_all_processes`, if there is one."""
    for rank, fault in enumerate(faults):
        if fault is not None:
            raise UserError(fault if len(faults) == 1 else f"process {rank}: {fault}")


def require_same(own: str | None, what: str) -> None:
    """Raise UserError on every process where they do not all have the same hash of something; all call it together."""
    everyone = from_all_processes(own)
    other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} has other {what} than process 0: give every host the same files, recipe and versions"
        )


def lowest_of_all(values: np.ndarray, device: torch.device) -> np.ndarray:
    """For each of N numbers (N,) the lowest that any process has, NaN where none has one; all call it together."""
    if not _in_a_group():
        return values
    known = torch.from_numpy(values).to(device)
    known = known.masked_fill(known.isnan(), math.inf)
    torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MIN)
    return known.masked_fill(known.isinf(), math.nan).cpu().numpy()


def require_shared(folder: Path) -> None:
    """Raise UserError on every process where one does not see what the first one writes into a folder.

    All call it together. Where the first one cannot write there nothing is looked at: whoever writes next says so.
    """
    if not _in_a_group():
        return
    mark, made = _mark(folder) if torch.distributed.get_rank() == 0 else (None, [])
    shown = from_all_processes(mark)[0]
    everyone_saw = from_all_processes(shown is None or _appears(shown))
    if mark is not None:
        mark.unlink()
        _remove(made)
    from_all_processes(None)  # nothing is left of it when the others go on
    if not all(everyone_saw):
        raise UserError(
            f"process {everyone_saw.index(False)}: it does not see what process 0 writes into {folder}; give an "
            "output_dir that all hosts share (a network file system, mounted at the same path)"
        )


def _mark(folder: Path) -> tuple[Path | None, list[Path]]:
    """A new empty file in a folder, and which folders had to be made for it, the innermost first."""
    made: list[Path] = []
    mark = folder / f".seen-by-all-{uuid.uuid4().hex}"
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        _remove(made)
        return None, []
    return mark, made


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not there, or another run has put something in it
            folder.rmdir()


def _appears(path: Path) -> bool:
    """Whether a file is there; network file systems show it late."""
    latest = time.monotonic() + SHOWN_WITHIN
    while not path.exists():
        if time.monotonic() > latest:
            return False
        time.sleep(0.5)
    return True


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def load_group_users() -> None:
    """Import what keeps, as a default argument, the process group that is there when it is imported: none yet."""
    import_module("torch.distributed.nn.functional")
    if is_deepspeed_available():
        import_module("deepspeed.comm.torch")


def end_processes(*, together: bool) -> None:
    """End the process group, if there is one: an interpreter that exits while gloo's threads run can abort.

    `together` waits for the others first, so that none leaves while another still talks to it; False is for a process
    that failed, which the others may never meet. The threads end with the last reference to the group: drop the
    trainer first, and call `load_group_users` before the group is made. Not covered: the groups that DeepSpeed's
    engine keeps until the interpreter exits.
    """
    if not _in_a_group():
        return
    state = PartialState()
    if together:
        state.wait_for_everyone()
    gc.collect()  # a wrapped model lies in reference cycles and holds the group
    state.destroy_process_group()
