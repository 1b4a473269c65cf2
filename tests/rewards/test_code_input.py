"""Arguments and rows that are not what they should be: one clear sentence, and training goes on."""

import logging
import time
from typing import Any

import pytest

from llmalign.rewards.code import CodeReward, TestResult, extract_program, run_tests

pytestmark = pytest.mark.usefixtures("some_backend")

ONE = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    "keywords, said",
    [
        ({"tests": None}, "tests must be Python source as text or a list of such texts, got NoneType"),
        ({"tests": b"assert f()"}, "tests must be .* got bytes"),
        ({"tests": ["assert f()", None]}, "tests must be .* got list"),
        ({"program": None}, "program must be Python source as text, got NoneType"),
        ({"program": 5}, "program must be .* got int"),
        ({"program": b"x"}, "program must be .* got bytes"),
        ({"prompt": None}, "prompt must be .* got NoneType"),
        ({"entry_point": None}, "entry_point must be the name of a function, got None"),
        ({"entry_point": "class"}, "entry_point must be the name of a function, got 'class'"),
        ({"entry_point": ""}, "entry_point must be the name"),
        ({"entry_point": "__builtins__"}, "entry_point must be a name of the program's own"),
        ({"memory_mb": 100.5}, "memory_mb must be a whole number .* got 100.5"),
        ({"memory_mb": "512"}, "memory_mb must be a whole number"),
        ({"memory_mb": True}, "memory_mb must be a whole number"),
        ({"memory_mb": 1 << 40}, "memory_mb must be a whole number"),
        ({"timeout_s": None}, "timeout_s must be a number of seconds .* got None"),
        ({"timeout_s": "5"}, "timeout_s must be a number of seconds .* got '5'"),
        ({"timeout_s": float("inf")}, "timeout_s must be"),
    ],
)
def test_an_argument_of_another_kind_is_named(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_tests(**{"program": ONE, "tests": "assert f() == 1", "entry_point": "f", **keywords})


@pytest.mark.parametrize("options", [{"timeout_s": "5"}, {"memory_mb": 100.5}])
def test_a_reward_refuses_its_options_before_training(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CodeReward(**options)


def test_a_list_of_tests_is_joined() -> None:
    assert run_tests(ONE, ["assert f() == 1", "assert f() == 2"], "f").passed == 1
    assert CodeReward()(["p"], [ONE], None, tests=[["assert f() == 1", "assert f() == 2"]], entry_point=["f"]) == [0.5]
    assert CodeReward()(["p"], [ONE], None, tests=[[]], entry_point=["f"]) == [None]


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    assert run_tests(f"\ufeff{ONE}", "\ufeffassert f() == 1\r\n", "f") == TestResult(1, 1, None)


def test_a_name_is_normalised_as_python_does() -> None:
    assert run_tests("def \ufb01():\n    return 1\n", "assert \ufb01() == 1", "\ufb01") == TestResult(1, 1, None)


@pytest.mark.parametrize(
    "completion, score",
    [
        ([], 0.0),
        (None, 0.0),
        ("", 0.0),
        ([{"role": "assistant", "content": None}], 0.0),
        ([{"role": "assistant", "tool_calls": []}], 0.0),
        ([{"role": "assistant", "content": []}], 0.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": ONE}]}], 1.0),
        ([{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": ONE}]}], 1.0),
        (5, None),
        ([{"role": "assistant", "content": {"text": ONE}}], None),
    ],
)
def test_no_completion_ends_training(completion: Any, score: float | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="llmalign.rewards.code"):
        scores = CodeReward()(["p"] * 2, [completion, ONE], None, tests=["assert f() == 1"] * 2, entry_point=["f"] * 2)
    assert scores == [score, 1.0]
    assert score is not None or "A completion must be text or chat messages" in caplog.text
    assert score != 0.0 or "does not define f" in caplog.text


@pytest.mark.parametrize("row", [{"tests": 5}, {"entry_point": "class"}, {"entry_point": 5}, {"code_prompt": ["x"]}])
def test_a_row_of_another_kind_is_not_judged_and_logged(row: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    columns = {"tests": "assert f() == 1", "entry_point": "f", "code_prompt": "", **row}
    both = {
        name: [value, good] for (name, value), good in zip(columns.items(), ("assert f() == 1", "f", ""), strict=True)
    }
    assert CodeReward()(["p"] * 2, [ONE] * 2, None, **both) == [None, 1.0]
    assert "completion 0 was not judged" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["`" * 64000, "```" + "a" * 64000, "~" * 64000, "```x\n" * 12000, "```\n" + " " * 64000, "async\n" * 12000],
)
def test_taking_out_the_program_takes_no_time(text: str) -> None:
    begun = time.perf_counter()
    extract_program(text, "f")
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "text, code",
    [
        ("````md\n```python\nx\n```\n````", "```python\nx\n```\n"),
        ("~~~~\n~~~\nx\n~~~\n~~~~", "~~~\nx\n~~~\n"),
        ("```python title='f'\ndef f(): ...\n```", "def f(): ...\n"),
        ("use ```x``` here", "use ```x``` here"),
        ("```\nclass f: ...\n```\n```\nf()\n```", "class f: ...\n"),
    ],
)
def test_fences_of_any_length_and_label(text: str, code: str) -> None:
    assert extract_program(text, "f") == code
