"""AlpacaEval's annotations for tests: the real files beside the project, where they are, and rows made by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "datasets" / "alpaca_eval"
CONSTANTS = FOLDER / "lc_constants.json.gz"
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"AlpacaEval's files are not in {FOLDER}")
MODELS = (
    "FuseChat-Llama-3.1-8B-Instruct", "FuseChat-Llama-3.2-3B-Instruct", "claude-2", "gpt-3.5-turbo-1106", "vicuna-7b",
    "alpaca-7b", "text_davinci_001",
)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def slim(model: str) -> list[dict[str, Any]]:
    """A model's annotations, with texts of the real lengths and an instruction's hash in the place of its text."""
    return [
        {
            "instruction": row["instruction_sha1"],
            "output_1": "x" * row["len_output_1"],
            "output_2": "y" * row["len_output_2"],
            **{key: row[key] for key in ("preference", "dataset", "generator_1", "generator_2", "annotator")},
        }
        for row in lines(FOLDER / f"{model}.slim.jsonl.gz")
    ]


def expected() -> dict[str, dict[str, Any]]:
    return json.loads((FOLDER / "expected.json").read_text())


def row(
    preference: float | None, instruction: str = "i", lengths: tuple[int, int] = (4, 4), **more: Any
) -> dict[str, Any]:
    return {
        "instruction": instruction, "output_1": "x" * lengths[0], "output_2": "y" * lengths[1],
        "preference": preference, "generator_1": "base", "generator_2": "model", **more,
    }  # fmt: skip
