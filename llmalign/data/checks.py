"""Checks of single values of a row: text, conversations, numbers, flags and lists of them."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
UNREAD_MESSAGE_KEYS = ("tool_calls", "images", "image")  # they change what the model sees

Message = dict[str, str]
Content = str | list[Message]


class Fault(Exception):
    """What is wrong with one value; the caller adds the file and the row."""


def content(name: str, value: Any, conversational: bool) -> Content:
    """Text, or a list of messages with `role` and `content` alone, as the first row of the data has it. Raises Fault.

    Not covered: messages whose content is a list of parts, and tool calls; both are refused.
    """
    if value is None:
        raise Fault(f"{name!r} is null")
    if not isinstance(value, (str, list)):
        raise Fault(f"{name!r} must be text or a list of messages, not {_shown(value)}")
    if conversational and isinstance(value, str):
        raise Fault(f"{name!r} is text, but the rest of the data are conversations")
    if not conversational and isinstance(value, list):
        raise Fault(f"{name!r} is a list, but the rest of the data are plain text")
    if isinstance(value, str):
        return _text(name, value)
    if not value:
        raise Fault(f"{name!r} is a conversation without messages")
    return [_message(name, index, message) for index, message in enumerate(value, 1)]


def contents(name: str, value: Any, conversational: bool) -> list[Content]:
    """A list of texts or of conversations. Raises Fault."""
    items = _list(name, value)
    return [content(f"{name}[{index}]", item, conversational) for index, item in enumerate(items)]


def number(name: str, value: Any) -> float:
    """A finite number. Raises Fault."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Fault(f"{name!r} must be a number, not {_shown(value)}")
    if not math.isfinite(value):
        raise Fault(f"{name!r} is {value}, and only finite numbers can be trained on")
    return float(value)


def numbers(name: str, value: Any) -> list[float]:
    """A list of finite numbers. Raises Fault."""
    return [number(f"{name}[{index}]", item) for index, item in enumerate(_list(name, value))]


def score(name: str, value: Any) -> float | None:
    """A number, which may be missing (null) or not finite; the caller counts those. Raises Fault."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Fault(f"{name!r} must be a number or null, not {_shown(value)}")
    return float(value)


def scores(name: str, value: Any) -> list[float | None] | None:
    """A list of such numbers, or null where nothing was scored. Raises Fault."""
    if value is None:
        return None
    return [score(f"{name}[{index}]", item) for index, item in enumerate(_list(name, value))]


def flag(name: str, value: Any) -> bool:
    """True or false, also written as 1 or 0. Raises Fault."""
    if value not in (True, False):
        raise Fault(f"{name!r} must be true or false, not {_shown(value)}")
    return bool(value)


def ends_with_assistant(name: str, value: Content) -> None:
    """Raise Fault when a conversation that is to be learned ends with somebody else's words."""
    if isinstance(value, list) and value[-1]["role"] != "assistant":
        raise Fault(f"{name!r} ends with a message of the role {value[-1]['role']!r}, not of the assistant")


def from_cell(name: str, cell: Any, wanted: str) -> Any:
    """The value behind a CSV cell, which is always text: `text`, `number`, `flag` or `json`, or `score` or `scores`,
    which are null where the cell is empty. Raises Fault.
    """
    if wanted == "text":
        return cell
    if isinstance(cell, list):
        return [from_cell(f"{name}[{index}]", item, wanted) for index, item in enumerate(cell)]
    if wanted in ("score", "scores"):
        return from_cell(name, cell, "number" if wanted == "score" else "json") if cell.strip() else None
    if wanted == "flag":
        return {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
    parse: Callable[[str], Any] = float if wanted == "number" else json.loads
    try:
        return parse(cell)
    except ValueError as error:
        raise Fault(f"{name!r} must be {'a number' if wanted == 'number' else 'JSON'}, not {_shown(cell)}") from error


def pick(row: Any, source: str | Sequence[str]) -> Any:
    """The value at a column name or dotted path, element by element through lists; a list of names gives a list.

    Raises Fault naming what is not there.
    """
    if not isinstance(source, str):
        return [pick(row, name) for name in source]
    if isinstance(row, dict) and source in row:
        return row[source]
    value = row
    for part in source.split("."):
        value = [_step(item, part, source) for item in value] if isinstance(value, list) else _step(value, part, source)
    return value


def _step(value: Any, part: str, source: str) -> Any:
    if not isinstance(value, dict) or part not in value:
        raise Fault(f"has no {source!r}")
    return value[part]


def _text(name: str, value: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Fault(f"{name!r} holds half of a surrogate pair, which is not valid Unicode") from error
    return value


def _message(name: str, index: int, message: Any) -> Message:
    place = f"message {index} of {name!r}"
    if not isinstance(message, dict):
        raise Fault(f"{place} must have `role` and `content`, not be {_shown(message)}")
    if "role" not in message or "content" not in message:
        raise Fault(f"{place} must have `role` and `content`, it has: {', '.join(map(str, message)) or 'nothing'}")
    role, text = message["role"], message["content"]
    if role not in ROLES:
        raise Fault(f"{place} has the role {_shown(role)}; known are: {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise Fault(f"{place} must have text as its content, not {_shown(text)}")
    for key in UNREAD_MESSAGE_KEYS:
        if message.get(key):
            raise Fault(f"{place} has {key!r}, which is not supported")
    return {"role": role, "content": _text(f"message {index} of {name}", text)}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Fault(f"{name!r} must be a list, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
