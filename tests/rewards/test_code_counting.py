"""What counts as a test, and that none passes in which nothing was put to the proof."""

import pytest

from llmalign.rewards.code import TestResult, run_tests

pytestmark = pytest.mark.usefixtures("some_backend")

HALF = "def half(x):\n    return x / 2\n"
WRONG = "def half(x):\n    return 0\n"
CHECK = "def check(candidate):\n    assert candidate(4) == 2\n"

RUN = {
    "in the main part": ("if __name__ == '__main__':\n    assert half(4) == 2", 1),
    "check in an if": ("if True:\n    def check(candidate):\n        assert candidate(4) == 2", 1),
    "check in a try": (
        "try:\n    def check(candidate):\n        assert candidate(4) == 2\nexcept Exception:\n    pass",
        1,
    ),
    "check called in the main part": (f"{CHECK}if __name__ == '__main__':\n    check(half)", 1),
    "check called in a loop": (f"{CHECK}for candidate in [half]:\n    check(candidate)", 1),
    "check called by another name": (f"{CHECK}again = check\nx = again(half)", 1),
    "a function that is called": ("def test_half():\n    assert half(4) == 2\ntest_half()", 1),
    "a function that calls one": (
        "def same(x, y):\n    assert x == y\ndef test_half():\n    same(half(4), 2)\ntest_half()\nsame(half(8), 4)",
        2,
    ),
    "a method that is called": ("class T:\n    def test(self):\n        assert half(4) == 2\nt = T()\nt.test()", 1),
    "in a class": ("class T:\n    assert half(4) == 2", 1),
    "check without an assert": (
        "def check(candidate):\n    if candidate(4) != 2:\n        raise AssertionError('not 2')",
        1,
    ),
    "check with unittest": (
        "import unittest\ndef check(candidate):\n    unittest.TestCase().assertEqual(candidate(4), 2)",
        1,
    ),
}


@pytest.mark.parametrize("tests, total", RUN.values(), ids=RUN.keys())
def test_asserts_that_run_are_counted(tests: str, total: int) -> None:
    assert run_tests(HALF, tests, "half") == TestResult(total, total, None)
    assert run_tests(WRONG, tests, "half").passed == 0


NOT_RUN = {
    "a loop over nothing": "for x in range(0):\n    assert half(4) == 99",
    "a branch not taken": "if half(4) == 99:\n    assert half(4) == 99",
    "a loop over the answer's values": "for x in [half] * int(half(0)):\n    assert x(4) == 99",
    "check is replaced": f"{CHECK}def check(candidate):\n    pass",
    "check returns before": "def check(candidate):\n    return\n    assert candidate(4) == 99",
    "a function that returns before": "def t():\n    return half(2)\n    assert half(4) == 99\nt()",
}


@pytest.mark.parametrize("tests", NOT_RUN.values(), ids=NOT_RUN.keys())
def test_asserts_that_nothing_reaches_prove_nothing(tests: str) -> None:
    assert run_tests(HALF, tests, "half") == TestResult(0, 1, "Test 1 of 1: none of its asserts was reached")


NEVER = {
    "a function": "def test_half():\n    assert half(4) == 99",
    "a function in an if": "if True:\n    def test_half():\n        assert half(4) == 99",
    "a test case": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert half(4) == 99",
    "a test case in an if": (
        "import unittest\nif True:\n    class T(unittest.TestCase):\n        def test(self):\n"
        "            assert half(4) == 99"
    ),
    "a function in a loop": "for _ in range(3):\n    def t():\n        assert half(4) == 99",
}


@pytest.mark.parametrize("tests", NEVER.values(), ids=NEVER.keys())
def test_asserts_in_functions_that_nobody_calls_are_no_tests(tests: str) -> None:
    result = run_tests(HALF, tests, "half")
    assert (result.passed, result.total) == (0, 0)
    assert "no tests" in (result.error or "")


EXPECTS = """
def check(candidate):
    try:
        candidate({argument})
    except {error}:
        return
    assert False
"""


@pytest.mark.parametrize(
    "raised, expected",
    [
        ("raise Negative('no')", "ValueError"),
        ("import json; json.loads('{')", "ValueError"),
        ("b'\\xff'.decode('ascii')", "UnicodeDecodeError"),
        ("next(iter([]))", "StopIteration"),
        ("raise SystemExit(1)", "SystemExit"),
        ("raise Lookup(1, 2)", "KeyError"),
        ("open('/none')", "FileNotFoundError"),
        ("raise Exception('x')", "Exception"),
        ("raise Own('x')", "Exception"),
    ],
)
def test_an_error_that_the_tests_expect(raised: str, expected: str) -> None:
    """Errors of the answer's own classes come under the first built-in class that they are one of."""
    program = f"""
class Negative(ValueError):
    pass
class Lookup(KeyError):
    def __init__(self, a, b):
        super().__init__(a)
class Own(Exception):
    pass
def f(x):
    {raised}
"""
    tests = EXPECTS.format(argument=1, error=expected)
    assert run_tests(program, tests, "f") == TestResult(1, 1, None)
    assert run_tests("def f(x):\n    return x", tests, "f") == TestResult(0, 1, "Test 1 of 1: AssertionError")


@pytest.mark.parametrize(
    "loop",
    [
        "for got, want in zip(map(f, [1, 2]), [1, 2]):\n        assert got == want",
        "assert list(map(f, [1, 2])) == []",
        "assert all(map(f, [1, 2]))",
        "assert [*map(f, [1, 2])] + [f2 for f2 in map(f, [1])] == []",
    ],
)
def test_an_error_that_ends_loops_is_one_to_be_caught(loop: str) -> None:
    """Tests that name StopIteration are raised it, and must not take it for the end of a loop."""
    tests = f"def check(f):\n    try:\n        f(None)\n    except StopIteration:\n        pass\n    {loop}\n"
    result = run_tests("def f(x):\n    raise StopIteration", tests, "f")
    assert result == TestResult(0, 1, "Test 1 of 1: an error of the answer ended a loop of the tests")
    right = "def f(x):\n    if x is None:\n        raise StopIteration\n    return x\n"
    assert run_tests(right, tests, "f").passed == ("[]" not in loop)


def test_the_arguments_of_an_error_cross() -> None:
    tests = (
        "def check(candidate):\n    try:\n        candidate(1)\n    except KeyError as error:\n"
        "        assert error.args == ('x', [2])\n"
    )
    assert run_tests("def f(x):\n    raise KeyError('x', [2])", tests, "f").error is None


@pytest.mark.parametrize("argument", ["lambda x: x", "object()", "len"])
@pytest.mark.parametrize("error", ["Exception", "BaseException", "TypeError"])
def test_an_argument_that_cannot_cross_is_not_the_error_that_tests_expect(
    backend: str, argument: str, error: str
) -> None:
    tests = EXPECTS.format(argument=argument, error=error)
    result = run_tests("def nothing():\n    pass\n", tests, "f", backend=backend)
    assert (result.passed, result.total) == (0, 1)
    assert (result.error or "").startswith("unsupported: an argument of type")


def test_an_answers_own_unsupported_is_an_error_like_any() -> None:
    program = "class Unsupported(Exception):\n    pass\ndef f(x):\n    raise Unsupported('an argument of type int')"
    result = run_tests(program, "assert f(1) == 2", "f")
    assert result.error == "Test 1 of 1: AnswerError: Unsupported: an argument of type int"


def test_async_functions_are_named() -> None:
    program = "async def f(x):\n    return x\n"
    error = run_tests(program, "import asyncio\nassert asyncio.run(f(3)) == 3", "f").error
    assert (error or "").startswith("unsupported: the answer returned an object of type coroutine (async")
    result = run_tests(program, "async def check(candidate):\n    assert candidate(3) == 3\n", "f")
    assert result == TestResult(0, 0, "unsupported: check is an async function")


def test_a_result_too_large_to_read_is_not_the_answers_error() -> None:
    program = "def f(n):\n    return [[0] * 1000 for _ in range(n)]\n"
    result = run_tests(program, "assert len(f(1000)) == 1000", "f", memory_mb=256, timeout_s=20)
    assert (result.error or "").startswith("unsupported: a result too large")


def test_tests_may_call_from_threads(backend: str) -> None:
    program = "def h(x):\n    return x\ndef f(x):\n    return x\n"
    tests = (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
        "    assert list(pool.map(lambda x: f(x) == h(x), range(200))) == [True] * 200\n"
    )
    assert run_tests(program, tests, "f", backend=backend) == TestResult(1, 1, None)


def test_a_pool_of_threads_fits_into_the_memory(backend: str) -> None:
    program = """
import time
from concurrent.futures import ThreadPoolExecutor
def f(n):
    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(lambda x: (time.sleep(.02), x)[1], range(n)))
"""
    assert run_tests(program, "assert f(64) == 2016", "f", backend=backend).error is None
