"""The stage `train`: one round of the method's training, from the model of the round before."""

import json
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.loop.run import ADAPTER_CONFIG, Run, model_files
from llmalign.loop.stages import Made, Row, write_json
from llmalign.train import run as run_recipe
from llmalign.trainers.resuming import ASIDE
from llmalign.trainers.run_folder import RUN_FILE


def train(run: Run, number: int, folder: Path, rows: list[Row]) -> Made:
    """Train on the rows, going on from the newest whole checkpoint; the folder then holds the round's model."""
    columns = [name for name in rows[0] if name not in ("prompt", "chosen", "rejected", "completions")]
    data = Dataset.from_dict({name: [row[name] for row in rows] for name in columns})
    result: dict[str, Any] = run_recipe(
        run.round_recipe(number, folder),
        resume="auto" if (folder / RUN_FILE).is_file() else None,
        rows=data,
        starts_equal=run.starts_equal(number),
    )
    if not run.main:
        return Made([])
    _put_in_order(folder / ADAPTER_CONFIG)
    return Made(
        model_files(folder),
        {"steps": result["steps"], "rows": len(rows)},
        # Of the steps since the last start alone, so no result.
        cost={"training_seconds": result["train"].get("train_runtime"), "loss": result["train"].get("train_loss")},
    )


def _put_in_order(config: Path) -> None:
    """PEFT writes sets as lists, in another order in every process: an adapter would be another each time."""
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, {key: sorted(own) if isinstance(own, list) else own for key, own in content.items()})


def remove_checkpoints(folder: Path) -> None:
    """Drop the checkpoints of a finished round, whose model stays."""
    for path in [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / ASIDE]:
        shutil.rmtree(path, ignore_errors=True)
