"""Training curves: what is drawn is what was logged."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from llmalign.evaluation.panels import Panel
from llmalign.evaluation.plots import COLOURS, plot_training, series

HISTORY = [
    {"step": 0, "eval_rewards/accuracies": 0.5},
    {"step": 10, "rewards/accuracies": 0.6, "loss": 0.69},
    {"step": 20, "rewards/accuracies": 0.7, "loss": 0.6},
    {"step": 20, "eval_rewards/accuracies": 0.65, "eval_loss": 0.62},
]


def share(path: Path, colour: str) -> float:
    """Share of the pixels that have a colour."""
    pixels = imread(path)[..., :3]
    return float((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.02).mean())


def test_series_takes_the_steps_where_a_metric_was_logged() -> None:
    assert series(HISTORY, "loss") == ([10, 20], [0.69, 0.6])
    assert series(HISTORY, "eval_rewards/accuracies") == ([0, 20], [0.5, 0.65])
    assert series(HISTORY, "absent") == ([], [])


def test_runs_are_overlaid_in_their_own_colours(tmp_path: Path) -> None:
    other = [entry | {key: value + 0.1 for key, value in entry.items() if key != "step"} for entry in HISTORY]
    one = plot_training({"RPO": HISTORY}, tmp_path / "deep" / "one.png")
    two = plot_training({"RPO": HISTORY, "DPO": other}, tmp_path / "two.png", title="Both")
    assert one.read_bytes().startswith(b"\x89PNG")
    assert share(one, COLOURS[0]) > 0 and share(one, COLOURS[1]) == 0
    assert share(two, COLOURS[0]) > 0 and share(two, COLOURS[1]) > 0


def test_a_metric_that_was_not_logged_says_so_instead_of_drawing(tmp_path: Path) -> None:
    panels = (Panel("absent", "Absent", "none"),)
    path = plot_training({"RPO": HISTORY}, tmp_path / "empty.png", panels=panels)
    drawn = plot_training({"RPO": HISTORY}, tmp_path / "drawn.png", panels=(Panel("loss", "Loss", "nats"),))
    assert share(path, COLOURS[0]) < share(drawn, COLOURS[0])  # the legend alone is in colour


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run"):
        plot_training({}, tmp_path / "none.png")


def test_a_place_without_a_panel_stays_white(tmp_path: Path) -> None:
    panels = [Panel("loss", "Loss", "nats")] * 3
    pixels = imread(plot_training({"RPO": HISTORY}, tmp_path / "three.png", panels=panels))[..., :3]
    height, width = pixels.shape[:2]
    fourth = pixels[height * 6 // 10 : height * 9 // 10, width * 6 // 10 : width * 95 // 100]
    assert (fourth == 1).all()


def test_a_moving_average_lies_over_its_values(tmp_path: Path) -> None:
    averaged = [entry | ({"loss_average": 0.65} if "loss" in entry else {}) for entry in HISTORY]
    panels = (Panel("loss", "Loss", "nats"),)
    without, drawn = (
        plot_training({"RPO": history}, tmp_path / f"{place}.png", panels=panels)
        for place, history in enumerate((HISTORY, averaged))
    )
    assert share(drawn, COLOURS[0]) > share(without, COLOURS[0])
