"""How long win rates take, on annotations made here: `python scripts/bench_evaluation.py` (seconds, best of five).

Length control with cross-validation on 805 rows and the same gamed rows as AlpacaEval's constants have, all numbers of
10,000 rows, their comparison with another model's, and a Bradley-Terry ranking of twenty models.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmalign.evaluation.alpaca import compare, summarize
from llmalign.evaluation.annotations import read_annotations, write_json
from llmalign.evaluation.bradley_terry import bradley_terry
from llmalign.evaluation.constants import Constants, instruction_index
from llmalign.evaluation.length_control import Gamed

RUNS = 5
ALPACA_EVAL, LARGE = 805, 10_000


def main() -> None:
    """Print one line a measurement."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=ALPACA_EVAL)
    gamed = Gamed(np.tanh(rng.normal(1, 1, 1610)), np.tile(difficulty, 2), rng.uniform(0, 0.6, 1610))
    constants = Constants(difficulty, gamed)
    hashes = list(instruction_index.known)
    small, large = rows(rng, ALPACA_EVAL, hashes), rows(rng, LARGE)
    many = [{**row, "generator_2": f"model {number}"} for number in range(20) for row in rows(rng, ALPACA_EVAL, hashes)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        write_json(file, large)
        found = {
            "length-controlled win rate with cross-validation, 805 rows": lambda: summarize(small, constants=constants),
            "reading 10,000 annotations and all their numbers": lambda: summarize(read_annotations(file)),
            "the same and the paired difference from another model": lambda: compare(read_annotations(file), large),
            "Bradley-Terry with intervals, 20 models of 805 rows": lambda: bradley_terry(many),
        }
        measured = {name: best(run) for name, run in found.items()}
    print("\n".join(f"{seconds:7.3f} s  {name}" for name, seconds in measured.items()))
    print(json.dumps(measured))


def rows(rng: np.random.Generator, count: int, instructions: list[str] | None = None) -> list[dict[str, Any]]:
    """Annotations with texts of AlpacaEval's lengths."""
    lengths = rng.integers(50, 4000, size=(count, 2))
    return [
        {
            "instruction": instructions[i] if instructions else f"instruction {i}",
            "output_1": "x" * int(lengths[i, 0]), "output_2": "y" * int(lengths[i, 1]), "preference": float(p),
            "generator_1": "base", "generator_2": "model", "dataset": f"set {i % 5}",
        }
        for i, p in enumerate(rng.uniform(1, 2, count))
    ]  # fmt: skip


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
