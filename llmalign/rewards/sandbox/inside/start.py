"""The first code in a sandbox: take the pipes away from standard input and output, set the limits, say ready."""

import posix
import sys

from llmalign.rewards.sandbox.inside.confine import landlock, set_limits
from llmalign.rewards.sandbox.inside.wire import read_frame, read_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def start() -> "tuple[int, int, dict[str, Any]]":
    """(pipe to read, pipe to write, job): the job is the first message, a literal dict from the trusted side."""
    reader, writer = posix.dup(0), posix.dup(1)
    null = posix.open("/dev/null", posix.O_RDWR)
    for standard in (0, 1, 2):
        posix.dup2(null, standard)
    if null > 2:
        posix.close(null)
    sys.path[:] = [folder for folder in sys.path if folder]
    job = read_value(read_frame(reader).decode("ascii"), _no_refs)
    set_limits(job["memory"], job["seconds"], job["files"], job["threads"])
    if job["landlock"] is not None:
        landlock(*job["landlock"])
    return reader, writer, job


def _no_refs(*parts: object) -> None:
    raise ValueError("a job holds no objects")
