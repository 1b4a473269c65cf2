"""Reward functions: what their names may be, and a batch that survives every kind of bad row."""

import asyncio
import functools
import logging
import math

import numpy as np
import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from llmalign.errors import UserError
from llmalign.rewards.functions import AsyncGuarded, Failure, Guarded, guard, load_function

SOURCE = """
from dataclasses import dataclass

@dataclass
class Length:
    scale: float
    def __call__(self, prompts, completions, completion_ids, **columns):
        return [self.scale * len(text) for text in completions]

def length(prompts, completions, completion_ids, **columns):
    return [float(len(text)) for text in completions]

halved = Length(.5)
number = 3
"""


@pytest.fixture
def written(tmp_path):
    def _written(text, name="rewards.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return _written


def call(function, completions, **columns):
    ids = [[ord(letter) for letter in text] for text in completions]
    return function(
        prompts=["p"] * len(completions), completions=completions, completion_ids=ids, trainer_state=object(), **columns
    )


def same(found, expected):
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        assert value is wanted if wanted is None else (math.isnan(value) and math.isnan(wanted)) or value == wanted


def test_a_function_is_found_by_module_and_by_file(written, tmp_path, monkeypatch):
    path = written(SOURCE)
    assert call(load_function(f"{path}:length"), ["ab", "c"]) == [2.0, 1.0]
    assert call(load_function("rewards.py:halved", folder=tmp_path), ["ab"]) == [1.0]
    assert load_function(f"{path}:length") is load_function("rewards.py:length", folder=tmp_path)
    written(SOURCE, "my_own_rewards.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert call(load_function("my_own_rewards:length"), ["abc"]) == [3.0]
    assert load_function("os.path:join")("a", "b") == "a/b"


def test_a_file_is_looked_for_beside_the_recipe_and_then_where_the_command_was_given(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine.py").write_text("def here(prompts, **columns):\n    return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("mine.py:here", folder=tmp_path / "recipes")(["a"]) == [1.0]
    (tmp_path / "recipes" / "mine.py").write_text("def here(prompts, **columns):\n    return [2.0] * len(prompts)\n")
    assert load_function("mine.py:here", folder=tmp_path / "recipes")(["a"]) == [2.0]
    with pytest.raises(UserError, match="there is no file other.py in .*recipes or in the working directory"):
        load_function("other.py:here", folder=tmp_path / "recipes")


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"def f(completions, **rest):\n    return [{value}]\n")
    first, second = (load_function("rewards.py:f", folder=tmp_path / folder) for folder in ("a", "b"))
    assert (call(first, ["x"]), call(second, ["x"])) == ([1.0], [2.0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("length", "names no reward function: write package.module:function"),
        (":length", "names no reward function"),
        ("rewards.py:", "names no reward function"),
        ("rewards.py:a b", "names no reward function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all' on Python's path"),
        ("os.no_such:f", "there is no module 'os.no_such'"),
        ("../os:f", "is no module's name"),
        ("missing.py:f", "there is no file"),
        ("rewards.py:lenght", "has no 'lenght'; the nearest is 'length'"),
        ("rewards.py:Length", "is a class: name a function"),
        ("rewards.py:number", "is int, which cannot be called"),
        ("broken.py:f", "could not be imported: SyntaxError"),
        ("lacking.py:f", "could not be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raising.py:f", "could not be imported: ZeroDivisionError"),
    ],
)
def test_what_names_no_function_is_refused_in_a_sentence(written, tmp_path, name, words):
    written(SOURCE)
    written("def f(:\n", "broken.py")
    written("import no_such_thing\n", "lacking.py")
    written("1 / 0\n", "raising.py")
    with pytest.raises(UserError) as refused:
        load_function(name, folder=tmp_path)
    assert words in str(refused.value) and name in str(refused.value) and "\n" not in str(refused.value)


def test_good_rewards_of_any_kind_pass_as_floats():
    guarded = guard(lambda completions, **rest: [1, True, np.float32(0.5), torch.tensor(2.0), None])
    found = call(guarded, list("abcde"))
    same(found, [1.0, 1.0, 0.5, 2.0, None])
    assert all(type(value) is float for value in found[:4]) and guarded.failed == [] and guarded.count == 0
    same(call(guard(lambda completions, **rest: torch.tensor([1.0, 2.0])), ["a", "b"]), [1.0, 2.0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "gave nan"),
        (-math.inf, "gave -inf"),
        (torch.tensor(math.inf), "gave inf"),
        ("1.0", "gave str '1.0', which is no number"),
        ([1.0], "gave list [1.0], which is no number"),
    ],
)
def test_a_bad_value_costs_its_row_alone(bad, message):
    calls = []
    guarded = guard(lambda completions, **rest: calls.append(1) or [1.0, bad, None])
    same(call(guarded, ["a", "b", "c"], row_id=[70, 71, 72]), [1.0, math.nan, None])
    assert guarded.failed == [Failure(1, 71, message)] and guarded.count == 1 and len(calls) == 1
    assert str(guarded.failed[0]) == f"row 1 (row_id 71): {message}"


def test_an_exception_in_one_row_costs_that_row_alone():
    seen = []

    def reward(prompts, completions, completion_ids, answer, trainer_state, pair):
        seen.append((prompts, completions, completion_ids, answer, pair))
        return [float(text) + extra for text, extra in zip(completions, answer, strict=True)]

    guarded = guard(reward)
    found = guarded(
        prompts=["p", "q", "r"],
        completions=["1", "x", "3"],
        completion_ids=[[1], [2], [3]],
        answer=[0.5, 0.5, 0.25],
        trainer_state="state",
        pair=(7, 8),
    )
    same(found, [1.5, math.nan, 3.25])
    assert [failure.row for failure in guarded.failed] == [1] and guarded.failed[0].row_id is None
    assert guarded.failed[0].message == "ValueError: could not convert string to float: 'x'"
    # Lists of the batch's length are cut to the row; what is shared by all rows stays whole.
    assert seen[1:] == [
        (["p"], ["1"], [[1]], [0.5], (7, 8)),
        (["q"], ["x"], [[2]], [0.5], (7, 8)),
        (["r"], ["3"], [[3]], [0.25], (7, 8)),
    ]


@pytest.mark.parametrize("wrong", [[1.0], [1.0] * 4, 1.0, "abc", None, {"a": 1}])
def test_a_wrong_length_is_repaired_row_by_row(wrong):
    def reward(completions, **rest):
        return wrong if len(completions) > 1 else [float(ord(completions[0]))]

    guarded = guard(reward)
    same(call(guarded, ["a", "b", "c"]), [97.0, 98.0, 99.0])
    assert guarded.failed == []


def test_a_length_that_is_wrong_for_one_row_names_it():
    def reward(completions, **rest):
        return [1.0 for text in completions if text != "skip"]

    guarded = guard(reward)
    same(call(guarded, ["a", "skip", "b"]), [1.0, math.nan, 1.0])
    assert guarded.failed == [Failure(1, None, "gave 0 rewards instead of 1")]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions, **rest: [math.nan] * len(completions), "gave nan"),
        (lambda completions: [0.0], "unexpected keyword argument 'prompts'"),
        (lambda completions, **rest: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda completions, **rest: None, "gave NoneType None instead of a list of 1 rewards"),
    ],
)
def test_a_function_that_fails_on_every_row_says_why_for_each(function, words):
    guarded = guard(function, "mine")
    same(call(guarded, ["a", "b"]), [math.nan, math.nan])
    assert [failure.row for failure in guarded.failed] == [0, 1]
    assert all(words in failure.message for failure in guarded.failed)


def test_that_it_is_called_row_by_row_is_said_once(caplog):
    guarded = guard(lambda completions, **rest: 1 / 0, "mine")
    for _ in range(2):
        call(guarded, ["a", "b"])
    assert caplog.text.count("it is called again row by row") == 1


def test_what_float32_cannot_hold_is_no_reward():
    guarded = guard(lambda completions, **rest: [1e39, 1.0], "mine")
    same(call(guarded, ["a", "b"]), [math.nan, 1.0])


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_passed_on(error):
    def hungry(completions, **rest):
        raise error("no more")

    with pytest.raises(error):
        call(guard(hungry), ["a", "b"])


@pytest.mark.parametrize("error", [MemoryError("no more"), UserError("there is no sandbox here")])
def test_what_would_be_passed_on_can_be_held_back(error):
    def stops(completions, **rest):
        if "b" in completions:
            raise error
        return [1.0] * len(completions)

    guarded = guard(stops)
    with guarded.holding_back():
        same(call(guarded, ["a", "b"]), [math.nan, math.nan])
    assert guarded.held is error and not guarded.failed
    with guarded.holding_back():
        assert call(guarded, ["a"]) == [1.0] and guarded.held is None
    with pytest.raises(type(error)):
        call(guarded, ["a", "b"])


def test_rows_that_do_not_apply_are_no_failures():
    assert call(guard(lambda completions, **rest: [None, None]), ["a", "b"]) == [None, None]


def test_a_function_s_own_refusal_and_an_interrupt_pass_through():
    def refuses(completions, **rest):
        raise UserError("there is no sandbox here")

    def interrupts(completions, **rest):
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="there is no sandbox here"):
        call(guard(refuses), ["a", "b"])
    with pytest.raises(KeyboardInterrupt):
        call(guard(interrupts), ["a", "b"])


def test_each_message_is_logged_once_and_all_are_counted(caplog):
    guarded = guard(lambda completions, **rest: [math.nan if text == "x" else math.inf if text == "y" else 0.0
                                                 for text in completions], "mine")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for batch in ("xa", "xx" + "a", "ya"):
            call(guarded, list(batch), row_id=list(range(10, 10 + len(batch))))
    assert guarded.count == 4 and guarded.messages == {"gave nan": 3, "gave inf": 1}
    assert [failure.row for failure in guarded.failed] == [0]  # of the last call
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and messages[0].startswith("Reward function mine, row 0 (row_id 10): gave nan;")


def test_messages_that_quote_their_row_do_not_fill_the_log(caplog):
    guarded = guard(lambda completions, **rest: [text and float(text) for text in completions])
    with caplog.at_level(logging.WARNING):
        call(guarded, ["1", *(f"word {i}" for i in range(100))])
    assert guarded.count == 100 and len(caplog.records) == 22  # that it goes row by row, 20 messages, the end of them
    assert "further messages are counted and not logged" in caplog.records[-1].getMessage()


class Slow:
    async def __call__(self, prompts, completions, **rest):
        await asyncio.sleep(0)
        return [1.0 / len(text) for text in completions]


async def slow(prompts, completions, **rest):
    await asyncio.sleep(0)
    return [1.0 / len(text) for text in completions]


@pytest.mark.parametrize("function", [slow, Slow(), functools.partial(slow, extra=1)])
def test_async_functions_stay_async_under_their_guard(function):
    guarded = guard(function)
    assert isinstance(guarded, AsyncGuarded) and is_async_callable(guarded)  # what TRL asks
    same(asyncio.run(call(guarded, ["a", "", "abcd"])), [1.0, math.nan, 0.25])
    assert [failure.row for failure in guarded.failed] == [1]
    same(asyncio.run(call(guarded, [""])), [math.nan])


def test_trl_names_a_guarded_function_as_it_names_the_function():
    class Mine:
        def __call__(self, completions, **rest):
            return [0.0] * len(completions)

    def mine(completions, **rest):
        return [0.0] * len(completions)

    for function in (mine, functools.partial(mine, extra=1), Mine(), len):
        guarded = guard(function)
        assert isinstance(guarded, Guarded) and not is_async_callable(guarded)
        assert get_callable_name(guarded) == get_callable_name(function)
        assert guard(guarded) is guarded
