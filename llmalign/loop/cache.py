"""The stage `cache`: log-probs of a round's completions under the reference and under the previous iterate, by shard.

They become columns of the rows that are trained on, so that training holds one model, and a run which is stopped in the
middle trains on the same numbers: looked up in a cache that was half filled, they would come from other batches.
"""

import shutil
from pathlib import Path
from typing import Any

from llmalign.loop.run import Run
from llmalign.loop.score import CHECKED, FrozenScorer
from llmalign.loop.shards import write_shards
from llmalign.loop.stages import Made, Row, read_rows, wait_for, write_rows
from llmalign.types import PromptGroups

ROWS = "rows.jsonl"
LOGPS = "logps.jsonl"
SHARD_ROWS = 256


def add_logps(run: Run, folder: Path, rows: list[Row], models: dict[str, str]) -> Made:
    """Write the rows with their log-probs into `rows.jsonl`; `models` are the frozen ones by name: `ref`, `last`.

    A pair has `<name>_chosen_logps` and `<name>_rejected_logps`, a group of completions `<name>_logps`, a list. A model
    with two names is scored once.
    """
    files: dict[str, Path] = {}
    for model in dict.fromkeys(models.values()):
        names = [name for name, own in models.items() if own == model]
        score_rows(run, folder / names[0], rows, model)
        files |= {name: folder / names[0] / LOGPS for name in names}
    if not run.main:
        return Made([])
    for name, path in files.items():
        rows = [{**row, **_columns(name, row, own["logps"])} for row, own in zip(rows, read_rows(path), strict=True)]
    write_rows(folder / ROWS, rows)
    tokens = sum(len(row["prompt_ids"]) + sum(map(len, _completions(row))) for row in rows)
    return Made([ROWS], {"rows": len(rows)}, cost={"tokens": tokens * len(set(models.values()))})


def score_rows(run: Run, folder: Path, rows: list[Row], model: str) -> Path:
    """The file with the log-probs of every row's completions under a model, in the order of the rows."""
    write_shards(
        run,
        folder,
        rows,
        size=SHARD_ROWS,
        start=lambda: FrozenScorer(run, model, _groups(rows[:CHECKED])),
        work=lambda scorer, shard, _: [{"logps": logps} for logps in scorer.rows(_groups(shard))],
        into=LOGPS,
        together=True,
        what=f"Scoring under {Path(model).parent.name if Path(model).name == 'train' else Path(model).name}",
    )
    wait_for(folder / LOGPS)  # all shards are there: whoever was first does not wait in an exchange
    return folder / LOGPS


def remove_parts(folder: Path) -> None:
    """Drop what a finished stage was put together from."""
    for part in folder.iterdir():
        if part.is_dir():
            shutil.rmtree(part)


def _completions(row: Row) -> list[list[int]]:
    return row["completion_ids"] if "completion_ids" in row else [row["chosen_ids"], row["rejected_ids"]]


def _groups(rows: list[Row]) -> PromptGroups:
    return PromptGroups([row["prompt_ids"] for row in rows], [_completions(row) for row in rows])


def _columns(name: str, row: Row, logps: list[float]) -> dict[str, Any]:
    if "completion_ids" in row:
        return {f"{name}_logps": logps}
    return {f"{name}_chosen_logps": logps[0], f"{name}_rejected_logps": logps[1]}
