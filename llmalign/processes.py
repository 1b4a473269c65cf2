"""How the processes of one run part: together, and with no thread of the process group left behind."""

import gc

import torch.distributed
import torch.distributed.nn.functional  # noqa: F401  # its defaults keep a group for good that exists before its import
from accelerate import PartialState


def end_processes(*, together: bool) -> None:
    """End the process group, if there is one: gloo's threads can abort an interpreter that exits while they run.

    `together` waits for the others first, so that none leaves while another still talks to it; say False where this
    process failed, since the others may never come. Threads are gone where nothing holds the group any more: drop the
    trainer first. Not covered: DeepSpeed, which keeps groups of its own until the interpreter exits.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    state = PartialState()
    if together:
        state.wait_for_everyone()
    gc.collect()  # a wrapped model lies in reference cycles and holds the group
    state.destroy_process_group()
