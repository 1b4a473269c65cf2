"""Rewards from unit tests: a problem's tests run on the program that a model wrote, both under lock.

The answer runs in one sandbox that only answers calls, the tests in a second one that the answer cannot reach, and
only counts come back, so nothing that a program prints, raises, patches or returns can pass a test but the right value.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from llmalign.errors import UserError
from llmalign.rewards.sandbox.backends import Backend
from llmalign.rewards.sandbox.choice import find_backend
from llmalign.rewards.sandbox.pair import Job, SandboxError, run_pair

logger = logging.getLogger(__name__)

LEAST_MEMORY_MB = 64
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*[\w+-]*[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class TestResult:
    """Tests passed and tests there are; `error` is None when all passed, else a sentence on the first that did not."""

    __test__: ClassVar[bool] = False  # not a class of tests for pytest

    passed: int
    total: int
    error: str | None


def run_tests(
    program: str,
    tests: str,
    entry_point: str,
    timeout_s: float = 5,
    memory_mb: int = 512,
    *,
    prompt: str = "",
    backend: str | None = None,
    allow_unsafe_execution: bool = False,
) -> TestResult:
    """Runs `tests` on `program`, each in a sandbox of its own, and counts the tests that pass.

    program: Python source, for HumanEval the prompt and the completion after it. tests: either a definition of
    `check(candidate)`, which counts as one test and is called once whatever calls of it the text has, or lines of
    `assert`, each of which counts (a top-level loop with asserts in it counts as one). entry_point: the function under
    test. timeout_s: seconds for all tests together, without the start of the interpreters. memory_mb: MiB for each
    sandbox. prompt: code whose helper functions the tests use; without it the program's first definition of a helper
    is the one that counts. backend: bubblewrap, landlock, or None for the first that works.

    Calls cross as literals: arguments are copies, so tests do not see changes that are made to them in place; results
    are built-in values, and any other object stays behind a proxy that equals only itself and can be called, and have
    its attributes read and set. Callables as arguments are unsupported and the error says so. Only the standard
    library can be imported. Raises UserError where no sandbox works and `allow_unsafe_execution` is not set, ValueError
    for limits out of range, and SandboxError (a RuntimeError) when a sandbox does not start, which says nothing of the
    program.
    """
    if not 0 < timeout_s <= 3600 or memory_mb < LEAST_MEMORY_MB:
        raise ValueError(
            f"timeout_s must be in (0, 3600] and memory_mb at least {LEAST_MEMORY_MB}; got {timeout_s} and {memory_mb}."
        )
    if not entry_point.isidentifier():
        raise ValueError(f"entry_point must be the name of a function, got {entry_point!r}.")
    lock = find_backend(backend, allow_unsafe_execution=allow_unsafe_execution)
    return _run(lock, Job(program, tests, entry_point, prompt, timeout_s, memory_mb))


def _run(lock: Backend, job: Job) -> TestResult:
    report = run_pair(lock, job)
    if not report.total:
        missing = "There are no tests: neither a check(candidate) nor a top-level assert was found."
        return TestResult(0, 0, report.error or missing)
    if report.passed == report.total:
        return TestResult(report.passed, report.total, None)
    return TestResult(report.passed, report.total, report.error or "The tests ended early.")


def extract_program(completion: str, entry_point: str) -> str:
    """The code of a completion: its last fenced block that defines `entry_point`, else its last block, else all of it.

    A block that is never closed, as in a completion that was cut off, goes on to the end.
    """
    blocks = [match.group(2) for match in _FENCE.finditer(completion)]
    if not blocks:
        return completion
    return next((block for block in reversed(blocks) if _defines(block, entry_point)), blocks[-1])


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(async\s+)?def\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE) is not None


class CodeReward:
    """A reward function for TRL's trainers: the share of a problem's tests that a completion passes.

    Data set columns: `tests` and `entry_point` as for `run_tests` (a row without tests gets None), and optionally
    `code_prompt`, the code that every answer starts with (HumanEval's prompt). With `prepend_prompt` the model's own
    text prompt is that code. A completion is text or chat messages, its program the fenced block if there is one.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        all_or_nothing: bool = False,
        prepend_prompt: bool = False,
        timeout_s: float = 5,
        memory_mb: int = 512,
        backend: str | None = None,
        allow_unsafe_execution: bool = False,
    ) -> None:
        """workers: pairs of sandboxes at once (default: cores of this process); the rest as for `run_tests`."""
        self.__name__ = "code_reward"
        self.workers = workers or len(os.sched_getaffinity(0))
        if self.workers < 1:
            raise UserError(f"A code reward needs at least one worker, got {workers}.")
        self.all_or_nothing = all_or_nothing
        self.prepend_prompt = prepend_prompt
        self.options: dict[str, Any] = {
            "timeout_s": timeout_s,
            "memory_mb": memory_mb,
            "backend": backend,
            "allow_unsafe_execution": allow_unsafe_execution,
        }
        find_backend(backend, allow_unsafe_execution=allow_unsafe_execution)  # refuse before training starts

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One score in [0, 1] for each completion, None where the row has no tests or its sandbox did not start.

        Raises UserError for a missing column and for prompts that are not text where `prepend_prompt` needs them.
        """
        for name in ("tests", "entry_point"):
            if columns.get(name) is None:
                raise UserError(f"The code reward reads the column {name!r}, which the data set does not have.")
        heads = columns.get("code_prompt") or ([""] * len(completions))
        if self.prepend_prompt:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("prepend_prompt needs prompts that are text; give chat rows a column `code_prompt`.")
            heads = prompts
        rows = list(zip(heads, completions, columns["tests"], columns["entry_point"], strict=True))
        with ThreadPoolExecutor(min(self.workers, max(1, len(rows)))) as pool:
            results = list(pool.map(lambda row: self._judge(*row), rows))
        self._log(results)
        return [self._score(result) for result in results]

    def _judge(
        self, head: str | None, completion: Any, tests: str | None, entry_point: str | None
    ) -> TestResult | str | None:
        """The result; None for a row without tests; a sentence where the sandbox failed."""
        if not tests or not entry_point:
            return None
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        code = extract_program(text, entry_point)
        head = head or ""
        program = f"{head}\n{code}" if head and _defines(code, entry_point) else head + code
        try:
            return run_tests(program, tests, entry_point, prompt=head, **self.options)
        except (SandboxError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def _score(self, result: TestResult | str | None) -> float | None:
        if not isinstance(result, TestResult) or not result.total:
            return None
        if self.all_or_nothing:
            return float(result.passed == result.total)
        return result.passed / result.total

    def _log(self, results: Sequence[TestResult | str | None]) -> None:
        judged = [result for result in results if isinstance(result, TestResult) and result.total]
        for row, result in enumerate(results):
            if isinstance(result, str):
                logger.warning("Code reward: completion %d was not judged. %s", row, result)
            elif isinstance(result, TestResult) and not result.total:
                logger.warning("Code reward: the tests of completion %d cannot be used. %s", row, result.error)
            elif result is not None and result.error:
                logger.debug("Completion %d passed %d of %d tests. %s", row, result.passed, result.total, result.error)
        reasons = Counter(_reason(result.error) for result in judged if result.error)
        logger.info(
            "Code reward: %d of %d completions pass all their tests, %d of %d tests pass; failures: %s.",
            sum(result.error is None for result in judged),
            len(judged),
            sum(result.passed for result in judged),
            sum(result.total for result in judged),
            ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none",
        )


def _reason(error: str) -> str:
    """The kind of a failure: what is left of a sentence without the numbers and the texts of the case."""
    found = re.search(r"unsupported|Timeout|redefines|protocol|sandbox|\b[A-Z]\w*(?:Error|Exception|Exit)\b", error)
    return found.group() if found else "other"
