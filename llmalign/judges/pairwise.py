"""Judges that compare two answers: P(first beats second | prompt), as a model behind an endpoint sees it."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Literal

from llmalign.errors import UserError
from llmalign.judges.chat import Answer, ChatRequest, Failure
from llmalign.judges.client import JudgeClient
from llmalign.judges.reading import Letters, is_switched, letter_preference, logprob_preference
from llmalign.judges.template import DEFAULT_TEMPLATE, Content, Template, render

logger = logging.getLogger(__name__)

Reading = Literal["logprobs", "text"]
_TEXT_TOKENS = 16


class PairwiseJudge:
    """Asks a judge which of two answers is better.

    `answers` says how it is read: `logprobs` takes the probability of the two letters from the first token's
    `top_logprobs`, `text` the letter that the answer names. With `both_orders` every pair is shown in both orders and
    the two are averaged; else AlpacaEval's rule with `order_seed` says, from the prompt, which answer stands first.
    `template` is the question (`Template`); a template of one's own that names other letters needs `letters`.
    `max_tokens` None: 1 for log-probs, 16 for text. A row without an answer that can be read is NaN, counted in
    `failed`, each reason logged once, and asked for again by the next call that needs it. Identical answers are 0.5
    without a question.

    Raises UserError for settings that cannot be meant. Not covered: answers that reason before they name a letter.
    """

    def __init__(
        self,
        client: JudgeClient,
        *,
        answers: Reading,
        both_orders: bool = False,
        template: str = DEFAULT_TEMPLATE,
        letters: Letters = ("A", "B"),
        order_seed: int = 0,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        top_logprobs: int = 5,
        progress: bool = False,
    ) -> None:
        if answers not in ("logprobs", "text"):
            raise UserError(f"a judge's answers are read as logprobs or as text, not as {answers!r}")
        if len(set(letters)) != 2 or any(not letter or letter.strip() != letter for letter in letters):
            raise UserError("a judge names two different letters, without white space around them")
        if answers == "logprobs" and top_logprobs < 2:
            raise UserError("a judge's two letters need top_logprobs of at least 2")
        self.client, self.failed = client, 0
        self.reasons: list[str | None] = []
        self._both_orders, self._order_seed, self._progress = both_orders, order_seed, progress
        self._template, self._letters, self._by_logprobs = Template(template), letters, answers == "logprobs"
        self._temperature, self._seed = temperature, seed
        self._max_tokens = max_tokens or (1 if self._by_logprobs else _TEXT_TOKENS)
        self._top_logprobs = top_logprobs if self._by_logprobs else None
        self._named = " and ".join(letters)
        self._logged: set[str] = set()

    def score(self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content]) -> list[float]:
        """P(first beats second) of each of N pairs, NaN where the judge gave no answer that can be read.

        Raises JudgeStopped and BudgetSpent as the client does; repeating the call pays for nothing twice.
        """
        if not len(prompts) == len(first) == len(second):
            raise UserError(f"{len(prompts)} prompts need as many answers, got {len(first)} and {len(second)}")
        rows = [
            (render(prompt), render(a, answer=True), render(b, answer=True))
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        asked = [(index, turned) for index, row in enumerate(rows) for turned in self._orders(*row)]
        replies = self._ask([self._request(*rows[index], turned) for index, turned in asked])
        scores: list[list[float]] = [[] for _ in rows]
        self.reasons = [None] * len(rows)
        for (index, turned), reply in zip(asked, replies, strict=True):
            shown_first, reason = self._read(reply)
            self.reasons[index] = reason or self.reasons[index]
            scores[index].append(1 - shown_first if turned else shown_first)
        means = [math.fsum(row) / len(row) if row else 0.5 for row in scores]
        self.failed += sum(map(math.isnan, means))
        return means

    def _ask(self, requests: list[ChatRequest]) -> list[Answer | Failure]:
        """The judge's replies; what cannot be read is not kept, and one that an earlier run left is asked for again."""
        replies = self.client.ask(requests, self._progress)
        unread = [i for i, reply in enumerate(replies) if self._is_unread(reply)]
        self.client.forget([requests[i] for i in unread])
        old = [i for i in unread if replies[i].cached]  # type: ignore[union-attr]  # what is unread is an answer
        if old:
            for i, reply in zip(old, self.client.ask([requests[i] for i in old], self._progress), strict=True):
                replies[i] = reply
            self.client.forget([requests[i] for i in old if self._is_unread(replies[i])])
        return replies

    def _is_unread(self, reply: Answer | Failure) -> bool:
        return isinstance(reply, Answer) and self._found(reply) is None

    def _found(self, answer: Answer) -> float | None:
        """P(the answer shown first is better), None where it cannot be read."""
        if self._by_logprobs:
            return logprob_preference(answer.first_token_logprobs or {}, self._letters)
        return letter_preference(answer.text, self._letters)

    def _orders(self, prompt: str, first: str, second: str) -> list[bool]:
        """In which orders a pair is shown; True is turned round."""
        if first == second:
            return []
        return [False, True] if self._both_orders else [is_switched(prompt, self._order_seed)]

    def _request(self, prompt: str, first: str, second: str, turned: bool) -> ChatRequest:
        shown = (second, first) if turned else (first, second)
        return ChatRequest(
            [{"role": "user", "content": self._template.fill(prompt, *shown)}],
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self._seed,
            top_logprobs=self._top_logprobs,
        )

    def _read(self, reply: Answer | Failure) -> tuple[float, str | None]:
        """P(the answer shown first is better), or NaN and why."""
        if isinstance(reply, Failure):
            return self._lost(reply.message)
        found = self._found(reply)
        if found is not None:
            return found, None
        if self._by_logprobs:
            return self._lost(f"neither of {self._named} is among the likeliest first tokens")
        return self._lost(f"the text names neither or both of {self._named}", f", such as {reply.text[:80]!r}")

    def _lost(self, reason: str, example: str = "") -> tuple[float, str]:
        # Token counts and the like differ from row to row.
        kind = re.sub(r"\d+", "#", reason)
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning(
                "A comparison has no result: %s%s. Later ones of the kind are only counted.", reason, example
            )
        return math.nan, reason + example.replace(", such as", ":")
