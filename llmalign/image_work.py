"""Runs on images: rows read and looked over, and the trainer of a diffusers pipeline built from a recipe's keys."""

import logging
import random
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmalign.data.doctor import refuse
from llmalign.data.image_doctor import ImageLimits, ImageReport, examine_images
from llmalign.data.images import PAIRS, load_image_rows, without_ties
from llmalign.errors import UserError
from llmalign.prepare import HELD_OUT, Data, hold_out
from llmalign.recipe import Recipe
from llmalign.rewards.images import load_image_reward
from llmalign.trainers.loading import ModelConfig
from llmalign.trainers.validation import refuse_inherited
from llmalign.work import Work, built

logger = logging.getLogger(__name__)

CAPTIONS = "captions"
SHOWN_ROWS, SHOWN_CAPTIONS = 100, 2  # among so many rows so many captions are sought that the user may try
LOOKED_AT = 2000  # rows of a set that the doctor decodes before training; encoding decodes them all
USED = frozenset(
    """
    model_name_or_path model_revision dtype use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_task_type
    """.split()
)


def image_work(recipe: Recipe, config: Any, options: ModelConfig) -> Work:
    """Rows of images and how their trainer is built. Raises UserError for what does not apply to images."""
    if recipe.data.streaming:
        raise UserError("`streaming: true` is for text: images are encoded once, before training; leave it out.")
    belongs = {entry.name: "it is for language models" for entry in fields(options) if entry.name not in USED}
    refuse_inherited(options, belongs)
    from llmalign.diffusion.embedded import pipeline_path  # text users have no need of diffusers
    from llmalign.diffusion.image_trainer import lora_config
    from llmalign.diffusion.pipelines import require_pipeline
    from llmalign.diffusion.sharding import loading_whole

    with config.main_process_first(desc="looking for the model"):
        path = pipeline_path(str(options.model_name_or_path))
    require_pipeline(path)
    functions = []
    if recipe.method.kind == CAPTIONS:
        folder = Path(recipe.path).parent
        with loading_whole():
            functions = [load_image_reward(name, folder=folder, device=config.device) for name in config.reward_funcs]
    data = _prepared(recipe, config)
    after = _sample_command(recipe, config, options, data)

    def build() -> Any:
        lora = None
        if options.use_peft:
            lora = lora_config(options.lora_r, options.lora_alpha, options.lora_target_modules, options.lora_dropout)
        given = {"model": path, "peft_config": lora, "revision": options.model_revision, "dtype": options.dtype}
        if functions:
            given["reward_functions"] = functions
        return built(recipe, config, data, **given)

    return Work(data, build, after)


def _sample_command(recipe: Recipe, config: Any, options: ModelConfig, data: Data) -> str:
    """What shows the model beside its start, on captions of the data."""
    held_out = data.evaluation
    rows = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out or data.train
    words = ["llmalign", "sample", config.output_dir]
    if not options.use_peft:  # an adapter's run knows what it was put on
        words += ["--base", str(options.model_name_or_path)]
    captions = list(dict.fromkeys(caption for caption in rows["caption"][:SHOWN_ROWS] if caption))
    for caption in captions[:SHOWN_CAPTIONS]:
        words += ["--prompt", caption]
    for name in config.reward_funcs if recipe.method.kind == CAPTIONS else ():
        beside = Path(recipe.path).parent / name.rpartition(":")[0]  # where training looked for a function's file
        words += ["--reward", str(beside.with_name(name)) if beside.is_file() else name]
    if recipe.method.kind == CAPTIONS:
        words += ["--steps", str(config.sampling_steps), "--guidance", f"{config.guidance_scale:g}"]
    elif recipe.method.name == "pso_offline":  # a distilled model is drawn from as it was distilled
        words += ["--steps", str(config.sampling_steps), "--guidance", "1"]
    if config.resolution is not None:
        words += ["--size", str(config.resolution)]
    return shlex.join([*words, "--per_prompt", "4", "--out", f"{config.output_dir}-samples"])


def _prepared(recipe: Recipe, config: Any) -> Data:
    kind = recipe.method.kind
    sources = {"train": recipe.data.train_sources(), **recipe.data.eval_sources()}
    reports: dict[str, ImageReport] = {}
    ready: dict[str, Dataset] = {}
    for name, found in sources.items():
        with config.main_process_first(desc=f"reading the {name} data"):
            rows = load_image_rows(found, kind=kind, ties="soft" if kind == PAIRS else "drop", seed=config.seed)
        if kind != CAPTIONS:
            reports[name] = _looked_over(recipe, config, name, rows)
        if kind == PAIRS and config.ties == "drop":  # counted above, left out now
            rows = without_ties(f"the {name} data", rows)
        logger.info("%s: %d rows go to the trainer.", name, len(rows))
        ready[name] = rows
    train = ready.pop("train")
    if not ready and recipe.data.holdout_rows:
        train, ready[HELD_OUT] = hold_out(train, recipe.data.holdout_rows, config.seed)
    alone = recipe.data.eval_datasets is None and len(ready) == 1
    return Data(train=train, evaluation=next(iter(ready.values())) if alone else ready or None, reports=reports)


def _looked_over(recipe: Recipe, config: Any, name: str, rows: Dataset) -> ImageReport:
    some = rows
    if len(rows) > LOOKED_AT:
        some = rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), LOOKED_AT)))
        logger.info("The doctor looks at %d of the %d rows of %s, drawn at random.", LOOKED_AT, len(rows), name)
    assert isinstance(recipe.limits, ImageLimits)  # a method of images
    report = examine_images(some, kind=recipe.method.kind, resolution=config.resolution, limits=recipe.limits)
    try:
        refuse(report)
    except UserError as error:
        raise UserError(f"The {name} data: {error}") from error
    return report
