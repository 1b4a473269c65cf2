"""Compiles the operations that DeepSpeed needs, once and aloud: `python -m llmalign.deepspeed_ops [--offload]`.

DeepSpeed compiles them itself in the first run, silently, for two minutes; and one that is killed meanwhile leaves a
file for which every later run waits for ever.
"""

import contextlib
import logging
import os
import sys
import sysconfig
import time
from pathlib import Path

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "lock"  # torch's own, beside a compiled operation
COMMUNICATION, ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"


def build(*, on_cpu: bool, offload: bool) -> None:
    """Compile what a run on the CPU (its communication) or with offload (Adam on the CPU) needs, unless it is there.

    Raises UserError where it cannot be compiled, with what is missing.
    """
    names = [COMMUNICATION] * on_cpu + [ADAM] * offload
    if not names:
        return
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    for name in names:
        builder = get_accelerator().create_op_builder(name)
        folder = Path(_get_build_directory(builder.name, False))
        if free_from_dead(folder / LOCK):
            logger.warning("%s was left by a run that was killed while it compiled; it is removed.", folder / LOCK)
        if not (folder / f"{builder.name}.so").is_file():
            logger.info("DeepSpeed compiles %s in %s: once, a minute or two.", builder.name, folder)
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                builder.load(verbose=False)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"DeepSpeed's {builder.name} cannot be compiled ({reason}); it needs g++ and ninja (pip install ninja)"
            ) from error
        logger.debug("%s was there after %.1f s.", builder.name, time.perf_counter() - started)


def free_from_dead(lock: Path) -> bool:
    """Remove a lock that no process holds open any more, and say whether there was one. Only Linux can tell."""
    descriptors = Path("/proc")
    if not lock.is_file() or not descriptors.is_dir():
        return False
    for descriptor in descriptors.glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a process that ended meanwhile, or another user's
            if descriptor.resolve() == lock.resolve():
                return False
    lock.unlink(missing_ok=True)
    return True


def path_with_ninja() -> str:
    """PATH with this Python's own programs in front: compiled by another ninja, all is compiled again each time."""
    own = sysconfig.get_path("scripts")
    return os.pathsep.join([own, *(part for part in os.environ.get("PATH", "").split(os.pathsep) if part != own)])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": path_with_ninja()}
    build(on_cpu=True, offload="--offload" in sys.argv[1:])
