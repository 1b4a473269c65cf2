"""A model's outputs against a reference's, judged: AlpacaEval's annotations, with every row accounted for."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row, known_preference, read_annotations, write_json

logger = logging.getLogger(__name__)

TIE = 1.5
_SHOWN = 3  # instructions named in a message


class Preferences(Protocol):
    """What judges: P(first beats second) of each of N pairs, NaN for a pair that could not be judged."""

    def preferences(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """P(first beats second) of each pair."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows: `judged` anew, `kept` from an earlier call, `identical`, `failed`, and `unmatched`,
    whose instruction the reference lacks and which are no rows of the result."""

    judged: int
    kept: int
    identical: int
    failed: int
    unmatched: int

    @property
    def rows(self) -> int:
        """Rows with a preference."""
        return self.judged + self.kept + self.identical

    def text(self) -> str:
        """One sentence."""
        parts = [
            f"{self.judged} judged", f"{self.kept} kept from before" * bool(self.kept),
            f"{self.identical} identical, so tied" * bool(self.identical), f"{self.failed} failed" * bool(self.failed),
            f"{self.unmatched} without a reference" * bool(self.unmatched),
        ]  # fmt: skip
        return ", ".join(part for part in parts if part)


def match(outputs: Sequence[Row], reference: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows of both outputs by instruction, without preferences yet, and how many outputs have no reference.

    The n-th output of an instruction meets its n-th reference, or the last one. What is left over is logged. Raises
    UserError where no instruction is in both.
    """
    by_instruction: dict[str, list[Row]] = {}
    for row in reference:
        by_instruction.setdefault(row["instruction"], []).append(row)
    seen: dict[str, int] = {}
    rows, unmatched = [], []
    for row in outputs:
        instruction = row["instruction"]
        place = seen[instruction] = seen.get(instruction, -1) + 1
        own = by_instruction.get(instruction)
        if own is None:
            unmatched.append(instruction)
            continue
        other = own[min(place, len(own) - 1)]
        dataset = row.get("dataset", other.get("dataset"))
        rows.append(
            {
                **({} if dataset is None else {"dataset": dataset}),
                "instruction": instruction,
                "output_1": other["output"],
                "generator_1": other.get("generator", "reference"),
                "output_2": row["output"],
                "generator_2": row.get("generator", "model"),
            }
        )
    if not rows:
        raise UserError("the outputs and the reference share no instruction, so there is nothing to judge")
    if unmatched:
        logger.warning("%d outputs have no reference and are not judged, such as %s.", len(unmatched), _some(unmatched))
    unused = [name for name in by_instruction if name not in seen]
    if unused:
        logger.warning("%d references have no output and are not judged, such as %s.", len(unused), _some(unused))
    return rows, len(unmatched)


def annotate(
    outputs: Sequence[Row],
    reference: Sequence[Row],
    judge: Preferences,
    *,
    annotator: str,
    out: Path | str,
    at_a_time: int | None = None,
    progress: Callable[[Sequence[list[int]]], Iterator[list[int]]] | None = None,
) -> Counts:
    """Judge outputs against references and write AlpacaEval's annotations.json: output_1 is the reference's.

    preference = 2 - P(output_1 beats output_2); identical outputs are 1.5 without a question. Rows that `out` already
    holds, of this annotator and these texts, are kept. `at_a_time` rows are judged before `out` is written again, all
    where it is None; a row not judged yet has the preference null, as one has that failed, and the next call judges
    both. Raises UserError as the judge does, with what was judged before written, and where `out` holds something else.
    """
    rows, unmatched = match(outputs, reference)
    rows = [{**row, "annotator": annotator, "preference": None} for row in rows]
    earlier = _earlier(Path(out))
    kept = identical = 0
    for row in rows:
        if row["output_1"] == row["output_2"]:
            row["preference"] = TIE
            identical += 1
        elif (value := earlier.get(_key(row))) is not None:
            row["preference"] = value
            kept += 1
    open_rows = [place for place, row in enumerate(rows) if row["preference"] is None]
    size = at_a_time or max(len(open_rows), 1)
    parts = [open_rows[start : start + size] for start in range(0, len(open_rows), size)]
    for part in progress(parts) if progress is not None else parts:
        chosen = [rows[place] for place in part]
        found = judge.preferences(*([row[name] for row in chosen] for name in ("instruction", "output_1", "output_2")))
        for row, p in zip(chosen, found, strict=True):
            row["preference"] = None if math.isnan(p) else 2 - p
        write_json(out, rows)
    if not parts:
        write_json(out, rows)
    failed = sum(row["preference"] is None for row in rows)
    return Counts(len(open_rows) - failed, kept, identical, failed, unmatched)


def settings_name(name: str, *settings: Any) -> str:
    """A judge's name with eight digits that stand for its settings, so that another setting is another annotator."""
    digest = hashlib.sha256(repr(settings).encode("utf-8", "replace")).hexdigest()[:8]
    return f"{name}-{digest}"


def _earlier(out: Path) -> dict[tuple[str, ...], float]:
    if not out.is_file():
        return {}
    rows = read_annotations(out)
    known = [(row, known_preference(row["preference"])) for row in rows]
    return {_key(row): value for row, value in known if value is not None and "annotator" in row}


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("annotator", "instruction", "output_1", "output_2"))


def _some(instructions: Sequence[str]) -> str:
    return ", ".join(repr(text[:40]) for text in instructions[:_SHOWN])
