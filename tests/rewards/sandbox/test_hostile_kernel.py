"""Attacks through what the kernel offers beside files and processes: signals of files, terminals, locks, links."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.rewards.sandbox.attempts import attempt


def test_signals_through_files(backend: str, witness: subprocess.Popen[bytes]) -> None:
    """The owner of a file is sent a signal of choice when data comes; older kernels let it be any process."""
    program = """
import fcntl, os, socket, struct
F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN = 8, 10, 15, 0x8901
def attack(victims):
    one, other = socket.socketpair()
    done = False
    for victim in victims:
        for change in (
            lambda: fcntl.fcntl(one, F_SETOWN, victim),
            lambda: fcntl.fcntl(one, F_SETSIG, 9),
            lambda: fcntl.fcntl(one, F_SETOWN_EX, struct.pack("ii", 1, victim)),
            lambda: fcntl.ioctl(one, FIOSETOWN, struct.pack("i", victim)),
        ):
            try:
                change()
                done = True
            except OSError:
                pass
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
    other.send(b"x")
    return done
"""
    attempt(program, backend, [witness.pid, os.getpid()])


@pytest.mark.parametrize("request_name", ["TIOCSTI", "TIOCLINUX", "TIOCSCTTY", "FIOASYNC"])
def test_typing_into_a_terminal(backend: str, request_name: str) -> None:
    program = f"""
import fcntl, termios
def attack():
    for file in range(8):
        try:
            fcntl.ioctl(file, termios.{request_name}, b"x")
            return True
        except OSError as error:
            if error.errno not in (1, 9):
                return True
    return False
"""
    attempt(program, backend)


@pytest.mark.parametrize("how", ["symlink('x' * 120, path)", "link('/dev/null', path)", "mkfifo(path)", "mknod(path)"])
def test_links_and_special_files(backend: str, how: str) -> None:
    program = f"""
import os
def attack():
    done = 0
    for folder in ("/tmp", "/dev", "/dev/shm", "/", "/etc", os.getcwd()):
        for number in range(1000):
            path = f"{{folder}}/{{number}}"
            try:
                os.{how}
                done += 1
            except OSError:
                break
    return done > 0
"""
    attempt(program, backend)


def test_kernel_memory_by_locks(backend: str) -> None:
    program = """
import fcntl, os
def attack():
    with open(os.__file__, "rb") as file:
        fcntl.lockf(file, fcntl.LOCK_SH, 1, 7)
    return True
"""
    assert "PermissionError" in (attempt(program, backend) or "")


def test_installed_packages_cannot_be_read(backend: str) -> None:
    """A benchmark among them would hold the values that its tests expect."""
    found = [path for path in Path("/usr").glob("l*/**/*-packages/*") if path.is_file() or path.is_dir()][:50]
    if not found:
        pytest.skip("no package is installed below /usr")
    program = """
import os
def attack(paths):
    done = 0
    for path in paths:
        try:
            done += len(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1))
        except OSError:
            pass
    return done > 0
"""
    files = [str(path) for folder in found for path in (folder.rglob("*.py") if folder.is_dir() else [folder])][:200]
    attempt(program, backend, files)


def test_becoming_another_python(backend: str) -> None:
    """It would speak for the answer and no more."""
    program = """
import os, sys
MESSAGES = bytes([0, 0, 0, 3]) + b"P1 " + bytes([0, 0, 0, 1]) + b"V"
SPEAK = f"import os; [os.write(n, {MESSAGES!r}) for n in (3, 4) if not os.set_blocking(n, False)]"
def attack():
    for file in range(3, 8):
        try:
            os.set_inheritable(file, True)
        except OSError:
            pass
    os.execv("/usr/bin/python3", ["python3", "-c", SPEAK])
"""
    attempt(program, backend, timeout_s=3)
