"""Three runs to report on: training curves of 500 steps each, and 805 judged outputs."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmalign.evaluation.annotations import read_annotations, write_json

ROWS, STEPS = 805, 500
METRICS = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "drift/chosen", "grad_norm", "learning_rate", "entropy", "kl_to_reference", "reward",
)  # fmt: skip
WORDS = """
    the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but not
    what all were we when your can said there use an each which she do how their if will up other about out many then
    them these so some her would make like him into time has look two more write go see
""".split()


def make_runs(folder: Path, annotations: Sequence[Path] = ()) -> list[Path]:
    """Write three folders as `train` and `evaluate` leave them, and return them.

    The outputs are those of the files of annotations, the third run's of both in turn; without files they are made of
    words, as long as AlpacaEval's.
    """
    rng = random.Random(0)
    sets = [read_annotations(path) for path in annotations][:2] or [_made(rng), _made(rng)]
    first, second = sets if len(sets) == 2 else (sets[0], _made(rng))
    third = [{**own, "generator_2": "mixed"} for own in itertools.chain(*zip(first[::2], second[1::2], strict=False))]
    paths = []
    for place, rows in enumerate((first, second, third)):
        path = folder / str(rows[0]["generator_2"])
        (path / "evaluation").mkdir(parents=True)
        write_json(path / "evaluation" / "annotations.json", rows)
        recipe = {"method": "dpo", "model_name_or_path": "base", "seed": place, "learning_rate": 10.0**-place}
        (path / "run.json").write_text(json.dumps(recipe), encoding="utf-8")
        (path / "trainer_state.json").write_text(json.dumps({"log_history": _history(rng)}), encoding="utf-8")
        write_json(path / "metrics.json", {"method": "dpo", "steps": STEPS, "seconds": 3600, "before": {}, "after": {}})
        paths.append(path)
    return paths


def _history(rng: random.Random) -> list[dict[str, float]]:
    found = []
    for step in range(1, STEPS + 1):
        value = 1 - math.exp(-step / 150)
        found.append({"step": step, **{name: value + rng.gauss(0, 0.1) for name in METRICS}})
        if step % 50 == 0:
            found.append({"step": step, **{f"eval_{name}": value + rng.gauss(0, 0.02) for name in METRICS}})
    return found


def _made(rng: random.Random) -> list[dict[str, Any]]:
    def text(words: float) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(max(1, round(words))))

    name = f"made-{rng.randrange(10**6)}"
    return [
        {
            "dataset": f"set {row % 5}", "instruction": f"{row} {text(30)}", "output_1": text(rng.gauss(340, 120)),
            "generator_1": "base", "output_2": text(rng.gauss(300, 120)), "generator_2": name, "annotator": "made",
            "preference": rng.choice([1.0, 1.2, 1.5, 1.9, 2.0]),
        }
        for row in range(ROWS)
    ]  # fmt: skip
