"""What the doctor found, how much of it is allowed, and both in words."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

from llmalign.errors import UserError

QUANTILES = (0.05, 0.5, 0.95, 1.0)
FIRST_ROWS = 5


@dataclass(frozen=True)
class Shares:
    """The share of rows, from 0 to 1, that may show each fault before training refuses the data.

    A recipe sets them with `max_` before the name. Raises UserError for a limit outside [0, 1].
    """

    def __post_init__(self) -> None:
        for limit in fields(self):
            share = getattr(self, limit.name)
            if not 0.0 <= share <= 1.0:
                raise UserError(f"`max_{limit.name}` is a share of rows and must be in [0, 1], got {share}.")


@dataclass(frozen=True)
class Limits(Shares):
    """The limits of text. `duplicates` counts the repetitions of a row, not its first occurrence."""

    truncated: float = 0.05
    dropped: float = 0.05
    identical: float = 0.01
    empty: float = 0.0
    empty_prompt: float = 0.0
    duplicates: float = 0.1
    missing_eos: float = 0.01
    doubled_eos: float = 0.01
    not_prefix: float = 0.01


Faults = Mapping[str, tuple[str, str, str]]  # fault -> (label in the table, what the rows are or have, the way out)

FAULTS: Faults = {
    "truncated": (
        "cut at max_length",
        "are longer than max_length {max_length} and lose the end of a response",
        "raise max_length, or leave such rows out with `overlong: drop`",
    ),
    "dropped": (
        "dropped, prompt too long",
        "have a prompt that fills max_length {max_length} on its own and are dropped",
        "raise max_length, or shorten the prompts",
    ),
    "identical": (
        "identical responses",
        "have the same text for all responses and teach no preference",
        "take them out of the data",
    ),
    "empty": ("empty response", "have an empty response", "take them out of the data"),
    "empty_prompt": ("empty prompt", "have an empty prompt", "give every row a prompt"),
    "duplicates": ("repeated rows", "repeat an earlier row exactly", "keep one of each"),
    "missing_eos": (
        "no end-of-text",
        "have a response that does not end with an end-of-text token",
        "check the chat template, or name the token that ends a turn as the tokenizer's eos_token",
    ),
    "doubled_eos": (
        "doubled end-of-text",
        "have a response that ends with two end-of-text tokens",
        "take the token out of the data's text, or switch off the tokenizer's own",
    ),
    "not_prefix": (
        "prompt not a prefix",
        "have a prompt whose tokens change once the response follows, so that it is learned and used differently",
        "check that the chat template writes the prompt alike in both cases; end plain prompts on a token boundary",
    ),
}


@dataclass(frozen=True)
class Finding:
    """How many rows show a fault, and the ids of the first of them."""

    count: int
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """Faults of rows beside their limits; a subclass says which faults it knows and what else was measured.

    Faults that were not checked are absent from `findings`.
    """

    faults: ClassVar[Faults]

    kind: str
    rows: int
    findings: dict[str, Finding]
    limits: Shares
    notes: tuple[str, ...] = ()

    def problems(self, limits: Shares | None = None) -> list[str]:
        """One plain sentence for each fault above its limit; `limits` replaces those of the report."""
        allowed = limits or self.limits
        sentences = []
        for name, (_, what, way_out) in self.faults.items():
            finding, limit = self.findings.get(name), getattr(allowed, name)
            if finding is None or not finding.count or finding.count <= limit * self.rows:
                continue
            ids = ", ".join(map(str, finding.rows)) + (", ..." if finding.count > len(finding.rows) else "")
            counted = f"{finding.count:,} of {self.rows:,} rows ({self.share(name):.1%})"
            sentences.append(
                f"{counted} {what.format_map(vars(self))}; `max_{name}` allows {limit:.1%}; row_id {ids}; {way_out}."
            )
        return sentences

    def share(self, fault: str) -> float:
        """Share of the rows that show a fault, from 0 to 1."""
        return self.findings[fault].count / self.rows

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "kind": self.kind,
            "rows": self.rows,
            "findings": {name: {"count": f.count, "rows": list(f.rows)} for name, f in self.findings.items()},
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print counts beside their limits, what else was measured, notes, and the problems as a plain list."""
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False)
        for problem in self.problems():
            console.print(f"- {problem}", style="red", highlight=False, markup=False)
        if not self.problems():
            console.print("Nothing above its limit.", style="green")

    def tables(self) -> list[Table]:
        """Counts of the faults beside their limits; subclasses add what else was measured."""
        table = Table(title=f"{self.rows:,} rows of {self.kind}")
        for name, justify in (("check", "left"), ("rows", "right"), ("share", "right"), ("limit", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, finding in self.findings.items():
            limit = getattr(self.limits, name)
            style = "bold red" if finding.count > limit * self.rows else None
            label = self.faults[name][0]
            table.add_row(label, f"{finding.count:,}", f"{self.share(name):.1%}", f"{limit:.1%}", style=style)
        return [table]


@dataclass(frozen=True, kw_only=True)
class Report(RowReport):
    """What `examine` found in text. `lengths` maps a part to its token counts at QUANTILES."""

    faults: ClassVar[Faults] = FAULTS

    prepared_rows: int
    max_length: int | None
    lengths: dict[str, tuple[int, ...]]
    duplicate_prompts: int
    limits: Shares = field(default_factory=Limits)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            **super().as_dict(),
            "prepared_rows": self.prepared_rows,
            "max_length": self.max_length,
            "lengths": by_quantile(self.lengths),
            "duplicate_prompts": self.duplicate_prompts,
        }

    def tables(self) -> list[Table]:
        """Counts beside their limits, and token lengths."""
        (faults,) = super().tables()
        faults.title = f"{faults.title}, {self.prepared_rows:,} after preparation"
        repeated = self.duplicate_prompts
        faults.add_row("repeated prompts", f"{repeated:,}", f"{repeated / self.rows:.1%}", "")
        return [faults, quantile_table(f"tokens (max_length {self.max_length or 'none'})", self.lengths, "longest")]


def quantile_table(title: str, measured: Mapping[str, tuple[int, ...]], last: str) -> Table:
    """A row for each part with its values at QUANTILES; `last` is what the greatest value is called."""
    table = Table(title=title)
    table.add_column("part")
    for quantile in QUANTILES:
        table.add_column(last if quantile == 1.0 else f"{quantile:.0%}", justify="right")
    for name, values in measured.items():
        table.add_row(name, *(f"{value:,}" for value in values))
    return table


def by_quantile(measured: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """The same numbers as JSON takes them."""
    return {name: dict(zip(map(str, QUANTILES), values, strict=True)) for name, values in measured.items()}


def quantiles(lengths: np.ndarray) -> tuple[int, ...]:
    """Whole numbers at QUANTILES, such as occur; zeros where there is nothing to count."""
    if not lengths.size:
        return (0,) * len(QUANTILES)
    return tuple(int(value) for value in np.quantile(lengths, QUANTILES, method="higher"))
