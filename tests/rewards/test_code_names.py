"""What the tests may use beside the entry point, and where it comes from."""

import logging
from typing import Any

import pytest

from llmalign.rewards.code import CodeReward, TestResult, run_tests

pytestmark = pytest.mark.usefixtures("some_backend")

CONSTANTS = """
from typing import List
import os.path
import math as m
from math import pi, isclose
from operator import *
MOD = 7
LIMITS = {"low": [1, 2]}
if True:
    def twice(x):
        return 2 * x

def f(x):
    '''The same.'''
"""
USES = [
    "assert f(9) % MOD == 2", "assert isclose(f(1), 1)", "assert pi < f(4) < m.tau",
    "xs: List[int] = [1]\nassert f(xs) == xs",
    "assert os.path.join(f('a'), 'b') == 'a/b'", "assert f(2) in LIMITS['low']", "assert add(f(1), 1) == twice(1)",
    "g = (lambda MOD: MOD)(1)\nassert f(9) % MOD == 2", "def g(MOD):\n    return MOD\nassert g(f(MOD)) == 7",
]  # fmt: skip


@pytest.mark.parametrize("tests", USES)
def test_constants_and_imports_of_the_prompt(tests: str) -> None:
    right = run_tests(f"{CONSTANTS}    return x\n", tests, "f", prompt=CONSTANTS)
    assert right == TestResult(1, 1, None)
    changed = (
        "MOD = 2\nLIMITS['low'] = [0]\npi = 1e9\nm.tau = 1e10\nisclose = add = lambda *a: True\ntwice = lambda x: 1\n"
    )
    wrong = f"{CONSTANTS}    return 0\n{changed}"
    assert run_tests(wrong, tests, "f", prompt=CONSTANTS).passed == 0


@pytest.mark.parametrize(
    "statement, tests",
    [
        ("import numpy as np", "assert f(np.pi)"),
        ("from scipy.stats import norm", "assert f(norm)"),
        ("from . import helper", "assert f(helper)"),
        ("THING = object()", "assert f(THING)"),
        ("THING = 1 / 0", "assert f(THING)"),
    ],
)
def test_what_cannot_be_had_from_the_prompt_is_named(statement: str, tests: str) -> None:
    prompt = f"{statement}\ndef f(x):\n    '''The same.'''\n"
    result = run_tests(f"{prompt}    return x\n", tests, "f", prompt=prompt)
    assert (result.passed, result.total) == (0, 0)
    assert (result.error or "").startswith("unsupported: the tests use ")


POINT = """
class Point:
    def __init__(self, x):
        self.x = x
    def same(self, other):
        return self.x == other

def f(n):
    '''x doubled'''
"""
POINT_TESTS = "def check(candidate):\n    assert Point(4).same(candidate(2))\n"


@pytest.mark.parametrize("tail", ["", "Point.same = lambda *a: True\n", "del Point\n", "class Point(int):\n    pass\n"])
def test_a_class_of_the_prompt_is_judged_for_no_answer(backend: str, tail: str) -> None:
    result = run_tests(f"{POINT}    return 0\n{tail}", POINT_TESTS, "f", prompt=POINT, backend=backend)
    assert result == TestResult(
        0, 0, "unsupported: the tests use class Point of the prompt, which an answer could change"
    )


DUCK = """
class A:
    def __getattr__(self, name):
        return lambda *a, **k: True
    def __len__(self):
        return 1
"""


@pytest.mark.parametrize(
    "test",
    [
        "f('x').startswith('ab')", "f('y').isdigit()", "f('z').issubset({1})", "hasattr(f(1), '__iter__')",
        "callable(f(1))", "f(1)", "not f(1) is None", "f(1) != 3", "len(f([])) == 1", "bool(f(1))", "f(1)(2)",
        "[f(1)]", "f(1) in [f(1)]", "isinstance(f(1), object)", "str(f(1))",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "how", ["def f(x):\n    return A()", "f = A()", "class f(A):\n    def __init__(self, x):\n        pass"]
)
def test_an_object_that_says_yes_to_all(test: str, how: str) -> None:
    result = run_tests(f"{DUCK}{how}\n", f"assert {test}", "f")
    assert (result.passed, result.total) == (0, 1)
    if how.startswith("def"):
        assert (result.error or "").startswith("unsupported: the answer returned an object of type A")


@pytest.mark.parametrize("test", ["Box(1)", "not Box(1)", "Box(1) != 3", "Box(1) == 1", "hasattr(Box(1), '__iter__')"])
def test_an_object_of_a_class_that_the_tests_name_has_no_truth_either(test: str) -> None:
    result = run_tests(f"{DUCK}class Box(A):\n    def __init__(self, x):\n        pass\n", f"assert {test}", "f")
    assert (result.passed, result.total) == (0, 1)
    assert (result.error or "").startswith("unsupported")


def test_a_class_as_the_entry_point() -> None:
    program = (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
        "        self.items.append(x)\n        return self\n"
    )
    tests = "s = Stack()\ns.push(3)\nassert s.items == [3]\nassert s.push(4).items == [3, 4]"
    assert run_tests(program, tests, "Stack") == TestResult(2, 2, None)
    named = program.replace("Stack", "stack")
    tests = tests.replace("Stack", "stack")
    assert run_tests(named, tests, "stack", prompt="class stack:\n") == TestResult(2, 2, None)


PROMPT = "def encode(s):\n    return s[1:] + s[:1]\n\ndef decode(s):\n    '''Undoes encode.'''\n"
TESTS = "def check(candidate):\n    for text in ('abc', 'xyz'):\n        assert candidate(encode(text)) == text\n"
CHEATS = {
    "a function": "def encode(s):\n    return s\ndef decode(s):\n    return s\n",
    "a class": "class encode(str):\n    pass\ndef decode(s):\n    return s\n",
    "a value": "encode = lambda s: s\ndecode = encode\n",
    "an import": "from copy import copy as encode\ndecode = encode\n",
    "nothing": "def decode(s):\n    return 'abc'\n",
}


@pytest.mark.parametrize("answer", CHEATS.values(), ids=CHEATS.keys())
def test_the_reward_does_not_let_an_answer_define_what_the_tests_use(
    answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a chat row nothing tells what the problem defines: no answer is judged, and the log names the column once."""
    reward = CodeReward(workers=1)
    columns: dict[str, list[Any]] = {"tests": [TESTS] * 2, "entry_point": ["decode"] * 2}
    for _ in range(2):
        assert reward(["p"] * 2, [f"```python\n{answer}```"] * 2, None, **columns) == [None, None]
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "code_prompt" in said[0].getMessage()
    scores = reward(["p"] * 2, [answer] * 2, None, **columns, code_prompt=[PROMPT, PROMPT])
    assert scores == [0.0, 0.0]


def test_the_reward_lets_it_where_there_is_known_to_be_no_prompt() -> None:
    nodes = "class Node:\n    def __init__(self, x):\n        self.x = x\ndef f(node):\n    return node.x\n"
    columns: dict[str, list[Any]] = {"tests": ["assert f(Node(3)) == 3"], "entry_point": ["f"]}
    assert CodeReward()(["p"], [nodes], None, **columns) == [None]
    assert CodeReward()(["p"], [nodes], None, **columns, code_prompt=[""]) == [1.0]
    columns = {"tests": ["assert f((1,)) == sys.getsizeof((1,))"], "entry_point": ["f"]}
    assert CodeReward()(["p"], ["import sys\nf = sys.getsizeof\n"], None, **columns) == [1.0]
    cheat = "class sys:\n    getsizeof = int\ndef sys2(): pass\nf = lambda x: 0\n"
    assert CodeReward()(["p"], [cheat], None, **columns) == [0.0]
