"""HTML and SVG made of elements: whatever is not markup already is escaped, so that data stays text."""

import html
import json
import math
from collections.abc import Mapping
from typing import Any


class Html(str):
    """Text that is markup, made by this module alone."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element; `cls` is `class`, other underscores in attributes are hyphens, None and False leave one out."""
    shown = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in VOID:
        return Html(f"<{tag}{shown}>")
    return Html(f"<{tag}{shown}>{join(*children)}</{tag}>")


def join(*parts: Any) -> Html:
    """Parts one after the other; None is nothing, and lists are taken apart."""
    return Html("".join(_text(part) for part in parts))


def data_block(name: str, content: Any) -> Html:
    """JSON inside of the page that no content can break out of. Raises ValueError for NaN and infinities."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def table(head: list[Any] | None, rows: list[list[Any]], *, caption: Any = None, cls: str | None = None) -> Html:
    """A table in a box that scrolls on its own; the first cell of a row is its heading, `head` those of columns."""
    top = el("thead", el("tr", [el("th", cell, scope="col") for cell in head])) if head else None
    body = [
        el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]])
        for row in rows
    ]  # fmt: skip
    inner = el("table", el("caption", caption) if caption else None, top, el("tbody", body), cls=cls)
    return el("div", inner, cls="scroll", tabindex="0", role="region", aria_label=caption or "table")


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one: files are written by many hands."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float can hold
        return None


def say(value: float | None, digits: int | None = None) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}" if digits is not None else _short(value)
    return text.replace("-", "−") if text.strip("-0.,") else text.lstrip("-")


def interval(mean: float | None, low: float | None, high: float | None, *, digits: int = 1, scale: float = 1.0) -> str:
    """`mean [low, high]`, all times `scale`; the mean alone where no interval is known."""
    if mean is None or low is None or high is None:
        return say(None if mean is None else scale * mean, digits)
    return f"{say(scale * mean, digits)} [{say(scale * low, digits)}, {say(scale * high, digits)}]"


VOID = frozenset({"meta", "br", "img", "input", "link"})


def _short(value: float) -> str:
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.2e}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = "class" if name == "cls" else name.strip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def _text(part: Any) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return part
    if isinstance(part, list | tuple):
        return "".join(_text(one) for one in part)
    return html.escape(str(part), quote=False)
