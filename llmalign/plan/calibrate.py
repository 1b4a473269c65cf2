"""Seconds of a few real steps on this machine, through the real trainer, in a folder that is thrown away."""

import logging
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from llmalign.errors import UserError
from llmalign.image_work import image_work
from llmalign.plan.rows import Lengths
from llmalign.prepare import Data, end_ids, prepare
from llmalign.recipe import Recipe
from llmalign.refusals import refusals
from llmalign.train import build, model_path
from llmalign.trainers.loading import choose_dtype, load_tokenizer, set_eos_token
from llmalign.trainers.sampled_configs import SampledConfig

logger = logging.getLogger(__name__)

SMALL = 200_000_000  # parameters of a model that is calibrated without being asked
#: what a few steps are run with; a key that a method does not have is left out
_QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "report_to": ["none"], "load_best_model_at_end": False,
    "logging_steps": 1000, "warmup_steps": 0, "alarm_prompts": 0, "num_train_epochs": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Seconds of a typical micro-batch, of the longest one (None: not run), and of the optimizer's step."""

    typical: float
    longest: float | None
    optimizer: float

    def step(self, accumulation: int) -> float:
        """Seconds of an optimizer step of so many typical micro-batches."""
        return accumulation * self.typical + self.optimizer


class _Clock(TrainerCallback):
    """Times of steps, and of the optimizer in them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first micro-batch is there."""
        self._begun = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last backward pass is over."""
        self._stepping = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are new."""
        self.optimizer.append(time.perf_counter() - self._stepping)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        self.steps.append(time.perf_counter() - self._begun)


def calibrated(recipe: Recipe, lengths: Lengths | None) -> Steps:
    """Run a few steps of a recipe: two typical batches, the first to warm up, and the longest; or one whole rollout.

    `lengths` are those of the training rows, None for images. Nothing is written but in a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="llmalign-plan-") as folder:
        kept = {"output_dir": folder, "max_steps": 3, **_QUIET}
        sampled = recipe.method.kind in ("prompts", "captions")
        if not sampled:
            kept |= {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential"}
        names = {entry.name for entry in fields(recipe.method.config)}
        kept["reference_cache_dir"] = str(Path(folder) / "references")
        kept = {name: value for name, value in kept.items() if name in names}
        quiet = replace(recipe, config={**recipe.config, **kept})
        clock = _Clock()
        trainer = _image_trainer(quiet) if recipe.method.of_images else _text_trainer(quiet, lengths, sampled)
        trainer.add_callback(clock)
        if sampled:
            trainer.args.max_steps = _steps_of_a_rollout(trainer)
        logger.info("Calibrating: %d steps on this machine, in a temporary folder.", trainer.args.max_steps)
        with refusals(recipe.blame, "the steps of the calibration could not be run"):
            trainer.train()
        optimizer = float(np.mean(clock.optimizer[1:] or clock.optimizer))
        if sampled:  # a step of a rollout's, sampling included
            whole = float(np.mean(clock.steps)) - optimizer
            return Steps(max(whole, 0.0) / quiet.training_config().gradient_accumulation_steps, None, optimizer)
        passes = [max(step - own, 0.0) for step, own in zip(clock.steps, clock.optimizer, strict=True)]
        return Steps(passes[min(1, len(passes) - 1)], passes[2] if len(passes) > 2 else None, optimizer)


def _steps_of_a_rollout(trainer: Any) -> int:
    """Optimizer steps that one rollout, or one round of pictures, serves: sampling is shared among them."""
    args = trainer.args
    if isinstance(args, SampledConfig):
        return max(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps, 1)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(trainer.train_dataset.per_round // step, 1)


def _text_trainer(recipe: Recipe, lengths: Lengths | None, sampled: bool) -> Any:
    config = recipe.training_config()
    options = choose_dtype(recipe.model_config(), chosen="dtype" in recipe.model, bf16=config.bf16)
    path = model_path(str(options.model_name_or_path))
    tokenizer = load_tokenizer(path, revision=options.model_revision, trust_remote_code=config.trust_remote_code)
    set_eos_token(tokenizer, recipe.config.get("eos_token"))
    rows = prepare(recipe, tokenizer, config, end_ids(tokenizer, path, options.model_revision)).train
    assert isinstance(rows, Dataset)
    if not sampled and lengths is not None:
        rows = rows.select(_typical_then_longest(lengths, config.per_device_train_batch_size))
    data = Data(train=rows, evaluation=None, reports={})
    return build(recipe, config, replace(options, model_name_or_path=path), tokenizer, data)


def _typical_then_longest(lengths: Lengths, size: int) -> list[int]:
    """Rows of two typical batches and of the longest one, in this order."""
    widest = lengths.widest()
    order = np.argsort(widest, kind="stable")
    size = min(size, max(len(order) // 3, 1))
    places = np.random.default_rng(0).permutation(len(order))
    return [*places[: 2 * size].tolist(), *order[::-1][:size].tolist()]


def _image_trainer(recipe: Recipe) -> Any:
    if not isinstance(recipe.data.dataset_name, str):
        raise UserError("only a recipe with one data set can be calibrated on images: leave --calibrate out")
    config = recipe.training_config()
    rows = None if recipe.method.kind == "captions" else 3 * config.per_device_train_batch_size
    quiet = replace(recipe, data=replace(recipe.data, max_rows=rows, dataset_test_split=None, eval_datasets=None,
                                         holdout_rows=0))  # fmt: skip
    return image_work(quiet, config, recipe.model_config()).build()
