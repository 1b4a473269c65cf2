"""What the processes of one run do together: tell each other what happened, fail, and part."""

import gc
from importlib import import_module
from typing import Any, TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available

from llmalign.errors import UserError

T = TypeVar("T")


def from_all_processes(own: T) -> list[T]:
    """What every process passed, in the order of their ranks; all call it together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


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
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    state = PartialState()
    if together:
        state.wait_for_everyone()
    gc.collect()  # a wrapped model lies in reference cycles and holds the group
    state.destroy_process_group()
