"""Which sandbox is chosen, what is said where none works, and bubblewrap where no system calls can be filtered."""

import dataclasses
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from llmalign.errors import UserError
from llmalign.rewards.code import CodeReward, TestResult, run_tests
from llmalign.rewards.sandbox import choice
from llmalign.rewards.sandbox.pair import Job, SandboxError, run_pair

TESTS = "assert half(4) == 2\nassert half(4) == 3"
HALF = "def half(x):\n    return x / 2"


@pytest.fixture
def nothing_works(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "_tried", lambda name: "not here")
    choice._unsafe.cache_clear()
    yield
    choice._unsafe.cache_clear()


def test_bubblewrap_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tried(name: str) -> str:
        asked.append(name)
        return "no"

    monkeypatch.setattr(choice, "_tried", tried)
    with pytest.raises(UserError, match="bubblewrap: no; landlock: no"):
        choice.find_backend()
    assert asked == ["bubblewrap", "landlock"]


@pytest.mark.usefixtures("nothing_works")
def test_without_a_sandbox_it_refuses() -> None:
    with pytest.raises(UserError, match="allow_unsafe_execution"):
        run_tests(HALF, TESTS, "half")
    with pytest.raises(UserError, match="allow_unsafe_execution"):
        CodeReward()


@pytest.mark.usefixtures("nothing_works")
def test_unsafe_execution_has_to_be_asked_for_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run_tests(HALF, TESTS, "half", allow_unsafe_execution=True)
    assert result == TestResult(1, 2, "Test 2 of 2: AssertionError")
    assert "WITHOUT a sandbox" in caplog.text
    loop = run_tests("def half(x):\n    while True: pass", TESTS, "half", timeout_s=0.5, allow_unsafe_execution=True)
    assert "Timeout" in (loop.error or "")


def test_unsafe_execution_is_not_used_where_a_sandbox_works(some_backend: str) -> None:
    assert choice.find_backend(allow_unsafe_execution=True).name == some_backend


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.shutil, "which", lambda tool, path=None: None)
    choice._tried.cache_clear()
    try:
        with pytest.raises(UserError, match="bwrap not installed"):
            choice.find_backend("bubblewrap")
    finally:
        choice._tried.cache_clear()


def test_a_sandbox_that_does_not_start_is_no_score(backend: str) -> None:
    found = choice.find_backend(backend)
    broken = dataclasses.replace(found, interpreter=dataclasses.replace(found.interpreter, executable="/usr/bin/false"))
    with pytest.raises(SandboxError, match="did not start"):
        run_pair(broken, Job(HALF, TESTS, "half", "", 5, 256))


@pytest.mark.parametrize(
    "attack",
    [
        "import os\n    while True:\n        os.fork()",
        "import os\n    os.kill({parent}, 9)\n    return True",
        "import socket\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return True",
        "return open('/proc/{parent}/environ', 'rb').read()",
        "return open('/etc/passwd').read()",
        "import os\n    os.setsid()\n    return os.getuid() == 0",
    ],
    ids=["fork bomb", "kill", "connect", "proc", "passwd", "root"],
)
def test_namespaces_hold_without_the_filter(attack: str) -> None:
    """On processors whose calls are not listed bubblewrap runs with namespaces and limits alone."""
    try:
        bare = dataclasses.replace(choice.find_backend("bubblewrap"), seccomp=None)
    except UserError as error:
        pytest.skip(str(error))
    with socket.create_server(("127.0.0.1", 0)) as server:
        body = attack.format(parent=os.getpid(), port=server.getsockname()[1])
        job = Job(f"def f():\n    {body}\n", "assert f()", "f", "", timeout_s=2, memory_mb=256)
        assert run_pair(bare, job).passed == 0


def test_several_pairs_at_once_do_not_meet(backend: str) -> None:
    reward = CodeReward(workers=4, backend=backend)
    programs = [f"def f():\n    return {n}" if n % 3 else "def f():\n    while True: pass" for n in range(12)]
    columns = {"tests": [f"assert f() == {n}" for n in range(12)], "entry_point": ["f"] * 12}
    reward.options["timeout_s"] = 2
    assert reward(["p"] * 12, programs, None, **columns) == [float(n % 3 != 0) for n in range(12)]
