"""What the doctor found, how much of it is allowed, and both in words."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llmalign.errors import UserError

QUANTILES = (0.05, 0.5, 0.95, 1.0)
FIRST_ROWS = 5


@dataclass(frozen=True)
class Limits:
    """The share of rows, from 0 to 1, that may show each fault before training refuses the data.

    A recipe sets them with `max_` before the name. `duplicates` counts the repetitions of a row, not its first
    occurrence. Raises UserError for a limit outside [0, 1].
    """

    truncated: float = 0.05
    dropped: float = 0.05
    identical: float = 0.01
    empty: float = 0.0
    empty_prompt: float = 0.0
    duplicates: float = 0.1
    missing_eos: float = 0.01
    doubled_eos: float = 0.01
    not_prefix: float = 0.01

    def __post_init__(self) -> None:
        for limit in fields(self):
            share = getattr(self, limit.name)
            if not 0.0 <= share <= 1.0:
                raise UserError(f"`max_{limit.name}` is a share of rows and must be in [0, 1], got {share}.")


FAULTS = {  # fault -> (label in the table, what the rows are or have, the way out)
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


@dataclass(frozen=True)
class Report:
    """What `examine` found. `lengths` maps a part to its token counts at QUANTILES; faults not checked are absent."""

    kind: str
    rows: int
    prepared_rows: int
    max_length: int | None
    findings: dict[str, Finding]
    lengths: dict[str, tuple[int, ...]]
    duplicate_prompts: int
    limits: Limits = field(default_factory=Limits)
    notes: tuple[str, ...] = ()

    def problems(self, limits: Limits | None = None) -> list[str]:
        """One plain sentence for each fault above its limit; `limits` replaces those of the report."""
        allowed = limits or self.limits
        sentences = []
        for name, (_, what, way_out) in FAULTS.items():
            finding, limit = self.findings.get(name), getattr(allowed, name)
            if finding is None or not finding.count or finding.count <= limit * self.rows:
                continue
            ids = ", ".join(map(str, finding.rows)) + (", ..." if finding.count > len(finding.rows) else "")
            counted = f"{finding.count:,} of {self.rows:,} rows ({self.share(name):.1%})"
            sentences.append(
                f"{counted} {what.format(max_length=self.max_length)}; `max_{name}` allows {limit:.1%}; row_id {ids}; "
                f"{way_out}."
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
            "prepared_rows": self.prepared_rows,
            "max_length": self.max_length,
            "findings": {name: {"count": f.count, "rows": list(f.rows)} for name, f in self.findings.items()},
            "lengths": {name: dict(zip(map(str, QUANTILES), q, strict=True)) for name, q in self.lengths.items()},
            "duplicate_prompts": self.duplicate_prompts,
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print counts beside their limits, token lengths, notes, and the problems as a plain list."""
        faults = Table(title=f"{self.rows:,} rows of {self.kind}, {self.prepared_rows:,} after preparation")
        for name, justify in (("check", "left"), ("rows", "right"), ("share", "right"), ("limit", "right")):
            faults.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, finding in self.findings.items():
            limit = getattr(self.limits, name)
            style = "bold red" if finding.count > limit * self.rows else None
            faults.add_row(
                FAULTS[name][0], f"{finding.count:,}", f"{self.share(name):.1%}", f"{limit:.1%}", style=style
            )
        faults.add_row(
            "repeated prompts", f"{self.duplicate_prompts:,}", f"{self.duplicate_prompts / self.rows:.1%}", ""
        )
        console.print(faults)
        lengths = Table(title=f"tokens (max_length {self.max_length or 'none'})")
        lengths.add_column("part")
        for quantile in QUANTILES:
            lengths.add_column("longest" if quantile == 1.0 else f"{quantile:.0%}", justify="right")
        for name, values in self.lengths.items():
            lengths.add_row(name, *(f"{value:,}" for value in values))
        console.print(lengths)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False)
        for problem in self.problems():
            console.print(f"- {problem}", style="red", highlight=False, markup=False)
        if not self.problems():
            console.print("Nothing above its limit.", style="green")


def quantiles(lengths: np.ndarray) -> tuple[int, ...]:
    """Token counts at QUANTILES, as whole tokens that occur; zeros where there is nothing to count."""
    if not lengths.size:
        return (0,) * len(QUANTILES)
    return tuple(int(value) for value in np.quantile(lengths, QUANTILES, method="higher"))
