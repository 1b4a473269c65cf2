"""What the report's tests share: runs written as the commands leave them, and a browser where there is one."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The browser's driver and the bench's runs live in scripts/, which is no package of the project.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

EVIL = "</script><img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"


def annotation(number: int, preference: float | None, **own: Any) -> dict[str, Any]:
    """A judged row; the outputs tell themselves apart by number."""
    return {
        "instruction": f"Question {number}", "output_1": f"reference answer {number}", "generator_1": "base",
        "output_2": f"model answer {number}", "generator_2": "tuned", "dataset": f"set {number % 2}",
        "annotator": "judge", "preference": preference, **own,
    }  # fmt: skip


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as train and evaluate leave it; keywords are files' contents by stem."""

    def make(name: str = "rpo", rows: Any = None, **files: Any) -> Path:
        folder = tmp_path / name
        history = [
            {"step": 0, "eval_held_loss": 0.7, "eval_held_rewards/accuracies": 0.5},
            {"step": 1, "loss": 0.7, "rewards/accuracies": 0.5, "grad_norm": float("nan"), "learning_rate": 1e-4},
            {"step": 2, "loss": 0.5, "rewards/accuracies": 0.75, "grad_norm": 1.0, "learning_rate": 5e-5},
            {"step": 2, "eval_held_loss": 0.6, "eval_held_rewards/accuracies": 0.75, "eval_held_runtime": 3.0},
        ]
        contents: dict[str, Any] = {
            "run": {"method": "rpo", "model_name_or_path": "embedded:tiny", "beta": 0.1, "eval_datasets": {"held": {}}},
            "metrics": {
                "method": "rpo", "model": "embedded:tiny", "steps": 2, "seconds": 61.0,
                "before": {"held_rewards/accuracies": 0.5},
                "after": {"held_rewards/accuracies": 0.75, "held_rows": 100},
                "data": {"train": {"kind": "pairs", "rows": 10, "prepared_rows": 9}},
            },
            "trainer_state": {"log_history": history},
            **files,
        }  # fmt: skip
        for stem, content in contents.items():
            if content is not None:
                write(folder / f"{stem}.json", content)
        if rows is not None:
            write(folder / "evaluation" / "annotations.json", rows)
        folder.mkdir(exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from benching.chromium import Chromium, find

    executable = find()
    if executable is None:
        pytest.skip("no chromium or google-chrome is on the path")
    with Chromium(executable) as browser:
        yield browser
