"""The client for judges over HTTP: many questions at once, none asked twice, none lost, within a budget."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.errors import UserError
from llmalign.judges.cache import AnswerCache
from llmalign.judges.chat import Answer, ChatRequest, Completion, Failure, Question, request_key
from llmalign.judges.endpoint import Again, Endpoint, Halt, JudgeStopped, Refused

logger = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # seconds between two tries, unless the judge asks for more
MALFORMED_TRIES = 3
_SIGN_OF_LIFE = ChatRequest([{"role": "user", "content": "Reply with the letter A."}], top_logprobs=None)


class BudgetSpent(UserError):
    """The budget of requests or tokens is used up; every answer that came is kept."""


@dataclass
class _Call:
    """What the workers of one `ask` share."""

    waiting: deque[Question]
    results: dict[str, Answer | Failure]
    bar: Any
    started: float = field(default_factory=time.monotonic)
    written: int = 0
    halted: threading.Event = field(default_factory=threading.Event)
    spent: bool = False


class JudgeClient:
    """Asks a model behind an OpenAI-compatible endpoint, `concurrency` requests at once.

    Answers are kept in the SQLite file `cache` by the whole request, so a question is paid for once, whatever dies in
    between. Connection errors, HTTP 408, 409, 425, 429 and 5xx are tried again with growing waits (`backoff` seconds at
    first) for `patience` seconds; then a question of one word tells whether this row fails alone or everything stops.
    `timeout`: seconds for one request. `max_requests` and `max_tokens` bound what the budget called `budget` has spent
    in this cache file, earlier and killed runs included: every request that left this machine counts, also one that
    was answered by an error, and tokens as the judge reports them, so that requests in flight may exceed `max_tokens`.
    `extra_body`: further parameters of every request; None takes one out. `who` is what messages call it: one that is
    asked for answers, not for judgements, is no judge. The key comes from the environment variable
    `api_key_env` (None: no key) and appears nowhere.

    Raises UserError for settings that cannot be meant. Not covered: streams, and tokens of requests cut off by a kill.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        cache: Path | str,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 60.0,
        patience: float = 300.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        budget: str = "default",
        extra_body: Mapping[str, Any] | None = None,
        backoff: float = 0.5,
        who: str = "judge",
    ) -> None:
        if not model:
            raise UserError(f"a {who} needs the name of a model")
        if concurrency < 1 or not timeout > 0 or not patience >= 0 or not backoff > 0:
            raise UserError(f"a {who} needs concurrency >= 1, timeout > 0, patience >= 0 and backoff > 0")
        if min(max_requests or 0, max_tokens or 0) < 0:
            raise UserError("max_requests and max_tokens are at least 0, or null for no limit")
        self.model, self.budget, self._who = model, budget, who
        self._endpoint = Endpoint(base_url, model, api_key_env=api_key_env, timeout=timeout, who=who)
        self._cache = AnswerCache(cache)
        self._concurrency, self._patience, self._backoff = concurrency, patience, backoff
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._extra = dict(extra_body or {})
        self._lock = threading.Lock()
        self._jitter = random.Random()
        self._proven = self._gave_logprobs = self._silent = False
        self._pause_until = -1.0  # monotonic seconds
        #: distinct requests that were put to the judge, that the cache answered, and that failed
        self.asked, self.found, self.failed = 0, 0, 0
        #: HTTP requests that this client sent, tries included, and the tokens that the judge reported for them
        self.sent, self.tokens = 0, 0

    def __repr__(self) -> str:
        return f"JudgeClient({self.model!r}, {self._endpoint.url!r})"

    def __enter__(self) -> "JudgeClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def spent(self) -> tuple[int, int]:
        """Requests and tokens that the budget has spent, over all processes and runs."""
        return self._cache.spent(self.budget)

    def close(self) -> None:
        """Close connections and cache."""
        self._endpoint.close()
        self._cache.close()

    def check(self) -> None:
        """Raise UserError where the `openai` package or the API key is missing; nothing is sent."""
        self._endpoint.connect()

    def ask(self, requests: Sequence[ChatRequest], progress: bool = False) -> list[Answer | Failure]:
        """The judge's answer to each request, or why there is none; identical requests are sent once.

        Until the judge has answered for the first time it is asked one question at a time: what it cannot do costs one
        request. Raises JudgeStopped where it refuses the key or the model, gives no log-probs, or stays silent, and
        BudgetSpent; requests in flight are waited for, and what was answered is kept.
        """
        questions = [self._question(request) for request in requests]
        distinct = {question.key: question for question in questions}
        known = self._cache.find([key for key, question in distinct.items() if question.repeatable])
        self.found += len(known)
        with tqdm(
            total=len(distinct),
            initial=len(known),
            desc="Judging" if self._who == "judge" else "Asking",
            unit="request",
            disable=not progress,
        ) as bar:
            waiting = deque(question for key, question in distinct.items() if key not in known)
            call = _Call(waiting, dict(known), bar)
            self._show(call)
            if waiting:
                self._answer(call)
        return [call.results[question.key] for question in questions]

    def forget(self, requests: Sequence[ChatRequest]) -> None:
        """Let answers go that turned out to be none, so that a later call asks again."""
        if requests:
            self._cache.forget([self._question(request).key for request in requests])

    def _question(self, request: ChatRequest) -> Question:
        body = request.body(self.model, self._extra)
        return Question(body, request_key(self._endpoint.url, body))

    def _answer(self, call: _Call) -> None:
        total = len(call.waiting) + len(call.results)
        self._endpoint.connect()
        for _ in range(self._concurrency):
            if not self._proven:
                self._next(call)
        if call.waiting and not call.halted.is_set():
            workers = min(self._concurrency, len(call.waiting))
            with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
                try:
                    for done in as_completed([pool.submit(self._work, call) for _ in range(workers)]):
                        done.result()
                except BaseException:
                    call.halted.set()
                    raise
        if call.spent:
            answered = sum(isinstance(result, Answer) for result in call.results.values())
            raise BudgetSpent(self._spent_sentence(answered, total))

    def _work(self, call: _Call) -> None:
        try:
            while self._next(call):
                pass
        except BaseException:
            call.halted.set()  # before any other takes its next question
            raise

    def _next(self, call: _Call) -> bool:
        """Settle one question; False where none is left or the call has halted."""
        if call.halted.is_set():
            return False
        try:
            question = call.waiting.popleft()
        except IndexError:
            return False
        result = self._known_by_now(question) or self._settle(call, question)
        if result is None:
            return False
        with self._lock:
            call.results[question.key] = result
            self.failed += isinstance(result, Failure)
            call.written += result.completion_tokens if isinstance(result, Answer) and not result.cached else 0
            call.bar.update()
            self._show(call)
        return True

    def _known_by_now(self, question: Question) -> Answer | None:
        """The answer that another process has paid for since the call began."""
        if not question.repeatable:
            return None
        answer = self._cache.find([question.key]).get(question.key)
        if answer is not None:
            with self._lock:
                self.found += 1
        return answer

    def _settle(self, call: _Call, question: Question) -> Answer | Failure | None:
        """Ask until there is an answer or no hope of one; None where the call halted before."""
        until: float | None = None
        tries = malformed = 0
        last = False
        while (outcome := self._send(call, question, first=tries == 0)) is not None:
            if isinstance(outcome, Completion):
                return self._receive(question, outcome)
            if isinstance(outcome, Refused):
                return Failure(outcome.reason)
            tries, malformed = tries + 1, malformed + outcome.malformed
            if malformed >= MALFORMED_TRIES:
                return Failure(f"{outcome.reason}, {malformed} times")
            if last:
                return Failure(f"no answer within {self._patience:g} s ({outcome.reason}), though others are answered")
            now = time.monotonic()
            until = now + self._patience if until is None else until
            if outcome.after is not None and outcome.after > max(until - now, 0.0):
                raise self._silence(f"{outcome.reason}, asking to wait {outcome.after:g} s")
            if now < until:
                self._warn(outcome)
                call.halted.wait(min(self._delay(tries, outcome, now), until - now))
            elif self._lives(call, outcome):
                last = True
        return None

    def _send(self, call: _Call, question: Question, *, first: bool) -> Completion | Refused | Again | None:
        """Post once, on the books; None where the call is over. Raises JudgeStopped where the judge is to be left."""
        if not self._may_send(call):
            return None
        with self._lock:
            self.sent += 1
            self.asked += first
        outcome = self._endpoint.post(question.body)
        if isinstance(outcome, Halt):
            raise JudgeStopped(outcome.reason)
        with self._lock:
            if isinstance(outcome, Completion):
                self.tokens += outcome.answer.prompt_tokens + outcome.answer.completion_tokens
                self._silent = False
            elif isinstance(outcome, Again) and not outcome.sent:
                self.sent -= 1
        if isinstance(outcome, Again) and not outcome.sent:
            self._cache.give_back(self.budget)
        return outcome

    def _lives(self, call: _Call, outcome: Again) -> bool:
        """Whether the judge answers anything at all; False where the call is over. Raises JudgeStopped if it does not.

        Without it, one row that the judge cannot digest would look like a dead judge, in this run and in every next.
        """
        reply = self._send(call, self._question(_SIGN_OF_LIFE), first=False)
        if reply is None:
            return False
        if isinstance(reply, Again):
            raise self._silence(outcome.reason)
        if isinstance(reply, Completion):
            self._cache.keep(None, reply.answer, self.budget)
        return True

    def _may_send(self, call: _Call) -> bool:
        """Wait while the judge wants to be left alone, then book a request; False where the call is over."""
        while (left := self._pause_until - time.monotonic()) > 0 and not call.halted.is_set():
            call.halted.wait(left)
        if call.halted.is_set():
            return False
        if self._cache.take(self.budget, self._max_requests, self._max_tokens):
            return True
        call.spent = True
        call.halted.set()
        return False

    def _receive(self, question: Question, completion: Completion) -> Answer | Failure:
        answer = completion.answer
        reason = self._no_answer(question, completion)
        if reason is not None:
            self._cache.keep(None, answer, self.budget)
            return Failure(reason)
        if not question.wants_logprobs:
            answer = replace(answer, first_token_logprobs=None)
        self._cache.keep(question.key if question.repeatable else None, answer, self.budget)
        if self._max_tokens is not None and not completion.reported:
            raise JudgeStopped(
                f"the {self._who} at {self._endpoint.url} does not report the tokens it uses, so max_tokens cannot be "
                "kept; set max_requests in its place"
            )
        self._proven = True
        return answer

    def _no_answer(self, question: Question, completion: Completion) -> str | None:
        """Why a completion is no answer; raises JudgeStopped where the judge gives no log-probs at all."""
        if completion.filtered:
            return "the judge's provider withheld the answer (content filter)"
        if not question.wants_logprobs:
            return None
        if completion.answer.first_token_logprobs is not None:
            self._gave_logprobs = self._gave_logprobs or bool(completion.answer.first_token_logprobs)
            return None
        if not self._gave_logprobs:
            self._cache.keep(None, completion.answer, self.budget)
            raise JudgeStopped(
                f"the {self._who} {self.model!r} at {self._endpoint.url} returns no log-probs of its first token; read "
                "its answers as text (answers: text, or --answers text), or serve it with a server that returns them"
            )
        return "the judge returned no log-probs with this answer, though it did with others"

    def _silence(self, reason: str) -> JudgeStopped:
        return JudgeStopped(
            f"the {self._who} at {self._endpoint.url} has not answered within a patience of {self._patience:g} s "
            f"({reason}); what it answered before is kept: repeat the command when it is back"
        )

    def _delay(self, tries: int, outcome: Again, now: float) -> float:
        growing = min(self._backoff * 2 ** min(tries - 1, 20), LONGEST_WAIT) * self._jitter.uniform(0.5, 1.0)
        if outcome.after is None:
            return growing
        with self._lock:
            # Who is told to wait speaks for all: the others would be told the same, each at the cost of a request.
            self._pause_until = max(self._pause_until, now + outcome.after)
        return max(growing, outcome.after)

    def _warn(self, outcome: Again) -> None:
        with self._lock:
            first, self._silent = not self._silent, True
        if first:
            logger.warning(
                "The %s at %s does not answer (%s); it is asked again for up to %g s.",
                self._who, self._endpoint.url, outcome.reason, self._patience,
            )  # fmt: skip

    def _show(self, call: _Call) -> None:
        counts: dict[str, Any] = {"cached": self.found, "asked": self.asked, "failed": self.failed}
        if self._who != "judge":  # whose answers are a letter long
            counts["tokens/s"] = f"{call.written / max(time.monotonic() - call.started, 1e-9):.0f}"
        call.bar.set_postfix(refresh=False, **counts)

    def _spent_sentence(self, answered: int, total: int) -> str:
        requests, tokens = self.spent
        by_requests = self._max_requests is not None and requests >= self._max_requests
        limit, setting = (self._max_requests, "requests") if by_requests else (self._max_tokens, "tokens")
        return (
            f"the {self._who}'s budget {self.budget!r} of {limit} {setting} is spent ({requests} requests and {tokens} "
            f"tokens over all runs); {answered} of {total} questions are answered and kept in {self._cache.path}: "
            f"raise max_{setting} and repeat the command to go on"
        )
