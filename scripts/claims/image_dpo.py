"""Diffusion-DPO for brighter digits, beside SFT on the winners and beside unshared noise."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure

from claims import pictures
from claims.cells import Cell, Result, Store
from claims.report import Claim, Outcome, interval, values
from llmalign import quickstart_images as quick

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "sft": {"loss": "sft", "beta": 2000.0},  # beta at its default: the plain denoising loss has none
    "unshared": {"shared_noise": False},
}
LABELS = {"dpo": "Diffusion-DPO", "sft": "SFT on the winners", "unshared": "DPO, noise not shared"}


def cells(smoke: bool) -> list[Cell]:
    shape = {**pictures.SHAPE, **(pictures.SMOKE if smoke else {})}
    seeds = (0,) if smoke else (1, 2, 3)
    return [Cell("image_dpo", m, seed, {**shape, "changes": own}) for seed in seeds for m, own in METHODS.items()]


def experiment(cell: Cell, store: Store) -> Result:
    own = pictures.settings(cell)

    def train(start: Path, rows: Dataset, folder: Path) -> list[dict[str, Any]]:
        return quick.align(
            start, (rows, rows.select([])), folder, cell.seed, own, disable_tqdm=True, **cell.setting["changes"]
        )

    return pictures.experiment(cell, store, train)


def judge(records: list[Result]) -> Outcome:
    gains = {method: values(records, "gain", method=method) for method in METHODS}
    accuracies = values(records, "accuracy", method="dpo")
    over = {m: interval([a - b for a, b in zip(gains["dpo"], gains[m], strict=True)]) for m in ("sft", "unshared")}
    return Outcome(
        holds=min(gains["dpo"]) > 0.10 and min(accuracies) > 0.85 and all(gap.low > 0 for gap in over.values()),
        verdict=(
            f"Brightness rises by {min(gains['dpo']):.3f} to {max(gains['dpo']):.3f} and digit accuracy is "
            f"{min(accuracies):.3f} or more; DPO's lead in gain, paired by seed: "
            + ", ".join(f"over {LABELS[m]} {gap.text(3)}" for m, gap in over.items())
            + "."
        ),
        columns=pictures.COLUMNS,
        rows=[pictures.row(records, method, label) for method, label in LABELS.items()],
        numbers={method: gains[method] for method in METHODS} | {"accuracy": accuracies},
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    pictures.draw(figure, records, LABELS)


CLAIM = Claim(
    name="image_dpo",
    statement=(
        "On a small Stable Diffusion of digits, Diffusion-DPO on 256 pairs of its own pictures raises their brightness "
        "by more than .10 with digit accuracy above .85 on every seed, by more than SFT on the winners, and by more "
        "than with a noise of its own for each picture of a pair (95 % intervals of the differences above 0)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *pictures.SOURCES),
)
