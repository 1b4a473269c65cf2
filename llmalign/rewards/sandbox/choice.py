"""Which lock this machine can offer, each one tried before it is trusted."""

import logging
import os
import shutil
from functools import lru_cache

from llmalign.errors import UserError
from llmalign.rewards.sandbox.backends import ENVIRONMENT, Backend
from llmalign.rewards.sandbox.filters import seccomp_program
from llmalign.rewards.sandbox.interpreter import find_interpreter
from llmalign.rewards.sandbox.pair import Job, SandboxError, run_pair

logger = logging.getLogger(__name__)

PROGRAM = """
import os, sys

def leaks(ours, parent):
    found = []
    def attempt(what, action):
        try:
            action()
        except (OSError, AttributeError):
            return
        found.append(what)
    def connect():
        import _socket
        _socket.socket().connect(("127.0.0.1", 9))
    if os.getuid() == 0:
        found.append("runs as root")
    attempt("reads /etc/passwd", lambda: open("/etc/passwd").read())
    attempt("reads the environment of others", lambda: open("/proc/%d/environ" % parent, "rb").read())
    attempt("writes to a folder of the system", lambda: open(ours + "/probe", "w"))
    attempt("signals the process that started it", lambda: os.kill(parent, 0))
    attempt("opens sockets", connect)
    return found
"""


def find_backend(name: str | None = None, *, allow_unsafe_execution: bool = False) -> Backend:
    """The first of bubblewrap and Landlock that is tried and holds on this machine, or the one named.

    name: bubblewrap, landlock or None. Without protection code is run only where `allow_unsafe_execution` is set, and
    then only where neither works. Raises UserError, with what is in the way of each, otherwise.
    """
    if name not in (None, "bubblewrap", "landlock"):
        raise UserError(f"There is no sandbox called {name!r}; choose bubblewrap, landlock, or None for what works.")
    reasons = []
    for candidate in [name] if name else ["bubblewrap", "landlock"]:
        found = _tried(candidate)
        if isinstance(found, Backend):
            return found
        reasons.append(f"{candidate}: {found}")
    if allow_unsafe_execution:
        return _unsafe("; ".join(reasons))
    raise UserError(
        f"Model-written code cannot be locked in on this machine ({'; '.join(reasons)}). Install bubblewrap, or set "
        "allow_unsafe_execution to run it with this process's rights."
    )


@lru_cache(maxsize=1)
def _unsafe(reasons: str) -> Backend:
    logger.warning("Model-written code runs WITHOUT a sandbox, with this process's own rights (%s).", reasons)
    return Backend("unsafe", find_interpreter(False), False, None)


@lru_cache(maxsize=2)
def _tried(name: str) -> Backend | str:
    """The backend once a probe has shown that it holds, or the reason why it does not."""
    root = os.geteuid() == 0
    needed = (["setpriv"] if root else []) + (["bwrap"] if name == "bubblewrap" else [])
    missing = [tool for tool in needed if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    program = seccomp_program()
    if name == "landlock" and program is None:
        return "the system calls of this processor are not listed"
    try:
        backend = Backend(name, find_interpreter(root), root, program)
    except UserError as error:
        return str(error)
    return _leaks(backend) or backend


def _leaks(backend: Backend) -> str:
    """Empty where the sandbox answers and holds, else a clause that says what is wrong."""
    tests = f"FOUND = leaks('/var/tmp', {os.getpid()})\nassert FOUND == [], ', '.join(FOUND)"
    try:
        report = run_pair(backend, Job(PROGRAM, tests, "leaks", "", timeout_s=10, memory_mb=256))
    except SandboxError as error:
        return str(error)
    return "" if report.passed == 1 else f"a trial failed ({report.error})"
