"""Rows of tiny pictures, and trainers of tiny pipelines on them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from peft import LoraConfig
from PIL import Image

from llmalign.diffusion.configs import DiffusionPreferenceConfig
from llmalign.diffusion.pipelines import family_of
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer

CAPTIONS = ("digit one", "a red picture", "digit seven", "")
FEATURES = Features(
    {
        "row_id": Value("int64"),
        "caption": Value("string"),
        "chosen": Value("binary"),
        "rejected": Value("binary"),
        "label": Value("float32"),
    }
)


def png(seed: int, low: int = 0, high: int = 255, size: tuple[int, int] = (8, 8)) -> bytes:
    values = np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(count: int = 8, *, seed: int = 0, labels: Sequence[float] = (1.0,), captions: Any = CAPTIONS) -> Dataset:
    """Bright pictures are preferred to dark ones; labels and captions take turns."""
    rows = [
        {
            "row_id": 10 * seed + index,
            "caption": captions[index % len(captions)],
            "chosen": png(1000 * seed + index, 100, 255),
            "rejected": png(1000 * seed + 500 + index, 0, 100),
            "label": labels[index % len(labels)],
        }
        for index in range(count)
    ]
    return Dataset.from_list(rows, features=FEATURES)


def lora(pipe: Any, rank: int = 2, alpha: int = 6) -> LoraConfig:
    """A scale of three, so that a file that forgets alpha shows."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(family_of(pipe).lora_targets), init_lora_weights="gaussian"
    )


def config(folder: Path, **changes: Any) -> DiffusionPreferenceConfig:
    """Two steps of four pairs, quiet; the cache lies beside the output."""
    given = {
        "output_dir": str(folder / "out"),
        "image_cache_dir": str(folder / "cache"),
        "resolution": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    return DiffusionPreferenceConfig(**given)


def trainer(
    pipe: Any,
    folder: Path,
    *,
    rows: Any = None,
    evaluation: Any = None,
    peft: Any = True,
    ref: Any = None,
    **changes: Any,
) -> DiffusionPreferenceTrainer:
    """A trainer of a pipeline with LoRA (`peft`: a config, or False for the whole network), the same every time."""
    torch.manual_seed(0)  # the adapter's first factor is drawn
    return DiffusionPreferenceTrainer(
        pipe,
        config(folder, **changes),
        pairs() if rows is None else rows,
        evaluation,
        peft_config=lora(pipe) if peft is True else peft or None,
        **({} if ref is None else {"ref_model": ref}),
    )
