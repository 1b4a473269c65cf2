"""Where values lie in a drawing: scales, round ticks, and long series made short without losing their spikes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
MOST_POINTS = 360


@dataclass(frozen=True)
class Scale:
    """A straight line from values [low, high] to places [start, end] in a drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def as_list(self) -> list[float]:
        """The scale for the page's own code."""
        return [rounded(self.low), rounded(self.high), self.start, self.end]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values in [low, high]."""
    rough = (high - low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # A step that vanishes beside the values themselves gives one tick a million times.
    return [place * step for place in range(first, min(last, first + 20) + 1)]


def widened(values: Iterable[float], *, margin: float = 0.06) -> tuple[float, float]:
    """The range of the values with some air; of a single value, a range around it. (0, 1) for none."""
    found = list(values)
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        air = abs(high) * 0.1 or 1.0
        return low - air, high + air
    air = (high - low) * margin
    return low - air, high + air


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: of each stretch the lowest and the highest, in their order, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        first = number * len(points) // stretches
        last = max((number + 1) * len(points) // stretches, first + 1)
        stretch = range(first, last)
        kept |= {min(stretch, key=lambda place: points[place][1]), max(stretch, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def rounded(value: float) -> float:
    """Five significant digits: what a reader can use of a value, at half the bytes."""
    found = float(f"{value:.5g}")
    return int(found) if found == int(found) and abs(found) < 1e15 else found
