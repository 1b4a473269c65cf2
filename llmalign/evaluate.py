"""What `llmalign evaluate` measures besides outputs and judgements, and the file that holds all of it."""

import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.assets import file_digest
from llmalign.data.formats import DataSource, load
from llmalign.errors import UserError
from llmalign.evaluation.accuracy import pair_accuracy, pair_margins
from llmalign.evaluation.alpaca import Summary
from llmalign.evaluation.annotations import Row, write_json
from llmalign.evaluation.leaderboard import COLUMNS
from llmalign.inference import load_for_inference, model_identity, model_name
from llmalign.trainers.preparation import prepare_pairs
from llmalign.trainers.run_folder import RUN_FILE

logger = logging.getLogger(__name__)

OUTPUTS, REFERENCE, ANNOTATIONS, LEADERBOARD, EVALUATION = (
    "model_outputs.json", "reference_outputs.json", "annotations.json", "leaderboard.csv", "evaluation.json",
)  # fmt: skip
MADE_FILE = "made.json"
THERE = "%s is there already."
REMADE = "%s was made of something else: it is made again, and numbers there are of the earlier one until this ends."
FORMAT = 1
OF_WIN_RATES = ("reference", "judge", "prompts", "winrate", "interval", "per_dataset", "lengths")
LIBRARIES = ("llmalign", "torch", "transformers", "trl", "peft", "datasets")


def starting_model(model: str) -> str | None:
    """What a run is compared with: its reference by its run.json, or the base that an adapter names; None if neither.

    A run's reference is `ref_model_name_or_path` where its recipe sets one, else what it started from.
    """
    folder = Path(model).expanduser()
    for file in (folder / RUN_FILE, folder.parent / RUN_FILE):
        if folder.is_dir() and file.is_file():
            recipe = _json(file)
            found = recipe.get("ref_model_name_or_path") or recipe.get("model_name_or_path")
            return str(found) if found else None
    config = folder / "adapter_config.json"
    return _json(config).get("base_model_name_or_path") if config.is_file() else None


class Made:
    """Which files of a folder this command made, of what, and whether they still are what it wrote.

    With `overwrite` a file that somebody else wrote is replaced, else it is refused.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        self._folder, self._file, self._overwrite = folder, folder / MADE_FILE, overwrite
        self._made: dict[str, Any] = _json(self._file) if self._file.is_file() else {}

    def is_ours(self, name: str) -> bool:
        """Whether the file is as this command wrote it, or not there."""
        path = self._folder / name
        return not path.is_file() or self._made.get(name, {}).get("sha256") == file_digest(path)

    def is_there(self, name: str, *of: Any) -> bool:
        """Whether the file is there, made of the same. Raises UserError for one that would be lost."""
        path = self._folder / name
        if path.is_file() and self.is_ours(name):
            same = self._made[name]["of"] == _digest(of)
            logger.info(THERE if same else REMADE, path)
            return same
        if path.is_file() and not self._overwrite:
            raise UserError(
                f"{path} was not written by this command, or was changed since: give --overwrite to replace it, or "
                "another --out"
            )
        return False

    def done(self, name: str, *of: Any) -> None:
        """Note what a file was made of."""
        self._made[name] = {"of": _digest(of), "sha256": file_digest(self._folder / name)}
        write_json(self._file, self._made)


def preference_accuracy(
    model: str, pairs: DataSource, *, base: str | None, dtype: str | None, max_length: int | None
) -> dict[str, Any]:
    """Share of held-out pairs whose chosen response the model puts above the other, with its 95 % interval.

    By the log-ratio to the run's reference (an adapter's base, a run's start, the recipe's own reference), or by the
    log-prob alone where none is known; `by` says which. `dropped` pairs have a prompt that fills `max_length`,
    `cut` ones a response that goes beyond it; both are logged, and so is data that the run was `trained_on`. Raises
    UserError where data or models cannot be read.
    """
    loaded, tokenizer = load_for_inference(model, base=base, dtype=dtype)
    raw = load([pairs], kind="pairs")
    rows = list(prepare_pairs(raw, tokenizer, max_length=max_length))
    if not rows:
        raise UserError(f"no pair of {pairs.path} fits into {max_length} tokens; raise --max_length")
    dropped, cut = len(raw) - len(rows), sum(_longest(row) > (max_length or math.inf) for row in rows)
    if dropped or cut:
        logger.warning(
            "Of %d pairs %d are left out, because their prompts fill %s tokens, and %d are cut there.",
            len(raw), dropped, max_length, cut,
        )  # fmt: skip
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "max_length": max_length}
    margins = pair_margins(loaded, rows, progress=_bar("Scoring pairs"), **options)
    start, others = starting_model(model), None
    if isinstance(loaded, PeftModel) and not _is_adapter(start):
        others = pair_margins(loaded, rows, adapter_off=True, progress=_bar("Scoring pairs, its base"), **options)
    elif start is not None:
        del loaded
        reference, _ = load_for_inference(start, dtype=dtype)
        others = pair_margins(reference, rows, progress=_bar("Scoring pairs, its start"), **options)
    by = "log-prob" if others is None else "log-ratio to the start"
    found = asdict(pair_accuracy(rows, margins, others))
    trained_on = _trained_on(model, pairs)
    if trained_on:
        logger.warning(
            "%s is what the model was trained on: such pairs are not held out; choose others with --split or --where.",
            pairs.path,
        )
    return {**found, "by": by, "data": pairs.path, "dropped": dropped, "cut": cut, "trained_on": trained_on}


def _trained_on(model: str, pairs: DataSource) -> bool:
    """Whether a run's recipe names the same data, and nothing sets its rows apart from these."""
    folder = Path(model).expanduser()
    file = next((file for file in (folder / RUN_FILE, folder.parent / RUN_FILE) if file.is_file()), None)
    recipe = {} if file is None else _json(file)
    same = recipe.get("dataset_name") == pairs.path
    return (
        same and pairs.split in (None, recipe.get("dataset_train_split")) and pairs.where in (None, recipe.get("where"))
    )


def _longest(row: Row) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _is_adapter(model: str | None) -> bool:
    return model is not None and (Path(model).expanduser() / "adapter_config.json").is_file()


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
    """Write evaluation.json, whole or not at all, and return it.

    What was not measured now stays as an earlier call on the same weights left it, and is null where there is none.
    """
    texts = [row["instruction"] for row in prompts or ()]
    found: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name(model),
        "identity": _digest(model_identity(model)),
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
    found = _with_earlier(folder / EVALUATION, found)
    write_json(folder / EVALUATION, found)
    return found


def _with_earlier(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    earlier = _json(file) if file.is_file() else {}
    if earlier.get("identity") != found["identity"]:
        return found
    kept = [] if found["winrate"] is not None else list(OF_WIN_RATES)
    kept += [name for name in ("accuracy", "benchmarks") if found[name] is None]
    return {**found, **{name: earlier.get(name, found[name]) for name in kept}}


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
