"""Reward functions in Python: found by import path, and guarded, so that one bad row never loses a batch.

A reward function has TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`: one
number a completion, None where the function does not apply to it. A function may be `async`; TRL then runs all such
functions at once. One for images (`llmalign.rewards.images`) is handed `images` in place of the completions.

What is imported is what the user's own recipe or command names, `package.module:function` or
`path/to/file.py:function`, with the rights of whoever runs the training. No data set, model or Hub page can name code.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
NOT_A_REWARD = float("nan")
LARGEST = torch.finfo(torch.float32).max  # rewards are kept in float32
PASSED_ON = (UserError, MemoryError, torch.OutOfMemoryError)
LOGGED_MESSAGES = 20  # distinct ones; messages that quote their row would fill the log
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def load_function(name: str, *, folder: Path | None = None) -> RewardFunction:
    """The function that `package.module:function` or `path/to/file.py:function` names, unguarded.

    A module is looked up as `import` does; a file's path is relative to `folder`, else to the working directory.
    `function` may be dotted (`Class.method`). Raises UserError where the module, the file or the function is not there,
    where importing it fails, and where it is a class or nothing that can be called.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not _MODULE.fullmatch(attribute):
        raise UserError(
            f"{name!r} names no reward function: write package.module:function, or path/to/file.py:function."
        )
    module = _from_file(name, folder or Path(), place) if place.endswith(".py") else _from_path(name, place)
    found: Any = module
    for part in attribute.split("."):
        if part not in dir(found):
            known = [
                key for key in dir(found) if not key.startswith("_") and callable(inspect.getattr_static(found, key))
            ]
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise UserError(f"{name!r}: {place} has no {part!r}{hint}.")
        found = getattr(found, part)
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"{type(found).__name__}, which cannot be called"
        raise UserError(f"{name!r} is {kind}: name a function (or a callable object) that returns a list of rewards.")
    return found


def source_digest(function: Any) -> str:
    """The hash of the file that a function comes from: another version of it is another oracle."""
    while isinstance(function, partial):
        function = function.func
    found = inspect.unwrap(function)
    code = found if inspect.isfunction(found) or inspect.ismethod(found) else type(found)
    if code.__module__ == "builtins":  # written in C: its name is all there is
        return str(found)
    path = inspect.getsourcefile(code)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else str(found)


def _from_path(name: str, place: str) -> ModuleType:
    if not _MODULE.fullmatch(place):
        raise UserError(f"{name!r}: {place!r} is no module's name; a file of your own is path/to/file.py:function.")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(
                f"{name!r}: there is no module {place!r} on Python's path; install it, or name a file of your own as "
                "path/to/file.py:function."
            ) from error
        raise _import_failed(name, error) from error
    except Exception as error:
        raise _import_failed(name, error) from error


def _from_file(name: str, folder: Path, place: str) -> ModuleType:
    path = next((path for path in (folder / place, Path(place)) if path.is_file()), None)
    if path is None:
        where = "in the working directory" if folder == Path() else f"in {folder} or in the working directory"
        raise UserError(f"{name!r}: there is no file {place} {where}.")
    # The whole path is in the name: two files called rewards.py are two modules.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_name = f"llmalign_reward_{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failed(name, error) from error
    return module


def _import_failed(name: str, error: Exception) -> UserError:
    return UserError(f"{name!r} could not be imported: {_shown(error)}.")


@dataclass(frozen=True)
class Failure:
    """A row without a reward: its index in the batch, its `row_id` where the batch has that column, and why."""

    row: int
    row_id: Any
    message: str

    def __str__(self) -> str:
        own = "" if self.row_id is None else f" (row_id {self.row_id})"
        return f"row {self.row}{own}: {self.message}"


class Guarded:
    """A reward function whose bad rows cost themselves alone; it is called as the function is.

    Returns a list of as many rewards as prompts: floats, None where the function says that it does not apply, and NaN
    for a row that failed (NaN, infinite, no number, or an exception), which a trainer must leave out of its loss. Where
    the whole batch raises, or comes back in another length, the function is called again row by row; a function that
    compares the rows of its batch, or has side effects, sees that. `failed` lists the failures of the last call,
    `count` counts all, `messages` by message; each distinct message is logged once. A UserError and
    a lack of memory are passed on, or kept in `held` under `holding_back`, for whoever must not fail before other
    processes do; no row has a reward then. Not covered: a function that never returns, and one that fails on every
    row, which whoever sees all rows must notice.
    """

    held: Exception | None = None
    _holds_back = False

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        self.function = function
        self.__name__ = name or _name_of(function)
        self.failed: list[Failure] = []
        self.count = 0
        self.messages: Counter[str] = Counter()
        self._said = False

    def __call__(self, prompts: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward a prompt; `columns` holds what is scored (`completions` with `completion_ids`, or `images`), the
        data set's columns and what TRL passes beside.
        """
        whole = {"prompts": prompts, **columns}
        try:
            rewards = self._rewards(whole, len(prompts))
        except PASSED_ON as error:
            return self._passed_on(error, len(prompts))
        return self._checked(rewards, columns)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Keep in `held` what a batch would pass on; what was kept before is forgotten."""
        self._holds_back, self.held = True, None
        try:
            yield
        finally:
            self._holds_back = False

    def _rewards(self, whole: dict[str, Any], count: int) -> list[Any]:
        """The function's answer, row by row where it has none for the batch."""
        try:
            return _as_list(self.function(**whole), count)
        except PASSED_ON:
            raise
        except Exception as error:
            self._say_row_by_row(error)
            return [self._one(arguments) for arguments in _rows(whole)]

    def _one(self, arguments: dict[str, Any]) -> Any:
        """The reward of one row, or the exception that it raised."""
        try:
            return _as_list(self.function(**arguments), 1)[0]
        except PASSED_ON:
            raise
        except Exception as error:
            return error

    def _passed_on(self, error: Exception, count: int) -> list[float | None]:
        if not self._holds_back:
            raise error
        self.held, self.failed = error, []
        return [NOT_A_REWARD] * count

    def _checked(self, rewards: list[Any], columns: dict[str, Any]) -> list[float | None]:
        row_ids = _row_ids(columns, len(rewards))
        results: list[float | None] = []
        self.failed = []
        for row, reward in enumerate(rewards):
            value, fault = _number(reward)
            if fault is not None:
                self.failed.append(Failure(row, row_ids[row], fault))
            results.append(value)
        self._record()
        return results

    def _record(self) -> None:
        self.count += len(self.failed)
        for failure in self.failed:
            new = failure.message not in self.messages
            self.messages[failure.message] += 1
            if not new or len(self.messages) > LOGGED_MESSAGES:
                continue
            logger.warning(
                "Reward function %s, %s; the row has no reward. Rows with the same message are counted and not logged.",
                self.__name__, failure,
            )  # fmt: skip
            if len(self.messages) == LOGGED_MESSAGES:
                logger.warning("Reward function %s: further messages are counted and not logged.", self.__name__)

    def _say_row_by_row(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "Reward function %s failed on a whole batch (%s); it is called again row by row, now and whenever that "
                "happens.",
                self.__name__, _shown(error),
            )  # fmt: skip


class AsyncGuarded(Guarded):
    """The same for an async function; a coroutine, as TRL expects of one, and rows are called one after the other."""

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """One reward a prompt."""
        whole = {"prompts": prompts, **columns}
        try:
            rewards = await self._rewards_async(whole, len(prompts))
        except PASSED_ON as error:
            return self._passed_on(error, len(prompts))
        return self._checked(rewards, columns)

    async def _rewards_async(self, whole: dict[str, Any], count: int) -> list[Any]:
        try:
            return _as_list(await self.function(**whole), count)
        except PASSED_ON:
            raise
        except Exception as error:
            self._say_row_by_row(error)
            return [await self._one_async(arguments) for arguments in _rows(whole)]

    async def _one_async(self, arguments: dict[str, Any]) -> Any:
        try:
            pending: Awaitable[Any] = self.function(**arguments)
            return _as_list(await pending, 1)[0]
        except PASSED_ON:
            raise
        except Exception as error:
            return error


def guard(function: RewardFunction, name: str | None = None) -> Guarded:
    """The function under a guard, async where it is; a guarded one comes back as it is."""
    if isinstance(function, Guarded):
        return function
    return AsyncGuarded(function, name) if _is_async(function) else Guarded(function, name)


def _is_async(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    named = inspect.isroutine(function) or "__name__" in vars(function)
    return function.__name__ if named else type(function).__name__


def _as_list(rewards: Any, count: int) -> list[Any]:
    """The function's answer as a list of `count`. Raises ValueError saying what it was instead."""
    if isinstance(rewards, (str, bytes, dict)):
        raise ValueError(f"gave a {type(rewards).__name__} instead of a list of {count} rewards")
    try:
        found = list(rewards)
    except TypeError as error:
        raise ValueError(f"gave {_brief(rewards)} instead of a list of {count} rewards") from error
    if len(found) != count:
        raise ValueError(f"gave {len(found)} rewards instead of {count}")
    return found


def _rows(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each row: lists of the batch's length are cut, all else (TRL's state, log functions) stays."""
    count = len(whole["prompts"])

    def cut(value: Any, row: int) -> Any:
        return value[row : row + 1] if isinstance(value, (list, tuple)) and len(value) == count else value

    return [{key: cut(value, row) for key, value in whole.items()} for row in range(count)]


def _row_ids(columns: dict[str, Any], count: int) -> list[Any]:
    found = columns.get("row_id")
    return list(found) if isinstance(found, Sequence) and len(found) == count else [None] * count


def _number(reward: Any) -> tuple[float | None, str | None]:
    """A reward as a float or None, and what is wrong with it."""
    if reward is None:
        return None, None
    if isinstance(reward, Exception):
        return NOT_A_REWARD, _shown(reward)
    try:
        value = None if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError):
        value = None
    if value is None:
        return NOT_A_REWARD, f"gave {_brief(reward)}, which is no number"
    return (value, None) if abs(value) <= LARGEST else (NOT_A_REWARD, f"gave {value}")


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    # What the guard itself found needs no type before it.
    return text if type(error) is ValueError and text.startswith("gave ") else f"{type(error).__name__}: {text}"


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
