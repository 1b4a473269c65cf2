"""`report_to` is transformers' own: a tracker that is there is used, one that is not is named at once."""

import importlib.util
from pathlib import Path

import pytest

from llmalign.cli import main

RECIPE = str(Path(__file__).resolve().parents[2] / "trainers" / "rpo" / "smoke.yaml")


@pytest.mark.parametrize("name, said", [("wandb", "pip install wandb"), ("tensorbord", "does not know")])
def test_a_tracker_that_is_missing(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    assert main(["train", RECIPE, "--output_dir", str(tmp_path / "run"), "--report_to", f"[{name}]"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard: pip install tensorboard"
)
def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", RECIPE, "--output_dir", str(tmp_path / "run"), "--report_to", "[tensorboard]"]) == 0
    tags: set[str] = set()
    for file in (tmp_path / "run").rglob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"eval/heldout_rewards/accuracies", "train/loss"} <= tags
