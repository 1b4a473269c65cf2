"""Oracles: functions, preference models, judges and rewards, each giving P(first beats second)."""

import math
import re

import pytest

from llmalign.errors import UserError
from llmalign.rewards.functions import guard
from llmalign.rewards.pair_model import PreferenceModel
from llmalign.rewards.preference import FunctionOracle, JudgeOracle, ModelOracle, RewardOracle, by_reward
from tests.rewards.test_pair_model import classifier, pairs
from tests.trainers import tiny

NAN = math.nan


def same(found, expected):
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True)) and all(
        isinstance(value, float) for value in found
    )


def test_a_function_is_asked_once_with_its_columns():
    calls = []

    def longer(prompts, first, second, **columns):
        calls.append((prompts, first, second, columns))
        return [0.9 if len(a) > len(b) else 0.25 for a, b in zip(first, second, strict=True)]

    oracle = FunctionOracle(longer, "mine:longer")
    assert oracle.preferences(("p", "q"), ("aaa", "a"), ("b", "bb"), tag=[1, 2]) == [0.9, 0.25]
    assert calls == [(["p", "q"], ["aaa", "a"], ["b", "bb"], {"tag": [1, 2]})] and oracle.exact


def test_in_both_orders_the_mean_is_taken():
    """0.8 for whatever stands first: the place alone decides, so nothing is preferred; and a mixture by hand."""
    assert FunctionOracle(lambda **_: [0.8], "f", both_orders=True).preferences(["p"], ["a"], ["b"]) == [0.5]
    table = {("a", "b"): 0.9, ("b", "a"): 0.3}
    oracle = FunctionOracle(lambda prompts, first, second: [table[first[0], second[0]]], "f", both_orders=True)
    assert oracle.preferences(["p"], ["a"], ["b"]) == [pytest.approx((0.9 + 0.7) / 2)]
    assert oracle.preferences(["p"], ["b"], ["a"]) == [pytest.approx((0.3 + 0.1) / 2)]


def test_what_a_function_cannot_judge_is_nan_alone():
    oracle = FunctionOracle(lambda prompts, first, second: [NAN, 1, 0], "f")
    assert same(oracle.preferences(["p"] * 3, ["a"] * 3, ["b"] * 3), [NAN, 1.0, 0.0])
    # Of two orders one is not known, so neither is the mean.
    half = FunctionOracle(lambda prompts, first, second: [NAN if first == ["a"] else 0.5], "f", both_orders=True)
    assert same(half.preferences(["p"], ["a"], ["b"]), [NAN])


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([0.5], "mine gave 1 numbers for 2 pairs; it must give one a pair"),
        ([0.5] * 3, "mine gave 3 numbers for 2 pairs"),
        ([0.5, 1.2], "mine gave 1.2 for pair 1 of its call; P must lie in [0, 1]"),
        ([-0.1, 0.5], "mine gave -0.1 for pair 0 of its call"),
        ([math.inf, 0.5], "mine gave inf for pair 0 of its call"),
        (0.5, "mine must give a list of numbers, P(first beats second)"),
        (None, "mine must give a list of numbers"),
        ([None, 0.5], "mine must give a list of numbers"),
        (["first", "second"], "mine must give a list of numbers"),
        ({"a": 1, "b": 0}, "mine must give a list of numbers"),
    ],
)
def test_what_is_no_list_of_probabilities_is_refused(answer, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        FunctionOracle(lambda **_: answer, "mine").preferences(["p"] * 2, ["a"] * 2, ["b"] * 2)


def test_a_function_that_raises_is_named_in_one_sentence():
    def broken(prompts, first, second):
        raise KeyError("tag")

    with pytest.raises(UserError, match="mine.*KeyError.*tag"):
        FunctionOracle(broken, "mine").preferences(["p"], ["a"], ["b"])


def test_what_a_function_says_itself_is_passed_on():
    def refuses(prompts, first, second):
        raise UserError("there is no dictionary here")

    def hungry(prompts, first, second):
        raise MemoryError("no more")

    with pytest.raises(UserError, match="^there is no dictionary here$"):
        FunctionOracle(refuses, "mine").preferences(["p"], ["a"], ["b"])
    with pytest.raises(MemoryError):
        FunctionOracle(hungry, "mine").preferences(["p"], ["a"], ["b"])


def test_a_preference_model_is_asked_as_it_is():
    prompts, first, second = pairs(9)
    oracle = ModelOracle(PreferenceModel(classifier(), tiny.tokenizer()))
    expected = PreferenceModel(classifier(), tiny.tokenizer()).score(prompts, first, second)
    assert oracle.preferences(prompts, first, second, tag=[0] * 9) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.1 and not oracle.exact


def test_a_judge_is_asked_as_it_is():
    class Client:
        closed = False

        def close(self):
            self.closed = True

    class Judge:
        client = Client()

        def score(self, prompts, first, second):
            return [0.25 if a < b else NAN for a, b in zip(first, second, strict=True)]

    oracle = JudgeOracle(Judge())
    assert same(oracle.preferences(["p", "p"], ["a", "b"], ["b", "a"], tag=[1, 1]), [0.25, NAN])
    assert not oracle.exact
    oracle.close()
    assert Judge.client.closed


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


async def tenths(prompts, completions, tag, **columns):
    return [value / 10 for value in tag]


def only_short(prompts, completions, **columns):
    return [None if len(text) > 2 else 100.0 for text in completions]


def fails_on_b(prompts, completions, **columns):
    return [NAN if "b" in text else 1.0 for text in completions]


def test_rewards_are_summed_over_functions_async_ones_too():
    oracle = RewardOracle([guard(length), guard(tenths), guard(only_short)])
    found = oracle.rewards(["p"] * 3, ["a", "aa", "aaa"], tag=[1, 2, 3], completion_ids=[[1]] * 3)
    assert found == [pytest.approx(101.1), pytest.approx(102.2), pytest.approx(3.3)]


def test_a_reward_is_missing_where_all_abstain_or_one_fails():
    assert same(RewardOracle([guard(only_short)]).rewards(["p"] * 2, ["a", "aaa"]), [100.0, NAN])
    assert same(RewardOracle([guard(length), guard(fails_on_b)]).rewards(["p"] * 2, ["a", "b"]), [2.0, NAN])
    # Abstaining costs nothing where another function has a reward.
    assert RewardOracle([guard(only_short), guard(length)]).rewards(["p"], ["aaa"]) == [3.0]


def test_conversations_have_trl_s_form():
    seen = []

    def keep(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [1.0] * len(prompts)

    talk = [{"role": "user", "content": "Hello"}]
    RewardOracle([guard(keep)]).rewards([talk], ["Hi"])
    assert seen[0] == ([talk], [[{"role": "assistant", "content": "Hi"}]])
    RewardOracle([guard(keep)]).rewards(["Hello"], ["Hi"])
    assert seen[1] == (["Hello"], ["Hi"])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5), (NAN, 1.0, NAN), (1.0, NAN, NAN), (NAN, NAN, NAN), (-1, 0, 0)],
)
def test_by_reward(first, second, expected):
    assert same([by_reward(first, second)], [float(expected)])
