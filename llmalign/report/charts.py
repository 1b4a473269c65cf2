"""Charts as inline SVG: lines, intervals and points, each with its numbers as a table beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmalign.report.markup import Html, el, join, say, table
from llmalign.report.scales import Point, Scale, rounded, thinned, ticks, widened

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
COLOURS = 6
MOST_TABLE_ROWS = 40


@dataclass(frozen=True)
class Series:
    """A line: `colour` is the run's, `kind` is train, held or path, `dash` tells several of one run apart."""

    name: str
    colour: int
    points: Sequence[Point]
    kind: str = "held"
    dash: int = 0


@dataclass(frozen=True)
class Mark:
    """A value with its interval; `x` is its place across in a scatter. `quiet` marks are those to compare with."""

    name: str
    colour: int | None
    value: float
    low: float | None = None
    high: float | None = None
    x: float = 0.0
    note: str = ""
    hollow: bool = False

    def text(self, digits: int = 1) -> str:
        """The value and its interval in words."""
        if self.low is None or self.high is None:
            return say(self.value, digits)
        return f"{say(self.value, digits)} [{say(self.low, digits)}, {say(self.high, digits)}]"


@dataclass(frozen=True)
class Group:
    """Marks under one heading of an interval chart."""

    name: str
    marks: list[Mark] = field(default_factory=list)


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_name: str = "step",
    x_unit: str = "optimizer step",
    level: float | None = None,
) -> Html:
    """Lines over steps, or paths through a plane; `level` is marked where it lies inside the drawing."""
    series = sorted(series, key=lambda one: one.kind != "train")  # the strong lines lie on top
    thin = [(one, thinned(one.points)) for one in series]
    every = [point for _, points in thin for point in points]
    across = Scale(*widened([x for x, _ in every], margin=0.02), LEFT, WIDTH - RIGHT)
    up = Scale(*widened([y for _, y in every]), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up, level)]
    for one, points in thin:
        parts.append(_line(one, [(across(x), up(y)) for x, y in points]))
    data = {
        "x": across.as_list(), "y": up.as_list(), "xname": x_name,
        "series": [[_label(one), one.colour % COLOURS, [[rounded(x), rounded(y)] for x, y in points]]
                   for one, points in thin],
        "path": any(one.kind == "path" for one in series),
    }  # fmt: skip
    described = f"{title}, {unit}. " + "; ".join(_summary(one) for one in series)
    drawing = _svg(title, described, HEIGHT, join(*parts), data_plot=json.dumps(data, separators=(",", ":")))
    values = _paths_table(series, x_unit, unit) if data["path"] else _series_table(series, x_name)
    return _figure(title, unit, drawing, values, x_unit)


def interval_chart(
    title: str,
    unit: str,
    groups: Sequence[Group],
    *,
    level: float | None = None,
    digits: int = 1,
    note: str | None = None,
) -> Html:
    """Values with intervals on one axis, a heading a group; where each is of one run, with its first mark's numbers."""
    marks = [mark for group in groups for mark in group.marks]
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None]
    across = Scale(*widened(ends + ([] if level is None else [level])), 8, WIDTH - 8)
    single = all(len({mark.colour for mark in group.marks}) == 1 for group in groups)
    parts: list[Any] = []
    y = 4.0
    for group in groups:
        y += 15
        parts.append(el("text", _cut(group.name, 30 if single else 50), x=8, y=y, cls="name"))
        if single:
            parts.append(el("text", group.marks[0].text(digits), x=WIDTH - 8, y=y, cls="value", text_anchor="end"))
            y -= 3
        for mark in group.marks:
            y += 16 if mark is group.marks[0] or not single else 12
            parts.append(_interval(mark, across, y, digits))
        y += 11
    height = y + 24
    axis = [_vertical(across(value), 8, y, say(value), height - 8) for value in ticks(across.low, across.high)]
    if level is not None and across.low < level < across.high:
        axis.append(el("line", x1=across(level), x2=across(level), y1=8, y2=y, cls="level"))
    described = f"{title}, {unit}. " + "; ".join(
        f"{group.name}, {mark.name}: {mark.text(digits)}" for group in groups for mark in group.marks
    )
    drawing = _svg(title, described, height, join(axis, parts), data_marks=True)
    rows = [[group.name, mark.name, mark.text(digits + 1), mark.note] for group in groups for mark in group.marks]
    head = ["", "of", "value", ""]
    if all(row[0] == row[1] for row in rows):
        head, rows = ["", *head[2:]], [row[1:] for row in rows]
    return _figure(title, unit, drawing, table(head, rows, caption=f"{title}, {unit}"), note=note)


def scatter_chart(
    title: str, unit: str, x_unit: str, marks: Sequence[Mark], *, level: float | None = None, line: Any = None,
    sizes: Sequence[float] | None = None, digits: int = 1, rounds: bool = False, note: str | None = None,
) -> Html:  # fmt: skip
    """Points in a plane with vertical intervals; `line` is (slope, intercept), `sizes` are shares of the area.

    `rounds` says that the places across are whole numbers, and that a run's marks follow each other.
    """
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None]
    across = Scale(*widened([mark.x for mark in marks], margin=0.14), LEFT, WIDTH - RIGHT)
    up = Scale(*widened(ends + ([] if level is None else [level]), margin=0.1), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up, level, whole=rounds)]
    if line is not None:
        parts.append(_fit(across, up, *line))
    if rounds:
        for colour in sorted({mark.colour for mark in marks if mark.colour is not None}):
            path = "L".join(f"{across(mark.x)} {up(mark.value)}" for mark in marks if mark.colour == colour)
            parts.append(el("path", d=f"M{path}", cls=f"s{colour % COLOURS} line train"))
    for place, mark in enumerate(marks):
        x, y = across(mark.x), up(mark.value)
        bar = _upright(mark, x, up)
        size = 5.0 if sizes is None else 2.5 + 14 * sizes[place] ** 0.5
        tip = f"{mark.name}\n{mark.text(digits)} at {say(mark.x)}" + (f"\n{mark.note}" if mark.note else "")
        parts.append(_marked(mark, join(bar, shape(mark, x, y, size)), x, y, tip))
    described = f"{title}, {unit} over {x_unit}. " + "; ".join(
        f"{mark.name}: {mark.text(digits)} at {say(mark.x)}" for mark in marks
    )
    drawing = _svg(title, described, HEIGHT, join(*parts), data_marks=True)
    rows = [[mark.name, say(mark.x), mark.text(digits + 1), mark.note] for mark in marks]
    return _figure(title, unit, drawing, table(["", x_unit, unit, ""], rows, caption=title), x_unit, note=note)


def shape(mark: Mark, x: float, y: float, size: float = 5.0) -> Html:
    """A mark's symbol: another shape for every run, so that colour is never all that tells them apart."""
    cls = "mark" + (" hollow" if mark.hollow else "") + (" quiet" if mark.colour is None else "")
    if mark.colour is None:
        return el("path", d=f"M{x - size} {y}L{x} {y - size}L{x + size} {y}L{x} {y + size}Z", cls=cls)
    kind = mark.colour % COLOURS
    if kind == 0:
        return el("circle", cx=x, cy=y, r=round(size, 1), cls=cls)
    if kind == 1:
        return el("rect", x=x - size * 0.9, y=y - size * 0.9, width=size * 1.8, height=size * 1.8, cls=cls)
    corners = {
        2: ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
        3: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        4: ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
        5: ((-1.2, -0.5), (0, -1.2), (1.2, -0.5), (0.8, 1), (-0.8, 1)),
    }[kind]
    path = "L".join(f"{round(x + size * dx, 1)} {round(y + size * dy, 1)}" for dx, dy in corners)
    return el("path", d=f"M{path}Z", cls=cls)


def symbol(place: int) -> Html:
    """The shape of a run, in its colour, for beside its name."""
    inner = shape(Mark("", place, 0), 8, 8)
    return el("svg", inner, viewBox="0 0 16 16", aria_hidden="true", cls=f"key s{place % COLOURS}")


def legend(names: dict[int, str], *, lines: bool = False) -> Html:
    """Names by the runs' places, with colour and shape; with `lines` also what thin and thick ones stand for."""
    items = [el("li", symbol(place), name) for place, name in names.items()]
    if lines:
        for kind, words in (("held", "held out"), ("train", "training")):
            stroke = el("line", x1=0, x2=24, y1=8, y2=8, cls=f"line {kind}")
            items.append(el("li", el("svg", stroke, viewBox="0 0 24 16", aria_hidden="true", cls="key long"), words))
    return el("ul", items, cls="legend")


def _axes(across: Scale, up: Scale, level: float | None, *, whole: bool = False) -> Html:
    parts: list[Any] = []
    for value in ticks(up.low, up.high, 4):
        y = up(value)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, cls="grid"))
        parts.append(el("text", say(value), x=LEFT - 7, y=y + 4, cls="tick", text_anchor="end"))
    for value in ticks(across.low, across.high, 5):
        if whole and value != round(value):
            continue
        parts.append(el("text", say(value), x=across(value), y=HEIGHT - BOTTOM + 18, cls="tick", text_anchor="middle"))
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, cls="base"))
    if level is not None and up.low < level < up.high:
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up(level), y2=up(level), cls="level"))
    return join(*parts)


def _line(one: Series, places: list[Point]) -> Html:
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    cls = f"s{one.colour % COLOURS} line {one.kind}" + (f" dash{one.dash}" if one.dash else "")
    parts = [el("path", d=path, cls=cls)] if len(places) > 1 else []
    dots = places if (one.kind != "train" and len(places) <= 60) or len(places) == 1 else []
    if one.kind == "path":
        dots = places[-1:]
    mark = Mark(one.name, one.colour, 0)
    shapes = [shape(mark, x, y, 5.0 if one.kind == "path" else 2.6) for x, y in dots]
    return join(parts, el("g", shapes, cls=f"s{one.colour % COLOURS}") if shapes else None)


def _interval(mark: Mark, across: Scale, y: float, digits: int) -> Html:
    x = across(mark.value)
    bar = None
    if mark.low is not None and mark.high is not None:
        bar = el("line", x1=across(mark.low), x2=across(mark.high), y1=y, y2=y, cls="bar")
    tip = f"{mark.name}\n{mark.text(digits)}" + (f"\n{mark.note}" if mark.note else "")
    return _marked(mark, join(bar, shape(mark, x, y)), x, y, tip)


def _upright(mark: Mark, x: float, up: Scale) -> Html | None:
    if mark.low is None or mark.high is None:
        return None
    return el("line", x1=x, x2=x, y1=up(mark.low), y2=up(mark.high), cls="bar")


def _marked(mark: Mark, inner: Html, x: float, y: float, tip: str) -> Html:
    colour = "quiet" if mark.colour is None else f"s{mark.colour % COLOURS}"
    return el("g", inner, cls=f"point {colour}", data_x=x, data_y=y, data_tip=tip)


def _fit(across: Scale, up: Scale, slope: float, intercept: float) -> Html:
    """The part of a straight line that lies inside the drawing."""
    ends = [(x, intercept + slope * x) for x in (across.low, across.high)]
    if slope:
        ends += [((y - intercept) / slope, y) for y in (up.low, up.high)]
    inside = sorted(
        (x, y) for x, y in ends
        if across.low - 1e-9 <= x <= across.high + 1e-9 and up.low - 1e-9 <= y <= up.high + 1e-9
    )  # fmt: skip
    if len(inside) < 2:
        return join()
    (x1, y1), (x2, y2) = inside[0], inside[-1]
    return el("line", x1=across(x1), x2=across(x2), y1=up(y1), y2=up(y2), cls="fit")


def _vertical(x: float, top: float, bottom: float, text: str, baseline: float) -> Html:
    line = el("line", x1=x, x2=x, y1=top, y2=bottom, cls="grid")
    return join(line, el("text", text, x=x, y=baseline, cls="tick", text_anchor="middle"))


def _svg(title: str, described: str, height: float, inner: Html, **data: Any) -> Html:
    # A <title> would be a second tooltip beside the page's own: the name is an attribute.
    return el(
        "svg", el("desc", described), inner, viewBox=f"0 0 {WIDTH} {round(height, 1)}", role="img", tabindex="0",
        cls="plot", aria_label=title, **data,
    )  # fmt: skip


def _figure(
    title: str, unit: str, drawing: Html, values: Html, x_unit: str | None = None, *, note: str | None = None
) -> Html:
    caption = el("figcaption", el("b", title), el("span", unit))
    below = el("p", x_unit, cls="across") if x_unit else None
    more = el("details", el("summary", "Values as a table"), values, cls="values")
    return el("figure", caption, drawing, below, el("p", note, cls="note") if note else None, more)


def _label(one: Series) -> str:
    return one.name if one.kind != "train" else f"{one.name}, training"


def _summary(one: Series) -> str:
    (_, first), (_, last) = one.points[0], one.points[-1]
    return f"{_label(one)}: from {say(first)} to {say(last)}"


def _series_table(series: Sequence[Series], x_name: str) -> Html:
    columns = [dict(one.points) for one in series]
    places = sorted({x for column in columns for x in column})
    shown = [places[number] for number in _spread(len(places), MOST_TABLE_ROWS)]
    rows = [[say(x), *(say(column.get(x)) if x in column else "" for column in columns)] for x in shown]
    left = f"{len(shown)} of {len(places)} steps" if len(shown) < len(places) else "all steps"
    return table([x_name, *(_label(one) for one in series)], rows, caption=left)


def _paths_table(series: Sequence[Series], x_unit: str, unit: str) -> Html:
    rows = [[one.name, say(x), say(y)] for one in series for x, y in
            (one.points[place] for place in _spread(len(one.points), MOST_TABLE_ROWS))]  # fmt: skip
    return table(["run", x_unit, unit], rows, caption="in the order of the steps")


def _spread(length: int, most: int) -> list[int]:
    if length <= most:
        return list(range(length))
    return sorted({round(place * (length - 1) / (most - 1)) for place in range(most)})


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
