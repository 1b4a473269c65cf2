"""D3PO on digits: the reward rises while the loss stays at log 2."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure

from claims import pictures
from claims import start as start_of
from claims.cells import Cell, Result, Store
from claims.report import Claim, Outcome, values
from llmalign import quickstart_images as quick
from llmalign.diffusion.image_trainer import lora_config
from llmalign.diffusion.online import D3POConfig, D3POTrainer

SHAPE = {"pairs": 0, "pictures": 200, "steps": 60, "rounds": 6, "round_pairs": 64, "sampling_steps": 10, "rate": 1e-3}
SMOKE = {"pictures": 10, "steps": pictures.SMOKE["steps"], "rounds": 2, "round_pairs": 4, "sampling_steps": 2}
LABELS = {"d3po": "D3PO"}


def cells(smoke: bool) -> list[Cell]:
    seeds = (0,) if smoke else (1, 2, 3)
    return [Cell("image_d3po", "d3po", seed, {**SHAPE, **(SMOKE if smoke else {})}) for seed in seeds]


def experiment(cell: Cell, store: Store) -> Result:
    s, reward = cell.setting, pictures.brightness()
    captions = Dataset.from_list([{"row_id": k, "caption": caption} for k, caption in enumerate(quick.prompts(100))])

    def train(start: Path, rows: Dataset, folder: Path) -> list[dict[str, Any]]:
        config = D3POConfig(
            output_dir=str(folder),
            rounds=s["rounds"],
            pairs_per_round=s["round_pairs"],
            sampling_steps=s["sampling_steps"],
            sampling_batch_size=128,
            guidance_scale=1.0,
            beta=0.1,
            ratio_clip=0.1,
            learning_rate=s["rate"],
            lr_scheduler_type="constant",
            per_device_train_batch_size=s["round_pairs"],
            reward_funcs=["brightness"],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=cell.seed,
            image_cache_dir=str(folder / "encoded"),
        )
        trainer = D3POTrainer(
            start, config, captions, peft_config=lora_config(8, 8, quick.TARGETS), reward_functions=[reward]
        )
        start_of.train(trainer)
        trainer.save_model()
        return trainer.state.log_history

    return pictures.experiment(cell, store, train)


def judge(records: list[Result]) -> Outcome:
    gains, accuracies = (values(records, key, method="d3po") for key in ("gain", "accuracy"))
    first = values(records, "accuracy_before", method="d3po")
    losses = [loss for run in values(records, "loss", method="d3po") for loss in run]
    away = max(abs(loss - math.log(2)) for loss in losses)
    return Outcome(
        holds=min(gains) > 0.05 and away < 0.002,
        verdict=(
            f"Brightness rises by {min(gains):.3f} to {max(gains):.3f} while no step's loss is more than {away:.1e} "
            f"from log 2; digit accuracy ends at {fmean(accuracies):.3f} (from {fmean(first):.3f})."
        ),
        columns=pictures.COLUMNS,
        rows=[pictures.row(records, "d3po", "D3PO")],
        numbers={"gain": gains, "accuracy": accuracies, "loss_first": losses[0], "loss_last": losses[-1]},
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    pictures.draw(figure, records, LABELS)


CLAIM = Claim(
    name="image_d3po",
    statement=(
        "D3PO (10 DDIM steps, no guidance, beta .1, ratios clipped at .1) on pairs of its own pictures raises "
        "brightness by more than .05 on every seed, while its loss stays within .002 of log 2: it says "
        "nothing of progress."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *pictures.SOURCES),
)
