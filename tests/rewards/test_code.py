"""What run_tests counts and says, what crosses between the sandboxes, and the reward function made of it."""

import logging
import re
from typing import Any

import pytest

from llmalign.errors import UserError
from llmalign.rewards.code import CodeReward, TestResult, extract_program, run_tests

pytestmark = pytest.mark.usefixtures("some_backend")

HALF = "def half(x):\n    return x / 2\n"


def test_asserts_are_counted_one_by_one(backend: str) -> None:
    tests = "assert half(4) == 2\nassert half(4) == 3\nassert half(5) == 2.5"
    result = run_tests(HALF, tests, "half", backend=backend)
    assert (result.passed, result.total) == (2, 3)
    assert result.error == "Test 2 of 3: AssertionError"


def test_all_passed_has_no_error(backend: str) -> None:
    assert run_tests(HALF, "assert half(4) == 2\nassert half(0) == 0", "half", backend=backend) == TestResult(
        2, 2, None
    )


def test_check_is_one_test_and_is_called_once() -> None:
    tests = "CALLS = []\ndef check(candidate):\n    CALLS.append(1)\n    assert len(CALLS) == candidate(2) == 1\n"
    assert run_tests(HALF, tests + "\ncheck(half)\ncheck(half)\n", "half") == TestResult(1, 1, None)


def test_check_is_called_where_the_tests_do_not_call_it() -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 7\n"
    assert run_tests(HALF, tests, "half") == TestResult(0, 1, "Test 1 of 1: AssertionError")


def test_check_may_call_the_function_by_its_name() -> None:
    tests = "def check(candidate):\n    assert candidate(2) == half(2) == 1\n\ncheck(half)"
    assert run_tests(HALF, tests, "half").error is None


def test_a_loop_of_asserts_is_one_test() -> None:
    assert run_tests(HALF, "for x in (1, 2):\n    assert half(2 * x) == x\nassert half(2) == 2", "half").passed == 1


def test_statements_before_the_asserts_are_run() -> None:
    assert run_tests(HALF, "import math\nx = math.pi\nassert half(2 * x) == x", "half").error is None


def test_a_statement_that_fails_ends_the_tests() -> None:
    result = run_tests(HALF, "assert half(2) == 1\nx = half('a')\nassert half(4) == 2", "half")
    assert (result.passed, result.total) == (1, 2)
    assert result.error is not None and result.error.startswith("A statement before test 2 of 2: TypeError")


@pytest.mark.parametrize(
    "program, said",
    [
        ("def half(x) return", "SyntaxError"),
        ("def other(x):\n    return 0", "the program does not define half"),
        ("import not_installed\n\ndef half(x):\n    return x / 2", "ModuleNotFoundError"),
        ("raise KeyError('no')\n" + HALF, "KeyError"),
        ("half = 3", "not callable"),
        ("def half(x):\n    raise LookupError('at', x)", "LookupError"),
        ("def half(x):\n    return 'two'", "AssertionError"),
        ("", "the program does not define half"),
        ("\0", "null bytes"),
        ("x = '\ud800'", "SyntaxError|surrogate"),
    ],
)
def test_a_program_with_a_fault_fails_and_the_fault_is_named(program: str, said: str) -> None:
    result = run_tests(program, "assert half(4) == 2", "half")
    assert (result.passed, result.total) == (0, 1)
    assert re.search(said, result.error or "")


def test_tests_that_are_not_python_are_named() -> None:
    result = run_tests(HALF, "assert half(4 ==", "half")
    assert (result.passed, result.total) == (0, 0)
    assert (result.error or "").startswith("The tests do not compile: SyntaxError")


def test_no_tests_are_named() -> None:
    assert "no tests" in (run_tests(HALF, "x = 1", "half").error or "")


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "10**6000", "1.5", "-0.0", "float('inf')", "-float('inf')", "1e-320", "3 - 4j",
        "'a\\'b\\n'", "'\\ud800 \\U0001f600'", "b'\\x00\\xff'", "()", "(1,)", "[[], [()]]", "{}",
        "{1: 'a', (2, 3): [4]}", "set()", "{1, 'a'}", "frozenset({1})", "frozenset()", "range(3, 9, 2)",
        "bytearray(b'ab')", "...", "int", "[str, type(None)]",
    ],
)  # fmt: skip
def test_values_cross_both_ways(value: str) -> None:
    program = f"def same(x):\n    assert x == {value} and type(x) is type({value})\n    return x\n"
    tests = f"assert same({value}) == {value}\nassert type(same({value})) is type({value})"
    tests += f"\nassert repr(same({value})) == repr({value})" if "10**" not in value else ""
    assert run_tests(program, tests, "same").error is None


def test_nan_crosses_and_stays_unequal() -> None:
    tests = "x = same(float('nan'))\nassert x != x\nassert same([x])[0] != x\nassert same(complex(x, -0.0)).imag == 0"
    assert run_tests("def same(x):\n    return x", tests, "same").error is None


def test_subclasses_of_built_in_types_cross_as_those() -> None:
    program = (
        "import collections, enum\nclass Colour(enum.IntEnum):\n    RED = 3\nclass Text(str):\n    pass\n"
        "Pair = collections.namedtuple('Pair', 'a b')\n"
        "def give(n):\n    return [collections.Counter('aab'), Colour.RED, Text('t'), Pair(1, 2), "
        "collections.OrderedDict(x=1), collections.defaultdict(list, y=[2])][n]\n"
    )
    wanted = ["{'a': 2, 'b': 1}", "3", "'t'", "(1, 2)", "{'x': 1}", "{'y': [2]}"]
    tests = "\n".join(f"assert give({n}) == {value}" for n, value in enumerate(wanted))
    assert run_tests(program, tests, "give") == TestResult(6, 6, None)


def test_arguments_are_copies_and_keywords_cross() -> None:
    program = "def take(xs, *, last=0):\n    xs.append(last)\n    return xs\n"
    tests = "xs = [1]\nassert take(xs, last=2) == [1, 2]\nassert xs == [1]"
    assert run_tests(program, tests, "take").error is None


@pytest.mark.parametrize("kind", ["ValueError", "KeyError", "ZeroDivisionError", "TypeError", "FileNotFoundError"])
def test_exceptions_cross_by_name(kind: str) -> None:
    tests = (
        f"def check(candidate):\n    try:\n        candidate()\n    except {kind}:\n        return\n    assert False"
    )
    assert run_tests(f"def f():\n    raise {kind}('x')", tests, "f").error is None


def test_what_cannot_cross_is_unsupported_by_name() -> None:
    result = run_tests("def f(g):\n    return g(1)", "assert f(lambda x: x) == 1", "f")
    assert result.error == "unsupported: an argument of type function cannot cross between the sandboxes (test 1 of 1)"
    result = run_tests("from collections import deque\ndef f():\n    return deque([1])", "assert f() == [1]", "f")
    assert result.error is not None and result.error.startswith(
        "unsupported: the answer returned an object of type deque"
    )


NODES = """
class Node:
    def __init__(self, value):
        self.value = value
        self.left = None
    def double(self):
        return 2 * self.value
def depth(node):
    return 0 if node is None else 1 + depth(node.left)
"""


def test_objects_of_the_program_stay_in_its_sandbox(backend: str) -> None:
    tests = (
        "root = Node(4)\nroot.left = Node(5)\nroot.left.left = Node(6)\nassert depth(root) == 3\n"
        "assert root.left.left.value == 6\nassert root.left is root.left\nassert root.double() == 8\n"
        "assert depth(None) == 0\nassert root != root.left\nassert depth(root.left) == 2"
    )
    assert run_tests(NODES, tests, "depth", backend=backend) == TestResult(7, 7, None)


def test_modules_that_the_program_imports_are_there_for_the_tests() -> None:
    program = "import sys\ndef size(x):\n    return sys.getsizeof(x)"
    assert run_tests(program, "assert size((1, 2)) == sys.getsizeof((1, 2))", "size").error is None
    renamed = "import os as sys\ndef size(x):\n    return 40"
    result = run_tests(renamed, "assert size(()) == sys.getsizeof(())", "size")
    assert "NameError" in (result.error or "")


CODEC = '''
import math

def encode(s: str):
    """Shifts every character."""
    return "".join(chr(ord(c) + step()) for c in s)

def step():
    return int(math.sqrt(25))

def decode(s: str):
    """Undoes encode."""
'''
CODEC_TESTS = (
    "def check(candidate):\n    for text in ('abc', '', 'xyz'):\n        assert candidate(encode(text)) == text\n"
)
RIGHT = '    return "".join(chr(ord(c) - 5) for c in s)\n'


@pytest.mark.parametrize("prompt", ["", CODEC])
def test_helpers_of_the_prompt_can_be_called_by_the_tests(backend: str, prompt: str) -> None:
    assert run_tests(CODEC + RIGHT, CODEC_TESTS, "decode", prompt=prompt, backend=backend).error is None


def test_a_helper_said_again_in_the_same_words_is_no_redefinition() -> None:
    again = "def encode(s):\n    return s\n"
    assert "redefines encode" in (run_tests(CODEC + RIGHT + again, CODEC_TESTS, "decode").error or "")
    same = 'def encode(s: str):\n    return "".join(chr(ord(c) + step()) for c in s)\n'
    assert run_tests(CODEC + RIGHT + same, CODEC_TESTS, "decode").error is None


@pytest.mark.parametrize(
    "keywords", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_mb": 8}, {"entry_point": "a b"}]
)
def test_limits_out_of_range_are_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        run_tests(**{"program": HALF, "tests": "assert half(2) == 1", "entry_point": "half", **keywords})


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="no sandbox called 'docker'"):
        run_tests(HALF, "assert half(2) == 1", "half", backend="docker")


@pytest.mark.parametrize(
    "completion, code",
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1\n"),
        ("```py\ndef g(): ...\n```\nand\n```\ndef f(): ...\n```\nuse\n```\nf()\n```", "def f(): ...\n"),
        ("```python\ndef f():\n    return", "def f():\n    return"),
        ("~~~\nx = 1\n~~~", "x = 1\n"),
        ("````\n```\ninner\n```\n````", "```\ninner\n```\n"),
    ],
)
def test_the_program_is_taken_out_of_its_fence(completion: str, code: str) -> None:
    assert extract_program(completion, "f") == code


def rows(**more: list[Any]) -> dict[str, list[Any]]:
    return {"tests": ["assert half(4) == 2\nassert half(2) == 1"] * 3, "entry_point": ["half"] * 3, **more}


def test_the_reward_is_the_share_of_tests_in_the_order_of_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    completions = [HALF, f"```python\n{HALF.replace('x / 2', '1')}```", [{"role": "assistant", "content": "I cannot."}]]
    reward = CodeReward(workers=2)
    with caplog.at_level(logging.INFO, logger="llmalign.rewards.code"):
        assert reward(["p"] * 3, completions, [[1]] * 3, **rows()) == [1.0, 0.5, 0.0]
    assert "1 of 3 completions pass all their tests, 3 of 6 tests pass" in caplog.text
    assert "1 SyntaxError" in caplog.text and "1 AssertionError" in caplog.text
    assert reward.__name__ == "code_reward"
    assert CodeReward(all_or_nothing=True)(["p"] * 3, completions, None, **rows()) == [1.0, 0.0, 0.0]


def test_the_code_prompt_stands_before_a_completion_that_goes_on_from_it() -> None:
    head = "import math\n\ndef half(x):\n    '''Half of it.'''\n"
    body = "    return math.ldexp(x, -1)\n"
    whole = f"```python\ndef half(x):\n{body}```"
    columns = rows(code_prompt=[head, head, None])
    assert CodeReward()(["p"] * 3, [body, whole, HALF], None, **columns) == [1.0, 1.0, 1.0]
    assert CodeReward(prepend_prompt=True)([head] * 3, [body, whole, "    return"], None, **rows()) == [1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="code_prompt"):
        CodeReward(prepend_prompt=True)([[{"role": "user", "content": "x"}]] * 3, [body] * 3, None, **rows())


def test_a_helper_of_the_code_prompt_cannot_be_replaced_by_a_completion() -> None:
    cheat = "```python\ndef encode(s):\n    return s\n\ndef decode(s):\n    return s\n```"
    columns: dict[str, list[Any]] = {"tests": [CODEC_TESTS], "entry_point": ["decode"], "code_prompt": [CODEC]}
    assert CodeReward()(["p"], [cheat], None, **columns) == [0.0]
    assert CodeReward()(["p"], [RIGHT], None, **columns) == [1.0]


def test_a_row_without_tests_has_no_reward_and_unusable_tests_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"tests": [None, "x = 1", "assert half(2) == 1"], "entry_point": [None, "half", "half"]}
    assert CodeReward()(["p"] * 3, [HALF] * 3, None, **columns) == [None, None, 1.0]
    assert "the tests of completion 1 cannot be used" in caplog.text


@pytest.mark.parametrize("missing", ["tests", "entry_point"])
def test_a_missing_column_is_named(missing: str) -> None:
    columns = {name: values for name, values in rows().items() if name != missing}
    with pytest.raises(UserError, match=f"column '{missing}'"):
        CodeReward()(["p"] * 3, [HALF] * 3, None, **columns)
