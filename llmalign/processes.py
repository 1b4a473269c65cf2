"""How the processes of one run part: together, and with no thread of their process group left behind."""

import gc
from importlib import import_module

import torch.distributed
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available


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
