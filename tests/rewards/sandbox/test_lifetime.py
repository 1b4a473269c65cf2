"""Nothing outlives a run: not where a sandbox is killed while it starts, nor where the process that trains is."""

import os
import random
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.rewards.code import run_tests
from llmalign.rewards.sandbox import interpreter
from llmalign.rewards.sandbox.choice import find_backend
from llmalign.rewards.sandbox.pair import Job, _Pair

SLEEPER = """
import time
def f():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
"""
PROMPT = "def h(x):\n    return x\n\ndef f(x):\n    '''The same.'''\n"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """What is in the command line of every process of this test's sandboxes, and of no other's on the machine."""
    mark = f"# test {secrets.token_hex(8)}"
    monkeypatch.setattr(interpreter, "BOOT", f"{interpreter.BOOT}{mark}\n")
    return mark


def running(mark: str) -> set[str]:
    """Processes of sandboxes: an interpreter carries its boot code in its command line, and so does what starts it."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.add(entry.name)
        except OSError:
            continue
    return found


def assert_nothing_left(mark: str) -> None:
    deadline = time.monotonic() + 20
    while (left := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def in_a_call(backend: str) -> None:
    assert "Timeout" in (run_tests(SLEEPER, "assert f()", "f", timeout_s=0.3, backend=backend).error or "")


def while_helpers_start(backend: str) -> None:
    """The answer's error ends the tests at once, with the third sandbox on its way."""
    tests = "def check(candidate):\n    assert candidate(3) == h(3)\n"
    for _ in range(20):
        assert run_tests(f"{PROMPT}    return 1 / 0\n", tests, "f", prompt=PROMPT, backend=backend).passed == 0


def while_both_start(backend: str) -> None:
    """Killed after 0 to 30 ms: bubblewrap's first process may then have a child that waits for it."""
    delays = random.Random(0)
    for _ in range(80):
        pair = _Pair(find_backend(backend), Job("", "", "f", "", timeout_s=1, memory_mb=256))
        pair._open("answer", {"program": ""})
        time.sleep(delays.uniform(0, 0.03))
        pair.close()


def by_its_own_end(backend: str) -> None:
    program = "import os\nos._exit(0)\n"
    assert run_tests(program, "assert f() == 1", "f", backend=backend).passed == 0


@pytest.mark.parametrize("how", [in_a_call, while_helpers_start, while_both_start, by_its_own_end])
def test_nothing_is_left_running(backend: str, mark: str, how: Callable[[str], None]) -> None:
    how(backend)
    assert_nothing_left(mark)


def test_a_running_sandbox_is_seen(backend: str, mark: str) -> None:
    """Else the tests here could not fail."""
    pair = _Pair(find_backend(backend), Job("", "", "f", "", timeout_s=1, memory_mb=256))
    pair._open("answer", {"program": ""})
    deadline = time.monotonic() + 20
    while not (seen := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.01)
    pair.close()
    assert seen
    assert_nothing_left(mark)


def test_sandboxes_end_with_the_process_that_trains(backend: str, mark: str, repository: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(repository)!r})
        from llmalign.rewards.code import run_tests
        from llmalign.rewards.sandbox import interpreter
        interpreter.BOOT += {mark!r}
        run_tests({SLEEPER!r}, "assert f()", "f", backend={backend!r}, timeout_s=60)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 30
    while not running(mark):
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # until they have started
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert_nothing_left(mark)
