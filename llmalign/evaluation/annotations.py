"""AlpacaEval's files: model outputs and annotations, every row accounted for, written whole or not at all."""

import gzip
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmalign.errors import UserError

Row = dict[str, Any]

OUTPUT_KEYS = ("instruction", "output")
ANNOTATION_KEYS = ("instruction", "output_1", "output_2", "preference")


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a .json (one list), .jsonl or .gz file. Raises UserError naming the file and what is wrong in it."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    stem = path.name.removesuffix(".gz")
    rows = _lines(path, text) if stem.endswith((".jsonl", ".ndjson")) else _list(path, text)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {path} is no JSON object but {json.dumps(row)[:60]}")
    return rows


def read_outputs(path: Path | str) -> list[Row]:
    """Rows of `instruction`, `output` and mostly `generator`, as model_outputs.json has them.

    Raises UserError for a row without text in the two, naming it.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows):
        for key in OUTPUT_KEYS:
            if not isinstance(row.get(key), str):
                said = "has no" if key not in row else "has no text in"
                raise UserError(f"row {number} of {path} {said} {key!r}; model outputs have instruction and output")
    return rows


def read_annotations(path: Path | str) -> list[Row]:
    """Rows of two outputs and a `preference` (1: output_1 wins, 2: output_2 wins), as annotations.json has them.

    Raises UserError for a row without one of the keys, or whose preference is neither a number nor null, naming it.
    What a preference of null, NaN or -1 means is left to whoever counts.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows):
        for key in ANNOTATION_KEYS:
            if key not in row:
                raise UserError(f"row {number} of {path} has no {key!r}; annotations have {', '.join(ANNOTATION_KEYS)}")
            if key not in ("preference", "instruction") and not isinstance(row[key], str):
                raise UserError(f"row {number} of {path} has no text in {key!r}")
        value = row["preference"]
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"row {number} of {path} has the preference {value!r}; it is a number from 1 to 2, or null")
    return rows


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON as AlpacaEval does (indented), aside and then renamed; NaN and infinities, which JSON lacks, are null.

    Raises UserError where the file cannot be written.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text whole or not at all. Raises UserError where the file cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Half a surrogate pair, which models can produce, is no UTF-8: it becomes a question mark.
            aside.write_bytes(text.encode("utf-8", "replace"))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def known_preference(value: float | None) -> float | None:
    """The preference in [1, 2] that a row's value stands for: 0 is an old tie; None where it says nothing."""
    if value is None or math.isnan(value):
        return None
    if value == 0:
        return 1.5
    return float(value) if 1 <= value <= 2 else None


def generators(rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """The names of the baseline and of the model, where all rows agree on them."""
    found = [{row.get(f"generator_{side}") for row in rows} for side in (1, 2)]
    first, second = (next(iter(names)) if len(names) == 1 else None for names in found)
    return first, second


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _list(path: Path, text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); is it half-written?") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list of rows but {type(content).__name__}")
    return content


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"line {number} of {path} is no JSON ({error})") from error
    return rows
