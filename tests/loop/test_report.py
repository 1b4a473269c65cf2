"""What rounds came to, as a table and as a picture."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from llmalign.evaluation.winrate import bootstrap_mean, wilson, win_rate
from llmalign.loop.report import plot_rounds, rounds_table


def measured(mean: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": mean if low is None else low, "high": mean if high is None else high, "n": 8}


def result(*rounds: dict[str, Any]) -> dict[str, Any]:
    numbered = [{"round": number, "counts": {}, **own} for number, own in enumerate(rounds)]
    return {
        "method": "inpo",
        "model": "tiny",
        "oracle": "judge",
        "rounds": numbered,
        "final_model": "out/round-1/train",
    }


WHOLE = result(
    {"length": measured(41.25, 30, 50), "duality_gap": measured(0.31, 0.2, 0.42)},
    {
        "counts": {"pair": {"prompts": 1300, "pairs": 1234}}, "length": measured(44, 33, 55), "kl": measured(2.5, 2, 3),
        "against_start": measured(0.625, 0.5, 0.75), "against_previous": measured(None, 0.0, 1.0),
        "duality_gap": measured(0.2, 0.1, 0.3), "reward": measured(1234.5, 1000, 1500),
    },
)  # fmt: skip


def shown(content: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(rounds_table(content))
    return console.file.getvalue()


def row(text: str, number: int) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"│ {number:>5}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_every_measurement_has_its_column_with_its_interval() -> None:
    text = shown(WHOLE)
    assert "inpo on tiny, judged by judge" in text and "out/round-1/train: the model." in text
    names = ["round", "trained on", "wins over the start", "wins over the round before", "reward", "length"]
    assert [text.index(name) for name in names] == sorted(text.index(name) for name in names)
    assert row(text, 0) == ["0", "", "", "", "", "41.2 [30.0, 50.0]", "", "0.310 [0.200, 0.420]"]
    assert row(text, 1) == [
        "1", "1,234 pairs", "0.625 [0.500, 0.750]", "nothing judged", "1.23e+03 [1e+03, 1.5e+03]", "44.0 [33.0, 55.0]",
        "2.50 [2.00, 3.00]", "0.200 [0.100, 0.300]",
    ]  # fmt: skip


def test_what_was_never_measured_has_no_column() -> None:
    text = shown(result({}, {"counts": {"pair": {"groups": 3}}, "length": measured(4.0)}))
    assert "wins" not in text and "duality" not in text and "KL" not in text
    assert row(text, 1) == ["1", "3 groups", "4.0 [4.0, 4.0]"]


def drawn(content: dict[str, Any], folder: Path) -> Any:
    plot_rounds(content, folder / "rounds.png")
    assert [path.name for path in folder.iterdir()] == ["rounds.png"]
    return imread(folder / "rounds.png")


def test_the_picture_is_there_and_shows_something(tmp_path: Path) -> None:
    """Five panels on three rows of two; ink in each, but for the sixth, which is empty."""
    picture = drawn(WHOLE, tmp_path)[..., :3]
    height, width = picture.shape[:2]
    for place in range(6):
        top, left = place // 2 * height // 3, place % 2 * width // 2
        panel = picture[top : top + height // 3, left : left + width // 2]
        inked = (panel < 0.9).any(axis=2).mean()
        assert inked > 0.005 if place < 5 else inked < 0.002, (place, inked)


def test_the_same_rounds_give_the_same_picture(tmp_path: Path) -> None:
    content = result({}, {"length": measured(44, 33, 55)})
    drawn(content, tmp_path)
    first = (tmp_path / "rounds.png").read_bytes()
    drawn(content, tmp_path)
    assert (tmp_path / "rounds.png").read_bytes() == first


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    plot_rounds(result({}, {}), tmp_path / "rounds.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_whoever_wins_all_is_drawn(share: float, tmp_path: Path) -> None:
    """Rounding may leave the end of an interval a hair on the wrong side of its mean: 64 wins, or losses, of 64."""
    rates = [wilson(share, n) for n in range(1, 200)]
    worst = max(rates, key=lambda ends: max(share - ends[1], ends[0] - share))
    assert max(share - worst[1], worst[0] - share) > 0, "no such case is left"
    plot_rounds(result({}, {"against_start": measured(share, *worst)}), tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").is_file()


def test_equal_values_are_drawn(tmp_path: Path) -> None:
    """A mean of equal numbers, taken in two orders, may differ in its last digit."""
    for clusters in ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]):
        rate = win_rate([0.9] * 10, clusters)
        length = bootstrap_mean([0.1] * 10, clusters)
        assert math.isclose(length.mean, length.low) and math.isclose(length.high, length.low)
        own = {"against_start": measured(rate.rate, rate.low, rate.high),
               "kl": measured(length.mean, length.low, length.high)}  # fmt: skip
        plot_rounds(result({}, own), tmp_path / "rounds.png")
