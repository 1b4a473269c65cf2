"""`llmalign quickstart --images`: a small Stable Diffusion of digits, aligned with Diffusion-DPO to be brighter; no
download."""

import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback

from llmalign.diffusion.configs import DiffusionPreferenceConfig
from llmalign.diffusion.digits import PROMPTS, DigitClassifier, ensure_digits
from llmalign.diffusion.image_trainer import lora_config
from llmalign.diffusion.sampling import draw_grid, load_for_sampling, sample_images
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.embedded.tiny import one_thread
from llmalign.evaluation import Estimate, bootstrap_mean
from llmalign.evaluation.panels import IMAGE_PANELS
from llmalign.evaluation.plots import plot_training
from llmalign.rewards.images import ImageReward, load_image_reward
from llmalign.screen import LossBar, quiet

logger = logging.getLogger(__name__)

#: attention, convolutions, time and feed-forward layers of the UNet: attention alone learns half as much here
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
PANELS = [panel for panel in IMAGE_PANELS if panel.metric.startswith(("rewards/", "error/chosen", "error/rejected"))]
SHOWN = 20  # pictures of the grid
NEXT = (
    "llmalign sample MODEL --prompt 'a red fox' --per_prompt 4 --out pictures",
    "llmalign pairs pictures/images.jsonl --reward brightness --out pairs.parquet",
    "llmalign train trainers/diffusion_dpo/lora.yaml --model_name_or_path MODEL --dataset_name pairs.parquet",
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; smaller ones are for tests."""

    pairs: int = 256
    held_out_pairs: int = 64
    steps: int = 60
    batch: int = 32
    rate: float = 5e-4
    beta: float = 200.0
    rank: int = 8
    pictures: int = 200
    sampling_steps: int = 20
    guidance: float = 2.0
    batch_drawn: int = 100


@dataclass(frozen=True)
class Measured:
    """Reward and digit accuracy of drawn pictures, means with intervals."""

    reward: Estimate
    accuracy: Estimate


def main(
    output_dir: str | Path = "runs/quickstart-images", seed: int = 0, settings: Settings | None = None
) -> dict[str, Any]:
    """Run it and return its results; the LoRA file, results.json, grid.png and curves.png go into `output_dir`."""
    settings = settings or Settings()
    folder, began = Path(output_dir), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 100)
    folder.mkdir(parents=True, exist_ok=True)
    reward = load_image_reward("brightness")
    with quiet(), one_thread():
        console.print("[bold]1/4[/] A small Stable Diffusion of digits (built once, about a minute)")
        start = ensure_digits()
        console.print("[bold]2/4[/] Drawing pairs of pictures, the brighter one preferred")
        pipe = load_for_sampling(str(start))
        rows = labelled_pairs(pipe, settings.pairs + settings.held_out_pairs, reward, seed, settings)
        before = draw(pipe, settings.pictures, seed, settings)
        console.print("[bold]3/4[/] Diffusion-DPO with LoRA")
        parts = rows.select(range(settings.pairs)), rows.select(range(settings.pairs, len(rows)))
        history = align(start, parts, folder, seed, settings)
        console.print(
            "[bold]4/4[/] Drawing the same pictures with the aligned model, from the LoRA file in plain diffusers"
        )
        after = draw(load_for_sampling(str(folder), str(start)), settings.pictures, seed, settings)
        classifier = DigitClassifier()
        measured = {
            name: measure(images, reward, classifier) for name, images in (("before", before), ("after", after))
        }
    first = [rewards(reward, images)[:SHOWN] for images in (before, after)]
    draw_grid(
        [before[:SHOWN], after[:SHOWN]],
        prompts(SHOWN),
        folder / "grid.png",
        ["before", "after"],
        [[f"{value:.2f}" for value in row] for row in first],
    )
    plot_training({"Diffusion-DPO": history}, folder / "curves.png", title="Brighter digits", panels=PANELS)
    gain = bootstrap_mean(
        (np.array(rewards(reward, after)) - np.array(rewards(reward, before))).tolist(), prompts(len(after))
    )
    seconds = round(time.perf_counter() - began, 1)
    results = {
        "seed": seed,
        "settings": asdict(settings),
        "seconds": seconds,
        "measured": {name: asdict(entry) for name, entry in measured.items()},
        "gain": asdict(gain),
        "history": history,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _show(console, measured, gain, folder, seconds)
    return results


def prompts(count: int) -> list[str]:
    """The ten prompts in turn."""
    return [PROMPTS[place % len(PROMPTS)] for place in range(count)]


def draw(pipe: Any, count: int, seed: int, settings: Settings, *, progress: bool = True) -> list[Image.Image]:
    """Pictures of the ten digits in turn, the same noise for the same seed."""
    drawn = sample_images(
        pipe,
        prompts(count),
        seed=seed,
        steps=settings.sampling_steps,
        guidance=settings.guidance,
        batch_size=settings.batch_drawn,
        progress=progress,
    )
    return list(drawn)


def rewards(reward: ImageReward, images: Sequence[Image.Image]) -> list[float]:
    """Rewards of pictures of the ten digits in turn."""
    return reward(prompts(len(images)), list(images)).tolist()


def labelled_pairs(
    pipe: Any, count: int, reward: ImageReward, seed: int, settings: Settings, *, progress: bool = True
) -> Dataset:
    """Pairs of a pipeline's own pictures of the digits, two for each prompt."""
    sides = [draw(pipe, count, 2 * seed + 1_000 + side, settings, progress=progress) for side in range(2)]
    return pairs_of(prompts(count), sides, reward)


def pairs_of(captions: Sequence[str], sides: Sequence[Sequence[Image.Image]], reward: ImageReward) -> Dataset:
    """Rows in the columns of `llmalign.data.images`: of two pictures a caption the one with the higher reward chosen.

    Ties are left out.
    """
    scored = [reward(list(captions), list(images)).tolist() for images in sides]
    rows = []
    for place, caption in enumerate(captions):
        better = int(scored[1][place] > scored[0][place])
        if scored[0][place] != scored[1][place]:
            chosen, rejected = (png(sides[side][place]) for side in (better, 1 - better))
            rows.append({"row_id": place, "caption": caption, "chosen": chosen, "rejected": rejected, "label": 1.0})
    return Dataset.from_list(rows)


def align(
    start: Path, parts: tuple[Dataset, Dataset], folder: Path, seed: int, settings: Settings, **changes: Any
) -> list[dict[str, Any]]:
    """Train LoRA weights into `folder` on (training pairs, held-out pairs) and return the log history.

    `changes` are fields of the config.
    """
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "beta": settings.beta,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "constant",
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": 64,
        "caption_dropout": 0.1,
        "eval_timesteps": 4,
        "logging_steps": max(1, settings.steps // 20),
        "save_strategy": "no",
        "seed": seed,
        "image_cache_dir": str(folder / "encoded"),
        "encode_batch_size": 64,
        "winner_guard": "off",
        "disable_tqdm": False,
    }
    if len(parts[1]):
        chosen |= {"eval_strategy": "steps", "eval_steps": max(1, settings.steps // 4), "eval_on_start": True}
    trainer = DiffusionPreferenceTrainer(
        start,
        DiffusionPreferenceConfig(**chosen | changes),
        parts[0],
        parts[1] if len(parts[1]) else None,
        peft_config=lora_config(settings.rank, settings.rank, TARGETS),
    )
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(LossBar)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def measure(images: Sequence[Image.Image], reward: ImageReward, classifier: DigitClassifier) -> Measured:
    """Mean reward and digit accuracy of pictures of the ten digits in turn; intervals draw whole prompts."""
    asked = prompts(len(images))
    right = classifier.right(images, [PROMPTS.index(prompt) for prompt in asked])
    return Measured(bootstrap_mean(rewards(reward, images), asked), bootstrap_mean(right, asked))


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _show(console: Console, measured: dict[str, Measured], gain: Estimate, folder: Path, seconds: float) -> None:
    table = Table(
        title="Pictures from the same noise, 95 % intervals in brackets", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("")
    for name in measured:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("brightness, 0 to 1", *(entry.reward.text(digits=3) for entry in measured.values()))
    table.add_row("digit accuracy, %", *(entry.accuracy.text(scale=100, digits=1) for entry in measured.values()))
    console.print(table)
    console.print(f"Gain in brightness, paired: {gain.text(digits=3)}")
    console.print(f"Grid: {folder / 'grid.png'}   Curves: {folder / 'curves.png'}   Time: {seconds:.0f} s")
    console.print("\nThe same with a real model and your own reward:")
    for command in NEXT:
        console.print(f"  {command}", soft_wrap=True, highlight=False)
