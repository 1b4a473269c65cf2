"""What locks a sandbox on this machine: bubblewrap, or Landlock with seccomp, or nothing where that is allowed.

Nothing inside ever runs as root: the user id is given up before anything else, because the kernel does not count the
processes of user 0 against their limit. With bubblewrap the inside has its own process, network, mount and IPC
namespaces, /usr and the interpreter read-only, a /tmp of its own of limited size, no /proc, no /etc and no
environment; with Landlock it may read /usr and the interpreter and write nowhere. In both a seccomp filter (x86_64,
aarch64) allows no new process, no socket and no signal.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.rewards.sandbox.interpreter import Interpreter

TMP_BYTES = 16 * 1024 * 1024
THREADS = 32
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
# Users that no one logs in as, each sandbox another one: two at once share no limit and may not touch each other.
FIRST_UID, UIDS = 61184, 4096
_turn = itertools.count()


@dataclass(frozen=True)
class Backend:
    """A way to start one interpreter under lock; `name` is bubblewrap, landlock or unsafe."""

    name: str
    interpreter: Interpreter
    as_other_user: bool
    seccomp: bytes | None

    def command(self, role: str, seccomp_fd: int | None) -> list[str]:
        """The command line for one sandbox; the filter is read from `seccomp_fd` by bubblewrap."""
        command = []
        if self.as_other_user:
            user = FIRST_UID + next(_turn) % UIDS
            command += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--"]
        if self.name == "bubblewrap":
            command += ["bwrap", *_bubblewrap_options(self.interpreter)]
            command += ["--seccomp", str(seccomp_fd), "--"] if seccomp_fd is not None else ["--"]
        return command + self.interpreter.command(role)

    def confinement(self) -> dict[str, Any]:
        """What the inside has to do to itself, as part of its job."""
        landlock = None
        if self.name == "landlock":
            readable = ["/usr", *self.interpreter.folders, *(f for f in ("/lib", "/lib64") if Path(f).is_dir())]
            landlock = (tuple(dict.fromkeys(readable)), self.seccomp)
        counted = self.name == "bubblewrap" or self.as_other_user  # else it would count the user's own processes too
        return {"files": TMP_BYTES, "threads": THREADS if counted else None, "landlock": landlock}


def _bubblewrap_options(interpreter: Interpreter) -> list[str]:
    options = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    options += ["--ro-bind", "/usr", "/usr"]
    for folder in ("/lib", "/lib64", "/lib32"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in interpreter.folders:
        if not folder.startswith("/usr/"):
            options += ["--ro-bind", folder, folder]
    for device in ("/dev/null", "/dev/urandom"):
        options += ["--dev-bind", device, device]
    return [*options, "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
