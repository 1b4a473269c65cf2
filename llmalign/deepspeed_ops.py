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
LONGEST = 180.0  # seconds for which an operation is compiled on a slow machine
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
    """Remove a lock that no process of this machine holds open any more; whether there was one. Only Linux can tell.

    Another machine, or a container, that has the same folder may be compiling: a lock is waited for until it is older
    than a compilation takes.
    """
    if not Path("/proc").is_dir():
        return False
    said = False
    while (age := _age(lock)) is not None and not _is_open(lock):
        if age >= LONGEST:
            lock.unlink(missing_ok=True)
            return True
        if not said:
            logger.info(
                "%s is there, and no process of this machine has it: it is waited for until it is %.0f s old.",
                lock, LONGEST,
            )  # fmt: skip
            said = True
        time.sleep(1)
    return False


def _age(path: Path) -> float | None:
    """Seconds since a file was written, None where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that ended meanwhile, or another user's
            if any(descriptor.resolve() == path.resolve() for descriptor in (process / "fd").iterdir()):
                return True
    return False


def path_with_ninja() -> str:
    """PATH with this Python's own programs in front: compiled by another ninja, all is compiled again each time."""
    own = sysconfig.get_path("scripts")
    return os.pathsep.join([own, *(part for part in os.environ.get("PATH", "").split(os.pathsep) if part != own)])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": path_with_ninja()}
    build(on_cpu=True, offload="--offload" in sys.argv[1:])
