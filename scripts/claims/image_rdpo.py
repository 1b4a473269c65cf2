"""rDPO beside DPO on images when 40 % of the labels are flipped."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure

from claims import pictures
from claims.cells import Cell, Result, Store
from claims.report import Claim, Outcome, interval, values
from llmalign import quickstart_images as quick

FLIPS = 0.4
SHAPE = {**pictures.SHAPE, "pairs": 512, "flips": FLIPS}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rdpo": {"loss": "rdpo", "flip_rate": FLIPS},
    "clean": {},
}
LABELS = {"dpo": "DPO, 40 % flipped", "rdpo": "rDPO, 40 % flipped", "clean": "DPO, none flipped"}


def cells(smoke: bool) -> list[Cell]:
    seeds = (0,) if smoke else (1, 2, 3)
    found = []
    for seed in seeds:
        for method, own in METHODS.items():
            shape = {**SHAPE, **(pictures.SMOKE if smoke else {}), "changes": own}
            found.append(Cell("image_rdpo", method, seed, {**shape, **({"flips": 0.0} if method == "clean" else {})}))
    return found


def experiment(cell: Cell, store: Store) -> Result:
    own = pictures.settings(cell)

    def train(start: Path, rows: Dataset, folder: Path) -> list[dict[str, Any]]:
        noisy = pictures.flipped(rows, cell.setting["flips"], cell.seed)
        return quick.align(
            start, (noisy, noisy.select([])), folder, cell.seed, own, disable_tqdm=True, **cell.setting["changes"]
        )

    return pictures.experiment(cell, store, train)


def judge(records: list[Result]) -> Outcome:
    gains = {method: values(records, "gain", method=method) for method in METHODS}
    lead = interval([a - b for a, b in zip(gains["rdpo"], gains["dpo"], strict=True)])
    accuracies = {method: values(records, "accuracy", method=method) for method in METHODS}
    return Outcome(
        holds=lead.low > 0 and min(accuracies["rdpo"]) > 0.85,
        verdict=(
            f"rDPO's lead over DPO in gain, paired by seed: {lead.text(3)}; digit accuracy at least "
            f"{min(accuracies['rdpo']):.3f} (rDPO), {min(accuracies['dpo']):.3f} (DPO)."
        ),
        columns=pictures.COLUMNS,
        rows=[pictures.row(records, method, label) for method, label in LABELS.items()],
        numbers={**gains, **{f"accuracy_{method}": found for method, found in accuracies.items()}},
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    pictures.draw(figure, records, LABELS)


CLAIM = Claim(
    name="image_rdpo",
    statement=(
        "With 40 % of the labels flipped, rDPO told the rate brightens digits by more than DPO (the 95 % interval of "
        "the difference above 0, paired by seed) and keeps digit accuracy above .85 on every seed."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *pictures.SOURCES),
)
