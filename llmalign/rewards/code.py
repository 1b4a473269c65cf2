"""Rewards from unit tests: a problem's tests run on the program that a model wrote, both under lock.

The answer runs in one sandbox that only answers calls, the tests in a second one that the answer cannot reach, and
only counts come back, so nothing that a program prints, raises, patches or returns can pass a test but the right value.
"""

import keyword
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from llmalign.errors import UserError
from llmalign.rewards.sandbox.backends import Backend
from llmalign.rewards.sandbox.choice import find_backend
from llmalign.rewards.sandbox.pair import Job, SandboxError, run_pair

logger = logging.getLogger(__name__)

LEAST_MEMORY_MB, MOST_MEMORY_MB = 64, 1 << 20
# A fence is all of its signs, so that a long row of them is tried at one length, not at each.
_FENCE = re.compile(r"^[ \t]*((?:`{3,}(?!`)|~{3,}(?!~)))[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class TestResult:
    """Tests passed and tests there are; `error` is None when all passed, else a sentence on the first that did not."""

    __test__: ClassVar[bool] = False  # not a class of tests for pytest

    passed: int
    total: int
    error: str | None


def run_tests(
    program: str,
    tests: str | Sequence[str],
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
    `assert` (or a list of them), each of which counts; a top-level statement with asserts in it, or in functions of the
    tests that it calls, counts as one. entry_point: the function under test. timeout_s: seconds for all tests together,
    without the start of the interpreters. memory_mb: MiB for each sandbox. prompt: code whose helper functions the
    tests use; without it the program's first definition of a helper is the one that counts. backend: bubblewrap,
    landlock, or None for the first that works.

    A test passes when nothing in it fails and one of its asserts was reached, or an error of the answer's that it
    expects. Where nothing can be judged, whatever the program, the total is 0 and the error says why.

    Calls cross as literals: arguments are copies, so tests do not see changes that are made to them in place, and
    results are built-in values. Any other object is unsupported, and the error says so, unless the tests are about a
    class of the program (one that they name, or the entry point): its objects stay behind proxies that equal only
    themselves, can be called, and have their attributes read and set. Callables as arguments, async functions and
    classes of the prompt are unsupported too. Only the standard library can be imported.

    Raises UserError where no sandbox works and `allow_unsafe_execution` is not set, ValueError for arguments of another
    kind or out of range, and SandboxError (a RuntimeError) when a sandbox does not start, which says nothing of the
    program.
    """
    job = _job(program, tests, entry_point, prompt, timeout_s, memory_mb)
    return _run(find_backend(backend, allow_unsafe_execution=allow_unsafe_execution), job)


def _job(
    program: Any, tests: Any, entry_point: Any, prompt: Any, timeout_s: Any, memory_mb: Any, own_names: bool = True
) -> Job:
    """The job, once its parts are what they should be; ValueError, in one sentence, where one is not."""
    _check_limits(timeout_s, memory_mb)
    if not isinstance(tests, str) and isinstance(tests, Sequence) and all(isinstance(part, str) for part in tests):
        tests = "\n".join(tests)
    texts = {"program": program, "tests": tests, "prompt": prompt}
    for name, text in texts.items():
        if not isinstance(text, str):
            more = " or a list of such texts" if name == "tests" else ""
            raise ValueError(f"{name} must be Python source as text{more}, got {type(text).__name__}.")
    if not isinstance(entry_point, str) or not entry_point.isidentifier() or keyword.iskeyword(entry_point):
        raise ValueError(f"entry_point must be the name of a function, got {entry_point!r}.")
    if entry_point.startswith("__"):
        raise ValueError(f"entry_point must be a name of the program's own, got {entry_point!r}.")
    name = unicodedata.normalize("NFKC", entry_point)  # as Python does with the names in a source
    texts = {name: text.removeprefix("\ufeff") for name, text in texts.items()}
    return Job(**texts, entry_point=name, timeout_s=timeout_s, memory_mb=memory_mb, own_names=own_names)


def _check_limits(timeout_s: Any, memory_mb: Any) -> None:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 3600:
        raise ValueError(f"timeout_s must be a number of seconds in (0, 3600], got {timeout_s!r}.")
    whole = isinstance(memory_mb, int) and not isinstance(memory_mb, bool)
    if not whole or not LEAST_MEMORY_MB <= memory_mb <= MOST_MEMORY_MB:
        raise ValueError(
            f"memory_mb must be a whole number of MiB in [{LEAST_MEMORY_MB}, {MOST_MEMORY_MB}], got {memory_mb!r}."
        )


def _run(lock: Backend, job: Job) -> TestResult:
    report = run_pair(lock, job)
    if not report.total:
        missing = "There are no tests: neither a check(candidate) nor an assert that anything runs was found."
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
    name = re.escape(name)
    return re.search(rf"^(async\s+)?(def|class)\s+{name}\b|^{name}\s*=", code, re.MULTILINE) is not None


class CodeReward:
    """A reward function for TRL's trainers: the share of a problem's tests that a completion passes.

    Data set columns: `tests` and `entry_point` as for `run_tests` (a row without tests gets None), and optionally
    `code_prompt`, the code that every answer starts with (HumanEval's prompt; '' where there is none). With
    `prepend_prompt` the model's own text prompt is that code. Without either, tests that use anything but the entry
    point are not run, because an answer could bring its own version of it. A completion is text or chat messages, its
    program the fenced block if there is one.
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
        # Refuse before training starts.
        _check_limits(timeout_s, memory_mb)
        find_backend(backend, allow_unsafe_execution=allow_unsafe_execution)
        self.options: dict[str, Any] = {"timeout_s": timeout_s, "memory_mb": memory_mb}
        self.sandbox: dict[str, Any] = {"name": backend, "allow_unsafe_execution": allow_unsafe_execution}
        self._unusable: set[str] = set()  # what has been said of tests that cannot be run

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One score in [0, 1] for each completion, None where the row has no usable tests or no sandbox started.

        Raises UserError for a missing column and for prompts that are not text where `prepend_prompt` needs them.
        """
        for name in ("tests", "entry_point"):
            if columns.get(name) is None:
                raise UserError(
                    f"The code reward reads the column {name!r} and is not given it: name it in reward_columns, or "
                    "columns: {" + name + ": THE DATA'S NAME}"
                )
        heads = columns.get("code_prompt") or [None] * len(completions)
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
        self, head: str | None, completion: Any, tests: str | Sequence[str] | None, entry_point: str | None
    ) -> TestResult | str:
        """The result, or a sentence where the row or the sandbox is at fault."""
        if not tests or not entry_point:
            return TestResult(0, 0, f"The row has no {'entry_point' if tests else 'tests'}.")
        try:
            code = extract_program(_text_of(completion), str(entry_point))
            known = head is not None
            head = head or ""
            program = f"{head}\n{code}" if head and _defines(code, str(entry_point)) else head + code
            job = _job(program, tests, entry_point, head, own_names=known, **self.options)
            return _run(find_backend(**self.sandbox), job)
        except (SandboxError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def _score(self, result: TestResult | str) -> float | None:
        if not isinstance(result, TestResult) or not result.total:
            return None
        if self.all_or_nothing:
            return float(result.passed == result.total)
        return result.passed / result.total

    def _log(self, results: Sequence[TestResult | str]) -> None:
        judged = [result for result in results if isinstance(result, TestResult) and result.total]
        for row, result in enumerate(results):
            if isinstance(result, str):
                logger.warning("Code reward: completion %d was not judged. %s", row, result)
            elif not result.total:
                self._log_unusable(row, result.error or "")
            elif result.error:
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

    def _log_unusable(self, row: int, error: str) -> None:
        level = logging.DEBUG if error in self._unusable else logging.WARNING  # else once for every row of an epoch
        self._unusable.add(error)
        logger.log(level, "Code reward: the tests of completion %d cannot be used. %s", row, error)


@lru_cache(maxsize=1)
def _with_defaults() -> CodeReward:
    return CodeReward()


def code_reward(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """`CodeReward()` as a function, for recipes: `reward_funcs: [llmalign.rewards.code:code_reward]`."""
    return _with_defaults()(prompts, completions, completion_ids, **columns)


def _text_of(completion: Any) -> str:
    """The text of a completion: itself, or its last message's, whose parts are joined; '' where it says nothing.

    ValueError for anything else.
    """
    said = completion
    if isinstance(said, list):
        said = said[-1] if said else ""
        if isinstance(said, Mapping):
            said = said.get("content")
    if isinstance(said, list):
        said = "".join(part.get("text") or "" if isinstance(part, Mapping) else str(part) for part in said)
    if said is None:
        return ""
    if not isinstance(said, str):
        raise ValueError(f"A completion must be text or chat messages with text, got {type(said).__name__}.")
    return said


def _reason(error: str) -> str:
    """The kind of a failure: what is left of a sentence without the numbers and the texts of the case."""
    found = re.search(r"unsupported|Timeout|redefines|protocol|sandbox|\b[A-Z]\w*(?:Error|Exception|Exit)\b", error)
    return found.group() if found else "other"
