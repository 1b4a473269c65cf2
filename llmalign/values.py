"""Recipe values made into the type that a config field declares."""

import math
from collections.abc import Callable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from llmalign.errors import UserError
from llmalign.secrets import hidden


class _NotConvertible(Exception):
    pass


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or UserError naming `key` and what it takes.

    YAML 1.1 reads `5e-7` as text and `no` as a boolean: both become what the field asks for. Not covered: the element
    types of mappings.
    """
    options = _options(hint)
    if value is None and NoneType in options:
        return None
    matching = [option for option in options if _matches(value, option)]
    if isinstance(value, str) and float in options:
        matching = [float, *matching]  # 1e-1 is text to YAML 1.1, but no word that such a field knows
    for option in (*matching, *options):
        try:
            return _as(value, option)
        except _NotConvertible:
            continue
    raise UserError(f"`{key}` takes {describe(hint)}, got {hidden(value, key)!r}.")


def parse_text(key: str, text: str, hint: Any) -> Any:
    """A value typed on the command line as the type `hint`: read as YAML, except where the field is plain text."""
    kinds = [option for option in _options(hint) if option is not NoneType]
    if kinds == [str]:
        return None if text in ("null", "~", "") and NoneType in _options(hint) else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return convert(key, value, hint)


def describe(hint: Any) -> str:
    """A type hint in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    words = []
    for option in _options(hint):
        origin = get_origin(option) or option
        if origin is Literal:
            words.append(" or ".join(str(choice) for choice in get_args(option)))
        elif isinstance(origin, type) and issubclass(origin, Enum):
            words.append(" or ".join(str(member.value) for member in origin))
        elif origin in names:
            words.append(names[origin])
        else:
            words.append({list: "a list", dict: "a mapping"}.get(origin, str(option)))
    return ", or ".join(dict.fromkeys(words))


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [inner for option in get_args(hint) for inner in _options(option)]
    return [hint]


def _matches(value: Any, option: Any) -> bool:
    origin = get_origin(option) or option
    return isinstance(origin, type) and type(value) is origin


def _as(value: Any, option: Any) -> Any:
    origin = get_origin(option) or option
    if origin is Any:
        return value
    if origin is Literal:
        return _choice(value, get_args(option))
    if isinstance(origin, type) and issubclass(origin, Enum):
        return origin(_choice(value, [member.value for member in origin]))
    converters: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _text, dict: _dict}
    if origin is list:
        return _list(value, get_args(option))
    if origin not in converters:
        raise _NotConvertible
    return converters[origin](value)


def _choice(value: Any, choices: Any) -> Any:
    if value is False and "no" in choices:
        return "no"
    if value not in choices:
        raise _NotConvertible
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _NotConvertible
    return value


def _int(value: Any) -> int:
    number = _float(value)
    if number != int(number):
        raise _NotConvertible
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _NotConvertible
    try:
        number = float(value)
    except ValueError as error:
        raise _NotConvertible from error
    if not math.isfinite(number):
        raise _NotConvertible
    return value if isinstance(value, int) else number


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _NotConvertible
    return str(value)


def _dict(value: Any) -> dict:
    if not isinstance(value, dict):
        raise _NotConvertible
    return value


def _list(value: Any, element: tuple[Any, ...]) -> list:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (dict, list)) for item in items) and element and element[0] in (str, int, float, bool):
        raise _NotConvertible
    return [_as(item, element[0]) if element else item for item in items]
