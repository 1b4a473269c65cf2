"""Values as text: what is written reads back, in Python's own reader too where it is a literal, and nothing runs."""

import ast
import math
import random
import string
from typing import Any

import pytest

from llmalign.rewards.sandbox.inside.wire import Unsupported, Writer, read_value


def refuse(*parts: Any) -> Any:
    raise Unsupported(str(parts))


def there(value: Any) -> str:
    return Writer(refuse).text(value)


def back(text: str) -> Any:
    return read_value(text, refuse)


def any_value(rng: random.Random, depth: int) -> Any:
    plain = [
        None, True, False, rng.randint(-(10**30), 10**30), rng.gauss(0, 1e6), -0.0, rng.random() * 1e-310,
        "".join(rng.choices(string.printable + "é\u2028\ud800\U0001f600", k=rng.randint(0, 8))), rng.randbytes(4),
    ]  # fmt: skip
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(plain)
    items = [any_value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    keys = [any_value(rng, 0) for _ in range(3)]
    return rng.choice(
        [items, tuple(items), dict(zip(keys, items, strict=False)), set(keys[:1])]
    )  # repr of more depends on their order


def test_plain_values_are_what_literal_eval_reads() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        value = any_value(rng, 4)
        text = there(value)
        assert text.isascii()
        assert repr(ast.literal_eval(text)) == repr(back(text)) == repr(value)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, complex(1, -0.0), frozenset([2]), range(2, 9, 3), bytearray(b"x"), ...]
)
def test_values_beyond_literals_read_back(value: Any) -> None:
    assert repr(back(there(value))) == repr(value)


def test_nan_reads_back() -> None:
    assert math.isnan(back(there(math.nan)))
    assert math.isnan(back(there([complex(math.nan, 1)]))[0].real)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "open('x')", "().__class__", "[x for x in [1]]", "lambda: 0", "1 + 1", "2 ** 9", "'a' * 9",
        "f'{1}'", "x", "True if 1 else 2", "print", "[*[1]]", "{**{}}", "frozenset(*[[1]])", "dict(a=1)", "not 1", "~1",
        "-'a'", "--1", "a.b", "[1][0]", "1 < 2", "(yield)", "(x := 1)", "await x", "int('1')", "eval('1')",
    ],
)  # fmt: skip
def test_nothing_is_evaluated(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        back(text)


def test_what_is_too_deep_or_too_wide_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Unsupported, match="deep"):
        there(deep)
    wide: list[Any] = []
    for _ in range(60):
        wide = [wide, wide]
    with pytest.raises(Unsupported, match="parts"):
        there(wide)
    with pytest.raises(Unsupported):
        there(object())
    for text in ("[" * 100000 + "]" * 100000, "-" * 100000 + "1"):
        with pytest.raises((SyntaxError, MemoryError, RecursionError, ValueError)):
            back(text)


def test_the_deepest_value_that_may_be_sent_can_be_read() -> None:
    deep: Any = 1
    for _ in range(99):
        deep = (deep,)
    assert back(there(deep)) == deep
