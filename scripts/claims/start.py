"""Short training runs of the claims, and the SFT model that every claim on a language model starts from."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import PrinterCallback, Trainer

from claims.cells import Cell, Store, code_version, package_files
from llmalign import SFTConfig, SFTTrainer
from llmalign.embedded.model import build_model, build_tokenizer
from llmalign.embedded.rows import sft_rows

START = Cell("start", "sft", 0, {"steps": 800, "batch": 32, "lr": 5e-3, "beta2": 0.98, "warmup": 30})
WORLD_FILES = tuple(
    path
    for path in package_files("llmalign.embedded")
    if path.stem in ("answers", "grammar", "model", "rows", "truth", "words")
)
SMOKE = Cell("start", "sft", 0, {**START.setting, "steps": 2, "batch": 4})


def quiet() -> None:
    """Keep one progress bar, the claim's: those of the libraries, and their notes below warnings, are switched off."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("llmalign").setLevel(logging.ERROR)


def arguments(
    folder: str, *, steps: int, batch: int, lr: float, seed: int, warmup: int = 10, **more: Any
) -> dict[str, Any]:
    """Arguments of a run in which nothing is saved or logged: `steps` steps of `batch` rows, float32 on the CPU."""
    common = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": lr,
        "warmup_steps": warmup,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return common | more


def train(trainer: Trainer) -> None:
    """Train without the summary that transformers prints when its own progress bar is off."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _train_start(folder: Path, cell: Cell) -> None:
    s = cell.setting
    tokenizer = build_tokenizer()
    rows = Dataset.from_list(sft_rows(s["steps"] * s["batch"], cell.seed))
    with TemporaryDirectory() as scratch:
        shared = arguments(scratch, steps=s["steps"], batch=s["batch"], lr=s["lr"], seed=cell.seed, warmup=s["warmup"])
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
        config = SFTConfig(**(shared | schedule | {"adam_beta2": s["beta2"]}))
        model = build_model(tokenizer, seed=cell.seed)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        train(trainer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start(store: Store, cell: Cell) -> Path:
    """The folder of the SFT model that `cell` (START or SMOKE) describes, trained where none is kept."""
    code = code_version((Path(__file__), *WORLD_FILES))
    return store.model(cell, code, lambda folder: _train_start(folder, cell))
