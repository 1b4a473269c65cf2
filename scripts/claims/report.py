"""What a claim hands back: a verdict, a table with intervals and a picture; and how they are written."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402  (after the backend is chosen: no display is needed)

from claims.cells import Cell, Result, Store, write_atomically  # noqa: E402

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % Student interval (half-width in the unit of the values)."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student interval of one number per seed; at least 1 and at most 30 values; one value has no width.

    Raises ValueError on an empty or a longer list.
    """
    n = len(values)
    if not 1 <= n <= len(_T95) + 1:
        raise ValueError(f"An interval needs 1 to {len(_T95) + 1} values, got {n}.")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, 0.0, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Interval(mean, _T95[n - 2] * math.sqrt(variance / n), n)


@dataclass(frozen=True)
class Outcome:
    """A claim's verdict in one paragraph, its table, its numbers and how to draw it."""

    holds: bool
    verdict: str
    columns: list[str]
    rows: list[list[str]]
    numbers: dict[str, Any]
    draw: Callable[[Figure], None]


@dataclass(frozen=True)
class Claim:
    """A claim: its sentence, its cells (few and short ones for the smoke run), its experiment and its judgement.

    `needs` names an environment variable without which only the smoke run is possible.
    """

    name: str
    statement: str
    cells: Callable[[bool], list[Cell]]
    experiment: Callable[[Cell, Store], Result]
    judge: Callable[[list[Result]], Outcome]
    sources: tuple[Path, ...]
    needs: str | None = None


def values(records: Sequence[Result], key: str, **where: Any) -> list[float]:
    """`result[key]` of the records whose cell has this method, seed or setting, in order of seed."""

    def matches(cell: dict[str, Any]) -> bool:
        return all((cell[k] if k in ("method", "seed") else cell["setting"].get(k)) == v for k, v in where.items())

    chosen = sorted((r for r in records if matches(r["cell"])), key=lambda r: r["cell"]["seed"])
    return [r["result"][key] for r in chosen]


def draw_bands(axes: Axes, steps: Sequence[float], runs: Sequence[Sequence[float]], label: str, color: str) -> None:
    """One line for the mean of the runs (one per seed) and a band for its 95 % interval."""
    spread = [interval(column) for column in zip(*runs, strict=True)]
    axes.plot(steps, [i.mean for i in spread], color=color, label=label)
    axes.fill_between(steps, [i.low for i in spread], [i.high for i in spread], color=color, alpha=0.2, lw=0)


def markdown(claim: Claim, outcome: Outcome, records: Sequence[Result]) -> str:
    """The claim's page: statement, verdict, table, settings and the time it took."""
    seconds = sum(r["cpu_seconds"] for r in records)
    lines = [f"# {claim.name}", "", f"**Claim.** {claim.statement}", ""]
    lines += [f"**{'Holds' if outcome.holds else 'Does not hold'}.** {outcome.verdict}", ""]
    lines += ["| " + " | ".join(outcome.columns) + " |", "|" + "---|" * len(outcome.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in outcome.rows]
    seeds = sorted({r["cell"]["seed"] for r in records})
    lines += ["", f"{len(records)} cells, seeds {', '.join(map(str, seeds))}, {seconds:.0f} CPU-seconds in all."]
    lines += ["Intervals are 95 % Student intervals over the seeds.", "", f"![{claim.name}]({claim.name}.png)", ""]
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, wherever they are."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def write(claim: Claim, outcome: Outcome, records: Sequence[Result], folder: Path) -> None:
    """Write `<claim>.json`, `<claim>.md` and `<claim>.png` under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "claim": claim.name,
        "statement": claim.statement,
        "holds": outcome.holds,
        "verdict": outcome.verdict,
        "numbers": outcome.numbers,
        "columns": outcome.columns,
        "rows": outcome.rows,
        "cells": [{k: v for k, v in {**r, **r["cell"]}.items() if k not in ("cell", "result")} for r in records],
    }
    lines = (f"{json.dumps(key)}: {json.dumps(_rounded(value), allow_nan=False)}" for key, value in numbers.items())
    write_atomically(folder / f"{claim.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    write_atomically(folder / f"{claim.name}.md", markdown(claim, outcome, records))
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    outcome.draw(figure)
    aside = folder / f"{claim.name}.tmp.png"
    figure.savefig(aside, dpi=110)
    aside.replace(folder / f"{claim.name}.png")
