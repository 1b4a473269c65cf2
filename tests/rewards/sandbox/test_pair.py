"""What the trusted side allows the two sandboxes: one request at a time, bounded memory, a clock that is fair."""

import dataclasses
import itertools
import subprocess
import sys
import tracemalloc

import pytest

from llmalign.rewards.sandbox import backends, pair
from llmalign.rewards.sandbox.choice import find_backend
from llmalign.rewards.sandbox.pair import Job, Report, run_pair

SLOW = "import time\ntime.sleep(3)\ndef f():\n    return 1\n"


def judged(backend: str, program: str, tests: str, prompt: str = "", timeout_s: float = 5) -> Report:
    return run_pair(find_backend(backend), Job(program, tests, "f", prompt, timeout_s, memory_mb=256))


@pytest.mark.parametrize("size", [16 << 20, 9])
@pytest.mark.parametrize("target", ["A", "H"])
def test_requests_do_not_pile_up(backend: str, target: str, size: int) -> None:
    """Hostile tests write requests that nobody has taken yet, or that nobody will: refused at the second."""
    tests = f"""
import os
data = ({size}).to_bytes(4, "big") + b"{target}" + b" " * ({size} - 1)
for _ in range(20 if {size} > 9 else 200000):
    view = memoryview(data)
    while view:
        view = view[os.write(4, view):]
assert f() == 1
"""
    tracemalloc.start()
    try:
        report = judged(backend, SLOW, tests)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report == Report(0, 1, "The tests broke the protocol.")
    assert peak < 120 << 20


def test_the_start_of_the_helpers_is_not_counted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "def h(x):\n    return x\n\ndef f(x):\n    '''The same.'''\n"
    start, delays = pair._start, itertools.chain([0, 0], itertools.repeat(0.7))

    def slow(*parts: object) -> subprocess.Popen[bytes]:
        pair.time.sleep(next(delays))
        return start(*parts)  # type: ignore[arg-type]

    monkeypatch.setattr(pair, "_start", slow)
    tests = "assert f(3) == h(3)"
    assert judged(backend, f"{prompt}    return x\n", tests, prompt, timeout_s=0.6).error == ""


def test_the_seconds_before_and_after_the_helpers_are(backend: str) -> None:
    prompt = "def h(x):\n    import time\n    time.sleep(9)\n\ndef f(x):\n    '''The same.'''\n"
    report = judged(backend, f"{prompt}    return x\n", "assert f(3) == h(3)", prompt, timeout_s=0.4)
    assert report == Report(0, 1, "Timeout: the tests took longer than 0.4 seconds.")


def test_two_trainers_do_not_share_users(backend: str) -> None:
    """The limit on threads is one of the user: each process starts at another number."""
    code = "from llmalign.rewards.sandbox import backends\nprint(next(backends._turn))"
    first = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(4)
    }
    assert len(first) > 1
    found = dataclasses.replace(find_backend(backend), as_other_user=True)
    users = {next(word for word in found.command("answer", None) if "--reuid" in word) for _ in range(3)}
    assert len(users) == 3
    assert all(backends.FIRST_UID <= int(user.split("=")[1]) < 65520 for user in users)
