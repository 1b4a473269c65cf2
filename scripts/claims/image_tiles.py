"""A small pipeline trained on captioned 32-pixel tiles, then aligned: pixel art, and no more than a glance at it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression

from claims import pictures
from claims.cells import Cell, Result, Store, code_version
from claims.report import Claim, Outcome, values
from llmalign import quickstart_images as quick
from llmalign.data.images import decode, pixels
from llmalign.diffusion.base import BaseSettings, train_pipeline
from llmalign.diffusion.sampling import load_for_sampling, sample_images

NEEDS = "LLMALIGN_TILES"
SIZE = 32
BASE = BaseSettings(
    vae_channels=(16, 32, 64), unet_channels=(48, 96), max_length=12, vae_steps=600, unet_steps=1500, unet_rate=2e-3
)
SHAPE = {"pairs": 256, "pictures": 128, "steps": 60, "rate": 5e-4, "beta": 800.0, "guidance": 3.0}
LABELS = {"dpo": "Diffusion-DPO"}
SMALL = BaseSettings(vae_channels=(8, 16, 16), unet_channels=(16, 32), max_length=12, vae_steps=2, unet_steps=2)
COLUMNS = ["method", "brightness before", "after", "gain", "kind recognised before", "after", "win rate, same noise"]


def tiles(smoke: bool) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pictures (N, 3, 32, 32), captions, and the kind of each (dngn, item, mon); made up for a smoke run."""
    if smoke:
        generator = torch.Generator().manual_seed(0)
        kinds = ["dngn", "item", "mon"] * 8
        return torch.rand(24, 3, SIZE, SIZE, generator=generator) * 2 - 1, [f"tile {kind}" for kind in kinds], kinds
    folder = Path(os.environ[NEEDS])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [pixels(decode((folder / row["file_name"]).read_bytes()), SIZE) for row in rows]
    return torch.stack(images), [row["text"] for row in rows], [row["category"] for row in rows]


def asked(captions: list[str], count: int) -> list[str]:
    """Captions of the data, evenly spread over it."""
    return [captions[place * len(captions) // count] for place in range(count)]


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [Cell("image_tiles", "dpo", 0, {**SHAPE, **pictures.SMOKE, "smoke": True})]
    return [Cell("image_tiles", "dpo", seed, SHAPE) for seed in (1, 2, 3)]


def experiment(cell: Cell, store: Store) -> Result:
    s, smoke = cell.setting, cell.setting.get("smoke", False)
    images, captions, kinds = tiles(smoke)
    given = SMALL if smoke else BASE
    start = store.model(
        Cell("images", "tiles", 0, asdict(given)),
        code_version(pictures.BASE_SOURCES),
        lambda folder: train_pipeline(images, captions, folder, given, progress=False),
    )
    own = quick.Settings(
        steps=s["steps"], rate=s["rate"], beta=s["beta"], sampling_steps=2 if smoke else 20, batch=4 if smoke else 32
    )
    reward = pictures.brightness()

    def draw(pipe: Any, prompts: list[str], seed: int) -> list[Image.Image]:
        options = {"steps": own.sampling_steps, "guidance": s["guidance"], "batch_size": 64, "progress": False}
        return list(sample_images(pipe, prompts, seed=seed, **options))

    pipe = load_for_sampling(str(start))
    prompts, tested = asked(captions, s["pairs"]), asked(captions, s["pictures"])
    sides = [draw(pipe, prompts, 2 * cell.seed + 1_000 + side) for side in range(2)]
    rows = quick.pairs_of(prompts, sides, reward)
    before = draw(pipe, tested, 12_345)
    with pictures.ScratchFolder() as folder:
        history = quick.align(start, (rows, rows.select([])), folder, cell.seed, own, disable_tqdm=True)
        after = draw(load_for_sampling(str(folder), str(start)), tested, 12_345)
    return _measured(before, after, (images, kinds, asked(kinds, s["pictures"])), reward, tested, history)


def _measured(before: Any, after: Any, known: Any, reward: Any, prompts: list[str], history: list[Any]) -> Result:
    images, kinds, wanted = known
    model = LogisticRegression(C=0.01, max_iter=300).fit(_features(images), kinds)

    def recognised(drawn: list[Image.Image]) -> float:
        found = model.predict(_features(torch.stack([pixels(image, SIZE) for image in drawn])))
        return fmean(float(a == b) for a, b in zip(found, wanted, strict=True))

    first, last = (reward(prompts, drawn).tolist() for drawn in (before, after))
    return {
        "before": fmean(first),
        "after": fmean(last),
        "gain": fmean(last) - fmean(first),
        "win_rate": fmean(float(b > a) + 0.5 * float(a == b) for a, b in zip(first, last, strict=True)),
        "accuracy_before": recognised(before),
        "accuracy": recognised(after),
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "pictures": [[np.asarray(image).tolist() for image in drawn[::8][:12]] for drawn in (before, after)],
    }


def _features(images: torch.Tensor) -> Any:
    """Colours of 8x8 blocks, (N, 192)."""
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1).numpy()


def judge(records: list[Result]) -> Outcome:
    gains, wins = (values(records, key, method="dpo") for key in ("gain", "win_rate"))
    keys = ("before", "after", "gain", "accuracy_before", "accuracy", "win_rate")
    return Outcome(
        holds=min(gains) > 0.05 and min(wins) > 0.8,
        verdict=(
            f"Brightness rises by {min(gains):.3f} to {max(gains):.3f}, in {min(wins):.0%} or more of the pictures; a "
            f"classifier of the real tiles recognises {fmean(values(records, 'accuracy_before', method='dpo')):.2f} of "
            f"the start's pictures by their kind and {fmean(values(records, 'accuracy', method='dpo')):.2f} of the "
            "aligned model's."
        ),
        columns=COLUMNS,
        rows=[["Diffusion-DPO", *(pictures.over_seeds(records, key, "dpo").text(3) for key in keys)]],
        numbers={"gain": gains, "win_rate": wins},
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    pictures.draw(figure, records, LABELS, 12)


CLAIM = Claim(
    name="image_tiles",
    statement=(
        "A small Stable Diffusion trained on 2,318 captioned 32-pixel tiles and aligned by Diffusion-DPO on 256 pairs "
        "of its own pictures draws pictures brighter by more than .05, in more than 80 % of the cases, on every seed."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *pictures.SOURCES),
    needs=NEEDS,
)
