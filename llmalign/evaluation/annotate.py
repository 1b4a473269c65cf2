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
NO_OUTPUT = "error"  # in a row of outputs: why it has none
REASON = "reason"  # in an annotation without a preference: why, where the judge says
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

    The n-th output of an instruction meets its n-th reference, or the last one. What is left over or repeated is
    logged. Raises UserError where no instruction is in both.
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
                **_without_output(other, row),
            }
        )
    if not rows:
        raise UserError("the outputs and the reference share no instruction, so there is nothing to judge")
    if unmatched:
        logger.warning("%d outputs have no reference and are not judged, such as %s.", len(unmatched), _some(unmatched))
    repeated = len(outputs) - len(seen), len(reference) - len(by_instruction)
    if any(repeated):
        logger.info("%d outputs and %d references repeat an instruction; they meet in their order.", *repeated)
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
    reasons: Callable[[], Sequence[str | None]] | None = None,
    replace: bool = True,
) -> Counts:
    """Judge outputs against references and write AlpacaEval's annotations.json: output_1 is the reference's.

    preference = 2 - P(output_1 beats output_2); identical outputs are 1.5 without a question. Rows that `out` already
    holds, of this annotator and these texts, are kept. `at_a_time` rows are judged before `out` is written again, all
    where it is None; a row not judged yet has the preference null, as one has that failed, and the next call judges
    both. `reasons` says why the judge's last rows failed, which goes into their `reason`; an output that was never
    given (it has `error`) fails unasked. Raises UserError as the judge does, with what was judged before written; where
    `out` holds something else, and, unless `replace`, other judgements that would be lost.
    """
    matched, unmatched = match(outputs, reference)
    lost = [row.pop(NO_OUTPUT, None) for row in matched]
    rows = [
        {**row, "annotator": annotator, "preference": None, **({} if reason is None else {REASON: reason})}
        for row, reason in zip(matched, lost, strict=True)
    ]
    earlier = _earlier(Path(out))
    if not replace:
        _refuse_loss(Path(out), set(earlier) - {_key(row) for row in rows})
    kept = identical = 0
    for row in rows:
        if REASON in row:
            continue
        if row["output_1"] == row["output_2"]:
            row["preference"] = TIE
            identical += 1
        elif (value := earlier.get(_key(row))) is not None:
            row["preference"] = value
            kept += 1
    open_rows = [place for place, row in enumerate(rows) if row["preference"] is None and REASON not in row]
    size = at_a_time or max(len(open_rows), 1)
    parts = [open_rows[start : start + size] for start in range(0, len(open_rows), size)]
    for part in progress(parts) if progress is not None else parts:
        chosen = [rows[place] for place in part]
        found = judge.preferences(*([row[name] for row in chosen] for name in ("instruction", "output_1", "output_2")))
        for row, p in zip(chosen, found, strict=True):
            row["preference"] = None if math.isnan(p) else 2 - p
        for row, reason in zip(chosen, [] if reasons is None else reasons(), strict=reasons is not None):
            if reason is not None:
                row[REASON] = reason
        write_json(out, rows)
    if not parts:
        write_json(out, rows)
    failed = sum(row["preference"] is None for row in rows)
    judged = sum(rows[place]["preference"] is not None for place in open_rows)
    return Counts(judged, kept, identical, failed, unmatched)


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


def _refuse_loss(out: Path, lost: set[tuple[str, ...]]) -> None:
    if lost:
        raise UserError(
            f"{out} holds {len(lost)} judgements of other outputs or by another judge, which would be lost; give "
            "--overwrite to replace them, or another --out"
        )


def _without_output(*rows: Row) -> dict[str, str]:
    """Why a pair lacks an output, where it does."""
    for row in rows:
        if NO_OUTPUT in row:
            return {NO_OUTPUT: f"{row.get('generator', 'a model')} has no output: {row[NO_OUTPUT]}"}
    return {}


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("annotator", "instruction", "output_1", "output_2"))


def _some(instructions: Sequence[str]) -> str:
    return ", ".join(repr(text[:40]) for text in instructions[:_SHOWN])
