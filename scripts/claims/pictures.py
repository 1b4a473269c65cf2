"""What the claims on images share: a small pipeline, pairs of its own pictures, training, and what is measured."""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

import llmalign.diffusion
from claims.cells import Cell, Result, Store, code_version, package_files
from claims.report import Interval, interval, values
from llmalign import quickstart_images as quick
from llmalign.diffusion.base import BaseSettings
from llmalign.diffusion.digits import PROMPTS, DigitClassifier, train_digits
from llmalign.diffusion.sampling import load_for_sampling
from llmalign.rewards.images import ImageReward, load_image_reward

LIBRARY = (
    *package_files("llmalign.diffusion"),
    *package_files("llmalign.losses"),
    Path(quick.__file__),
    *(Path(llmalign.diffusion.__file__).parents[1] / "trainers" / name for name in ("pair.py", "pair_loss.py")),
)
SOURCES = (Path(__file__), *LIBRARY)
BASE_SOURCES = tuple(path for path in package_files("llmalign.diffusion") if path.stem in ("base", "digits", "tiny"))
SHAPE = {"pairs": 256, "pictures": 200, "steps": 60, "rate": 5e-4, "beta": 200.0}
SMOKE = {"pairs": 8, "pictures": 10, "steps": 2}
SHOWN = 10  # pictures of a record


def settings(cell: Cell) -> quick.Settings:
    """The quickstart's, with a cell's own numbers."""
    own = {name: cell.setting[name] for name in SHAPE if name in cell.setting}
    short = {"sampling_steps": 2, "batch": 4} if cell.setting["steps"] == SMOKE["steps"] else {}
    return quick.Settings(**own, held_out_pairs=0, **short)


def base(store: Store, *, smoke: bool) -> Path:
    """The digits pipeline that every cell starts from, trained once."""
    code = code_version(BASE_SOURCES)
    given = BaseSettings(vae_steps=2, unet_steps=2) if smoke else BaseSettings()
    cell = Cell("images", "digits-smoke" if smoke else "digits", 0)
    return store.model(cell, code, lambda folder: train_digits(folder, settings=given, progress=False))


def brightness() -> ImageReward:
    return load_image_reward("brightness")


def experiment(
    cell: Cell, store: Store, train: Callable[[Path, Dataset, Path], list[dict[str, Any]]], *, pairs: bool = True
) -> Result:
    """Draw pairs (or none), train with `train(start, pairs, folder)`, measure the same pictures before and after."""
    own = settings(cell)
    start = base(store, smoke=own.steps == SMOKE["steps"])
    pipe = load_for_sampling(str(start))
    reward = brightness()
    rows = quick.labelled_pairs(pipe, own.pairs if pairs else 0, reward, cell.seed, own, progress=False)
    before = quick.draw(pipe, own.pictures, 12_345, own, progress=False)
    with ScratchFolder() as folder:
        history = train(start, rows, folder)
        after = quick.draw(load_for_sampling(str(folder), str(start)), own.pictures, 12_345, own, progress=False)
    return measured(before, after, reward, history)


def measured(
    before: Sequence[Image.Image], after: Sequence[Image.Image], reward: ImageReward, history: list[dict[str, Any]]
) -> Result:
    """Reward and digit accuracy of both, the share of pictures that got better, and a few pictures."""
    labels = [place % len(PROMPTS) for place in range(len(before))]
    classifier = DigitClassifier()
    first, last = (quick.rewards(reward, images) for images in (before, after))
    pairs = list(zip(first, last, strict=True))
    logged = [entry for entry in history if "loss" in entry]
    return {
        "before": fmean(first),
        "after": fmean(last),
        "gain": fmean(last) - fmean(first),
        "win_rate": fmean(float(b > a) + 0.5 * float(a == b) for a, b in pairs),
        "accuracy_before": classifier.accuracy(before, labels),
        "accuracy": classifier.accuracy(after, labels),
        "loss": [entry["loss"] for entry in logged],
        "steps": [entry["step"] for entry in logged],
        "winner_ratio": [entry["error/winner_ratio"] for entry in logged if "error/winner_ratio" in entry],
        "pictures": [[np.asarray(image).tolist() for image in images[:SHOWN]] for images in (before, after)],
    }


class ScratchFolder(tempfile.TemporaryDirectory):
    """A scratch folder as a Path."""

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def flipped(rows: Dataset, share: float, seed: int) -> Dataset:
    """The pairs with a share of them turned round; which, is noted in the column `flipped`."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    wrong = set(order[: round(share * len(rows))])

    def turn(row: dict[str, Any], place: int) -> dict[str, Any]:
        swap = place in wrong
        sides = (row["rejected"], row["chosen"]) if swap else (row["chosen"], row["rejected"])
        return {"chosen": sides[0], "rejected": sides[1], "flipped": swap}

    return rows.map(turn, with_indices=True)


def over_seeds(records: list[Result], key: str, method: str) -> Interval:
    return interval(values(records, key, method=method))


def row(records: list[Result], method: str, label: str) -> list[str]:
    """One line of a claim's table."""
    return [
        label,
        *(over_seeds(records, key, method).text(3) for key in ("before", "after", "gain", "accuracy", "win_rate")),
    ]


COLUMNS = ["method", "brightness before", "after", "gain", "digit accuracy after", "win rate, same noise"]


def draw(figure: Figure, records: list[Result], labels: dict[str, str], size: int = SHOWN) -> None:
    """The first seed's pictures: the start, then each method's."""
    first = {method: values(records, "pictures", method=method)[0] for method in labels}
    rows = {
        "start": next(iter(first.values()))[0],
        **{labels[method]: pictures[1] for method, pictures in first.items()},
    }
    for axis, (label, pictures) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows.items(), strict=True):
        axis.imshow(np.concatenate([np.array(picture, dtype=np.uint8) for picture in pictures[:size]], axis=1))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
