"""What `llmalign evaluate` measures besides outputs and judgements, and the file that holds all of it."""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.data.formats import DataSource, load
from llmalign.errors import UserError
from llmalign.evaluation.accuracy import pair_accuracy, pair_margins
from llmalign.evaluation.alpaca import Summary
from llmalign.evaluation.annotations import Row, write_json
from llmalign.evaluation.leaderboard import COLUMNS
from llmalign.inference import load_for_inference, model_name
from llmalign.trainers.checkpoint import RUN_FILE
from llmalign.trainers.preparation import prepare_pairs

logger = logging.getLogger(__name__)

OUTPUTS, REFERENCE, ANNOTATIONS, LEADERBOARD, EVALUATION = (
    "model_outputs.json", "reference_outputs.json", "annotations.json", "leaderboard.csv", "evaluation.json",
)  # fmt: skip
MADE_FILE = "made.json"
FORMAT = 1
LIBRARIES = ("llmalign", "torch", "transformers", "trl", "peft", "datasets")


def starting_model(model: str) -> str | None:
    """What a run started from, by its run.json, or the base that an adapter names; None where neither is known."""
    folder = Path(model).expanduser()
    for file in (folder / RUN_FILE, folder.parent / RUN_FILE):
        if folder.is_dir() and file.is_file():
            found = _json(file).get("model_name_or_path")
            return str(found) if found else None
    config = folder / "adapter_config.json"
    return _json(config).get("base_model_name_or_path") if config.is_file() else None


class Made:
    """Which files of a folder are there as the options of this call would make them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / MADE_FILE
        self._made: dict[str, str] = _json(self._file) if self._file.is_file() else {}

    def is_there(self, name: str, *of: Any) -> bool:
        """Whether the file was made of the same; what was made of something else is taken away, which is logged."""
        path = self._folder / name
        if path.is_file() and self._made.get(name) == _digest(of):
            logger.info("%s is there already.", path)
            return True
        if path.is_file():
            logger.info("%s was made of something else: it is made again.", path)
            path.unlink()
        return False

    def done(self, name: str, *of: Any) -> None:
        """Note what a file was made of."""
        self._made[name] = _digest(of)
        write_json(self._file, self._made)


def preference_accuracy(
    model: str, pairs: DataSource, *, base: str | None, dtype: str | None, max_length: int | None
) -> dict[str, Any]:
    """Share of held-out pairs whose chosen response the model puts above the other, with its 95 % interval.

    By the log-ratio to what the model started from (an adapter's base, a run's start), as its loss has it, or by the
    log-prob alone where no start is known; `by` says which. Raises UserError where data or models cannot be read.
    """
    loaded, tokenizer = load_for_inference(model, base=base, dtype=dtype)
    rows = list(prepare_pairs(load([pairs], kind="pairs"), tokenizer, max_length=max_length))
    if not rows:
        raise UserError(f"no pair of {pairs.path} fits into {max_length} tokens; raise --max_length")
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "max_length": max_length}
    margins = pair_margins(loaded, rows, progress=_bar("Scoring pairs"), **options)
    start = starting_model(model)
    others = None
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        others = pair_margins(loaded, rows, adapter_off=True, progress=_bar("Scoring pairs, its base"), **options)
    elif start is not None:
        del loaded
        reference, _ = load_for_inference(start, dtype=dtype)
        others = pair_margins(reference, rows, progress=_bar("Scoring pairs, its start"), **options)
    by = "log-prob" if others is None else "log-ratio to the start"
    return {**asdict(pair_accuracy(rows, margins, others)), "by": by, "data": pairs.path}


def write_evaluation(
    folder: Path,
    model: str,
    *,
    prompts: Sequence[Row] | None = None,
    source: str | None = None,
    judge: dict[str, Any] | None = None,
    summary: Summary | None = None,
    rows: Sequence[Row] = (),
    accuracy: dict[str, Any] | None = None,
    benchmarks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write evaluation.json, whole or not at all, and return it; what was not measured is null."""
    texts = [row["instruction"] for row in prompts or ()]
    found: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name(model),
        "reference": None if summary is None else summary.generator_1,
        "judge": judge,
        "prompts": None if prompts is None else {"source": source, "rows": len(texts), "sha256": _digest(texts)},
        "winrate": None,
        "interval": None,
        "per_dataset": [],
        "lengths": None,
        "accuracy": accuracy,
        "benchmarks": benchmarks,
        "versions": {name: _version(name) for name in LIBRARIES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if summary is not None:
        all_of_it = summary.as_dict()
        found["winrate"] = {name: all_of_it[name] for name in (*COLUMNS, "n_rows", "warnings")}
        found |= {name: all_of_it[name] for name in ("interval", "per_dataset")}
        sides = {"model": "output_2", "reference": "output_1"}
        found["lengths"] = {side: float(np.mean([len(row[key]) for row in rows])) for side, key in sides.items()}
    write_json(folder / EVALUATION, found)
    return found


def _bar(what: str) -> Any:
    return lambda batches: tqdm(batches, desc=what, unit="batch")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
