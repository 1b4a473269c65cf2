"""Oracles: what says how likely one answer to a prompt beats another, and what scores answers one by one.

An oracle takes texts or conversations and gives P(first beats second), a number in [0, 1] for each pair, NaN for a pair
that could not be judged. A reward oracle has a reward for each answer instead, NaN for one that failed; the answer of
the higher reward beats the other (`by_reward`).
"""

import asyncio
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llmalign.errors import UserError
from llmalign.judges import PairwiseJudge
from llmalign.rewards.functions import AsyncGuarded, Guarded
from llmalign.rewards.model import Content, ModelReward
from llmalign.rewards.pair_model import PreferenceModel

PreferenceFunction = Callable[..., Sequence[float]]


class Oracle(Protocol):
    """What every oracle has. `exact`: it says P itself, without noise, so that a duality gap may be worked out."""

    exact: bool

    def preferences(
        self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content], **columns: Any
    ) -> list[float]:
        """P(first beats second) of each of N pairs, NaN where it is not known."""

    def close(self) -> None:
        """Let go of connections, where there are any."""
        return None


class FunctionOracle(Oracle):
    """A Python function `f(prompts, first, second, **columns) -> list of P(first beats second)`.

    With `both_orders` it is asked both ways and P is the mean of f(a, b) and 1 - f(b, a). Raises UserError, naming the
    pair, where it does not give one number in [0, 1] a pair; NaN is taken for a pair that it cannot judge.
    """

    exact = True

    def __init__(self, function: PreferenceFunction, name: str, *, both_orders: bool = False) -> None:
        self.name = name
        self._function, self._both_orders = function, both_orders

    def preferences(
        self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content], **columns: Any
    ) -> list[float]:
        """P(first beats second) of each of N pairs."""
        forward = self._asked(prompts, first, second, columns)
        if not self._both_orders:
            return forward
        backward = self._asked(prompts, second, first, columns)
        return [(one + 1 - other) / 2 for one, other in zip(forward, backward, strict=True)]

    def _asked(self, prompts: Any, first: Any, second: Any, columns: dict[str, Any]) -> list[float]:
        try:
            answers = self._function(prompts=list(prompts), first=list(first), second=list(second), **columns)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.name} failed: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error
        try:
            values = [float(value) for value in answers]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} must give a list of numbers, P(first beats second): {error}") from error
        if len(values) != len(prompts):
            raise UserError(f"{self.name} gave {len(values)} numbers for {len(prompts)} pairs; it must give one a pair")
        for row, value in enumerate(values):
            if not (math.isnan(value) or 0 <= value <= 1):
                raise UserError(f"{self.name} gave {value:g} for pair {row} of its call; P must lie in [0, 1]")
        return values


class ModelOracle(Oracle):
    """A pair-preference model, which reads every pair in both orders itself."""

    exact = False

    def __init__(self, model: PreferenceModel | PairwiseJudge) -> None:
        self._model = model

    def preferences(
        self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content], **columns: Any
    ) -> list[float]:
        """P(first beats second) of each of N pairs; `columns` are not read."""
        return self._model.score(prompts, first, second)


class JudgeOracle(ModelOracle):
    """A judge over HTTP. What it could not judge is NaN and is not kept, so it is asked for again when it is needed."""

    def __init__(self, judge: PairwiseJudge) -> None:
        super().__init__(judge)
        self._client = judge.client

    def close(self) -> None:
        """Close the connections and the file of its answers."""
        self._client.close()


class RewardOracle:
    """The sum of reward functions and reward models; best and worst of a prompt's answers are those of its rewards.

    Functions have TRL's signature; where all of them leave an answer without a reward, or one fails on it, its reward
    is NaN.
    """

    def __init__(self, functions: Sequence[Guarded | ModelReward]) -> None:
        self._functions = list(functions)

    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any) -> list[float]:
        """The reward of each of N answers, higher is better."""
        if any(isinstance(prompt, list) for prompt in prompts):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        totals: list[float | None] = [None] * len(prompts)
        for function in self._functions:
            given: Any = function(prompts=list(prompts), completions=list(completions), **columns)
            if isinstance(function, AsyncGuarded):
                given = asyncio.run(given)
            totals = [_plus(total, reward) for total, reward in zip(totals, given, strict=True)]
        return [math.nan if total is None else total for total in totals]

    def close(self) -> None:
        """Nothing is held open."""


def by_reward(first: float, second: float) -> float:
    """P(first beats second) where the higher reward wins: 1, 0, 0.5 for a tie, NaN where one is not known."""
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return 0.5 if first == second else float(first > second)


def _plus(total: float | None, reward: float | None) -> float | None:
    return total if reward is None else reward if total is None else total + reward
