"""SePPO on winners alone, beside SFT on the same winners."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure

from claims import pictures
from claims import start as start_of
from claims.cells import Cell, Result, Store
from claims.report import Claim, Outcome, interval, values
from llmalign import quickstart_images as quick
from llmalign.diffusion.image_trainer import lora_config
from llmalign.diffusion.sampling import load_for_sampling
from llmalign.diffusion.seppo import SePPOConfig, SePPOTrainer

SHAPE = {**pictures.SHAPE, "rate": 1e-3, "beta": 50.0, "best_of": 8, "every": 15, "reference_steps": 10}
SHORT = {"best_of": 2, "every": 1, "reference_steps": 2}
LABELS = {"seppo": "SePPO, winners alone", "sft": "SFT on the winners"}


def cells(smoke: bool) -> list[Cell]:
    seeds = (0,) if smoke else (1, 2, 3)
    shape = {**SHAPE, **(pictures.SMOKE if smoke else {}), **(SHORT if smoke else {})}
    return [Cell("image_seppo", method, seed, shape) for seed in seeds for method in LABELS]


def experiment(cell: Cell, store: Store) -> Result:
    s, own = cell.setting, pictures.settings(cell)
    common = {"learning_rate": own.rate, "max_steps": own.steps, "disable_tqdm": True}

    def train(start: Path, rows: Dataset, folder: Path) -> list[dict[str, Any]]:
        winners = best_of(start, s["best_of"], cell, own)
        if cell.method == "sft":  # the plain denoising loss reads the winners alone
            pairs = winners.map(lambda row: {"chosen": row["image"], "rejected": row["image"], "label": 1.0})
            return quick.align(
                start, (pairs, pairs.select([])), folder, cell.seed, own, loss="sft", beta=2000.0, **common
            )
        config = SePPOConfig(
            output_dir=str(folder),
            beta=own.beta,
            lr_scheduler_type="constant",
            per_device_train_batch_size=own.batch,
            caption_dropout=0.1,
            checkpoint_every=s["every"],
            sampling_steps=s["reference_steps"],
            guidance_scale=own.guidance,
            logging_steps=max(1, own.steps // 20),
            save_strategy="no",
            seed=cell.seed,
            image_cache_dir=str(folder / "encoded"),
            encode_batch_size=64,
            winner_guard="off",
            **common,
        )
        trainer = SePPOTrainer(start, config, winners, peft_config=lora_config(own.rank, own.rank, quick.TARGETS))
        start_of.train(trainer)
        trainer.save_model()
        return trainer.state.log_history

    return pictures.experiment(cell, store, train, pairs=False)


def best_of(start: Path, count: int, cell: Cell, own: quick.Settings) -> Dataset:
    """For each prompt the brightest of `count` pictures of the start, in the columns that SePPO reads."""
    pipe, reward, asked = load_for_sampling(str(start)), pictures.brightness(), quick.prompts(own.pairs)
    seeds = range(100 * cell.seed + 2_000, 100 * cell.seed + 2_000 + count)
    drawn = [quick.draw(pipe, own.pairs, seed, own, progress=False) for seed in seeds]
    scored = torch.stack([reward(asked, images) for images in drawn])
    best = scored.argmax(dim=0).tolist()
    rows = [{"row_id": k, "caption": asked[k], "image": quick.png(drawn[side][k])} for k, side in enumerate(best)]
    return Dataset.from_list(rows)


def judge(records: list[Result]) -> Outcome:
    gains = {method: values(records, "gain", method=method) for method in LABELS}
    lead = interval([a - b for a, b in zip(gains["seppo"], gains["sft"], strict=True)])
    accuracies = values(records, "accuracy", method="seppo")
    return Outcome(
        holds=lead.low > 0 and min(accuracies) > 0.85,
        verdict=(
            f"SePPO's lead over SFT in gain, paired by seed: {lead.text(3)}; digit accuracy at least "
            f"{min(accuracies):.3f}."
        ),
        columns=pictures.COLUMNS,
        rows=[pictures.row(records, method, label) for method, label in LABELS.items()],
        numbers={**gains, "accuracy": accuracies},
        draw=lambda figure: _report_picture(figure, records),
    )


def _report_picture(figure: Figure, records: list[Result]) -> None:
    pictures.draw(figure, records, LABELS)


CLAIM = Claim(
    name="image_seppo",
    statement=(
        "With winners alone (the brightest of eight), SePPO brightens digits by more than SFT on the same winners (the "
        "95 % interval of the difference above 0, paired by seed), with digit accuracy above .85 on every seed."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *pictures.SOURCES),
)
