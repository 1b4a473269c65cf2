"""What locks a sandbox on this machine: bubblewrap, or Landlock with seccomp, or nothing where that is allowed.

Nothing inside ever runs as root: the user id is given up before anything else, because the kernel does not count the
processes of user 0 against their limit. With bubblewrap the inside has its own process, network, mount and IPC
namespaces, /usr and the interpreter read-only, a /tmp of its own of limited size, no /proc, no /etc and no
environment; with Landlock it may read the interpreter and the system's libraries and write nowhere. In both installed
packages are hidden, and a seccomp filter (x86_64, aarch64) allows no new process, no socket, no signal and no links.
"""

import itertools
import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmalign.rewards.sandbox.inside.confine import READ_DIR, READ_FILE
from llmalign.rewards.sandbox.interpreter import Interpreter

TMP_BYTES = 16 * 1024 * 1024
THREADS = 40  # a pool of 32, and what starts them
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "MALLOC_ARENA_MAX": "1",  # an arena of each thread would take 64 MiB of addresses from the memory limit
}
# Users that no one logs in as, each sandbox another one: two at once share no limit and may not touch each other. The
# start differs between trainers on one machine.
FIRST_UID, UIDS = 61184, 4096
_turn = itertools.count(random.SystemRandom().randrange(UIDS))


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
            landlock = (_landlock_rights(self.interpreter.folders), self.seccomp, os.getpid())
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
    for folder in _packages(("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", *interpreter.folders)):
        options += ["--tmpfs", folder, "--remount-ro", folder]
    for device in ("/dev/null", "/dev/urandom"):
        options += ["--dev-bind", device, device]
    return [*options, "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


@lru_cache(maxsize=2)
def _packages(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Folders of installed packages below: a benchmark may be among them, with the values that its tests expect."""
    kinds = ("site-packages", "dist-packages")
    found = (path for root in roots for kind in kinds for path in Path(root).glob(f"python*/{kind}") if path.is_dir())
    return tuple(sorted({os.path.realpath(path) for path in found}))


@lru_cache(maxsize=2)
def _landlock_rights(folders: tuple[str, ...]) -> dict[str, int]:
    """Rights on paths: reading what the interpreter needs, and the mere names of what is hidden beside it."""
    system = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64")
    roots = tuple(sorted({os.path.realpath(folder) for folder in (*folders, *system) if os.path.isdir(folder)}))
    hidden = _packages(roots)
    rights: dict[str, int] = {}
    waiting = list(roots)
    while waiting:
        folder = waiting.pop()
        if folder in hidden:
            continue
        if not any(other.startswith(f"{folder}/") for other in hidden):
            rights[folder] = READ_FILE | READ_DIR
            continue
        rights[folder] = READ_DIR
        for entry in os.scandir(folder):  # a rule for a link would be one for what it points at
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                rights[entry.path] = READ_FILE
    return rights
