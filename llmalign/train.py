"""From a recipe to a trained and measured model; what can be refused is refused before a model is loaded."""

import json
import logging
import os
import re
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.table import Table
from transformers.trainer_pt_utils import get_model_param_count

from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.evaluation.panels import IMAGE_PANELS, PANELS, SAMPLED_PANELS
from llmalign.evaluation.winrate import wilson
from llmalign.image_work import image_work
from llmalign.launched import check_world, watch_wrapper
from llmalign.prepare import Data, end_ids, prepare
from llmalign.processes import require_same, require_shared
from llmalign.recipe import Recipe, limit_keys
from llmalign.refusals import refusals
from llmalign.rewards.functions import guard, load_function
from llmalign.rewards.model import load_reward_model
from llmalign.sigterm import Preempted
from llmalign.trainers.loading import (
    check_model_options,
    choose_dtype,
    load_tokenizer,
    model_arguments,
    set_eos_token,
)
from llmalign.trainers.manifest import BrokenManifest, differences, read_manifest, to_disk, write_model_manifest
from llmalign.trainers.references import References
from llmalign.trainers.resuming import resolve_resume
from llmalign.trainers.run_folder import HARMLESS_KEYS, RUN_FILE, guard_output_dir, record_run
from llmalign.trainers.running_out import Resources, require_writable
from llmalign.work import Work, built

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:tiny"
METRICS_FILE = "metrics.json"
TRAIN_ROWS = "train_rows_sha256"
CURVES_FILE = "curves.png"
TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second")
SHOWN = (
    "loss", "accuracies", "accuracies_clean", "accuracies_length_matched", "longer_wins", "margins", "accuracy",
    "drift/chosen", "residual", "reward", "kl_to_reference", "entropy", "js", "kl_p_pi", "satisfied", "target_reward",
    "kl_to_sampler", "kept", "critic/explained_variance", "error/chosen", "error/rejected",
)  # fmt: skip
SHARES = ("accuracies", "accuracies_clean", "accuracies_length_matched", "longer_wins")


def run(
    recipe: Recipe, resume: str | None = None, rows: Dataset | None = None, *, starts_equal: bool = False
) -> dict[str, Any]:
    """Train as the recipe says and return what was measured, which `<output_dir>/metrics.json` holds too.

    `resume` is None, `auto` or the path of a checkpoint. Every evaluation set is measured before the first step and
    after the last. `rows` are token ids to train on instead of the recipe's data, as the method's collator takes them;
    nothing is measured then. `starts_equal` says that their log-probs are of the model that training starts from, so
    that a fresh run whose first batch scores otherwise is stopped. Raises UserError, with nothing written, for a
    recipe, a model or data that cannot be trained on.
    """
    config = recipe.training_config()
    any_split = recipe.method.kind != "prompts"  # which are sampled from by each process for itself
    with Resources(config, peft=bool(recipe.model.get("use_peft")), any_split=any_split) as resources:
        return _run(recipe, config, resources, resume, rows, starts_equal=starts_equal)


def _run(
    recipe: Recipe, config: Any, resources: Resources, resume: str | None, rows: Dataset | None, *, starts_equal: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    check_world(config)
    require_shared(Path(config.output_dir))
    refuse_endless(recipe, config)
    options = recipe.model_config()
    if not recipe.method.of_images:  # which know none of those options, and say so
        check_model_options(options)
    options = choose_dtype(options, chosen="dtype" in recipe.model, bf16=config.bf16)
    fingerprint = what_decides_the_result(recipe, config, options)
    harmless = HARMLESS_KEYS.union(limit_keys())
    any_split = resources.any_split
    guard_output_dir(config.output_dir, resume, fingerprint, harmless | {TRAIN_ROWS}, any_split=any_split)
    require_writable(config.output_dir)
    checkpoint = resolve_resume(resume, config.output_dir)
    if recipe.method.of_images:
        work = image_work(recipe, config, options)
    else:
        work = text_work(recipe, config, options, rows)
    data = work.data
    fingerprint[TRAIN_ROWS] = data.train_digest()
    require_same(fingerprint[TRAIN_ROWS], "training rows")
    guard_output_dir(config.output_dir, resume, fingerprint, harmless, any_split=any_split)
    finished = Path(config.output_dir) / METRICS_FILE
    if resume is not None and finished.is_file():
        _require_model(finished)
        logger.info("%s is there, so this run is finished already: nothing to do.", finished)
        return _measured_before(finished)
    if rows is None:
        _plan_evaluation(config, data, checkpoint)
    trainer = work.build()
    _say_what_runs(recipe, trainer)
    watch_wrapper(trainer)
    resources.expect(trainer)
    if starts_equal:
        trainer.start_may_differ = None
    record_run(config.output_dir, fingerprint)
    trained = _train(recipe, trainer, checkpoint)
    if data.evaluation is not None and not _measured_at_the_end(trainer):
        trainer.evaluate()
    trainer.save_model(config.output_dir)
    trainer.save_state()
    result = {
        "seconds": round(time.perf_counter() - started, 1),
        "train": trained.metrics,
        **_result(recipe, config, trainer, data),
    }
    if work.next is not None:
        result["next"] = work.next
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        _draw(recipe, trainer.state.log_history, data.evaluation, folder / CURVES_FILE)
        if rows is None:  # a stage of `iterate` writes its own
            write_model_manifest(folder, step=trainer.state.global_step, processes=config.world_size)
        _write_json(folder / METRICS_FILE, result)  # last: where it is, the run is finished
    return result


def _result(recipe: Recipe, config: Any, trainer: Any, data: Data) -> dict[str, Any]:
    history = trainer.state.log_history
    return {
        "method": recipe.method.name,
        "model": recipe.model["model_name_or_path"],
        "output_dir": str(config.output_dir),
        "processes": config.world_size,
        "steps": trainer.state.global_step,
        "before": _measurements(history, step=0),
        "after": _measurements(history, step=trainer.state.global_step),
        "references": _references(trainer),
        "data": {name: report.as_dict() for name, report in data.reports.items()},
    }


def _train(recipe: Recipe, trainer: Any, checkpoint: str | None) -> Any:
    """Train; a run that is refused at its first step leaves no trace that would refuse the corrected one."""

    def is_begun() -> bool:
        return trainer.state.global_step > 0

    try:
        with refusals(recipe.blame, "training could not begin", unless=is_begun):
            return trainer.train(resume_from_checkpoint=checkpoint)
    except (UserError, Preempted):
        if trainer.state.global_step == 0 and checkpoint is None and trainer.is_world_process_zero():
            (Path(trainer.args.output_dir) / RUN_FILE).unlink()
        raise


def refuse_endless(recipe: Recipe, config: Any) -> None:
    """Raise UserError for a stream without a number of steps, before anything is read: its end is not known."""
    if recipe.data.streaming and config.max_steps <= 0:
        raise UserError(
            "`streaming: true` reads rows whose number is not known, and the learning rate's schedule needs the number "
            "of steps: set `max_steps`, or `streaming: false`."
        )


def model_path(name: str) -> str:
    """Where the model lies: `embedded:tiny` is built on first use, all else is a folder or a Hub name."""
    return str(ensure_tiny()) if name == EMBEDDED else name


def what_decides_the_result(recipe: Recipe, config: Any, options: Any) -> dict[str, Any]:
    """The resolved recipe, flat, with defaults and what the hardware chose, to compare a resumed run with."""
    return {
        "method": recipe.method.name,
        **asdict(recipe.data),
        **{f"max_{name}": limit for name, limit in asdict(recipe.limits).items()},
        **asdict(options),
        **{entry.name: getattr(config, entry.name) for entry in fields(config)},
        "world_size": config.world_size,
    }


def summary(result: dict[str, Any]) -> Table:
    """A short table of what was measured before and after."""
    table = Table(title=f"{result['method']} on {result['model']}: {result['steps']} steps, {result['seconds']:.0f} s")
    for name in ("measured", "before", "after"):
        table.add_column(name, justify="left" if name == "measured" else "right")
    for key in result["after"]:
        if key.endswith(SHOWN) or "moment/" in key:
            table.add_row(key, *(_with_interval(result[when], key) for when in ("before", "after")))
    if not table.row_count:
        table.add_row("nothing: there is no evaluation set", "", "")
    table.caption = f"{result['output_dir']}: the model, {METRICS_FILE}, {CURVES_FILE}"
    return table


def _with_interval(measured: dict[str, Any], key: str) -> str:
    """A measurement; the share of pairs for which something holds comes with Wilson's 95 % interval."""
    if key not in measured:
        return ""
    value = measured[key]
    if value is None:
        return "none"
    prefix = re.split("rewards/|length/|logps/", key)[0]  # the evaluation set's name
    rows = measured.get(f"{prefix}rows")
    matched = measured.get(f"{prefix}length/matched") if key.endswith("length_matched") else 1.0
    if not key.endswith(SHARES) or rows is None or matched is None:
        return f"{value:.4g}"
    low, high = wilson(value, round(rows * matched))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _plan_evaluation(config: Any, data: Data, checkpoint: str | None) -> None:
    """Measure before the first step of a fresh run; without an evaluation set, say what is lost."""
    config.eval_on_start = data.evaluation is not None and checkpoint is None
    if data.evaluation is not None:
        return
    if config.load_best_model_at_end:
        raise UserError(
            "`load_best_model_at_end` needs an evaluation set: name one with `dataset_test_split`, `eval_datasets` or "
            "`holdout_rows`, or set it to false."
        )
    logger.warning(
        "No evaluation set, so nothing is measured before and after training: name one with `dataset_test_split`, "
        "`eval_datasets` or `holdout_rows`."
    )
    config.eval_strategy = type(config.eval_strategy)("no")


def text_work(recipe: Recipe, config: Any, options: Any, rows: Dataset | None = None) -> Work:
    """Rows of text, tokenized, and how their trainer is built; `rows` as in `run`."""
    with config.main_process_first(desc="looking for the model"):
        path = model_path(str(options.model_name_or_path))
    tokenizer = load_tokenizer(path, revision=options.model_revision, trust_remote_code=config.trust_remote_code)
    set_eos_token(tokenizer, recipe.config.get("eos_token"))
    if rows is None:
        data = prepare(recipe, tokenizer, config, end_ids(tokenizer, path, options.model_revision))
    else:
        data = Data(train=rows, evaluation=None, reports={})

    return Work(data, lambda: build(recipe, config, replace(options, model_name_or_path=path), tokenizer, data))


def build(recipe: Recipe, config: Any, options: Any, tokenizer: Any, data: Data) -> Any:
    """The trainer with its model loaded; what its parts refuse is said in their own words."""
    model, keywords, init = model_arguments(
        options, trust_remote_code=config.trust_remote_code, scorer=recipe.method.name in ("reward", "preference")
    )
    config.model_init_kwargs = {**(config.model_init_kwargs or {}), **init}
    if recipe.method.kind == "prompts":
        keywords["reward_funcs"] = reward_functions(recipe, config)
    return built(recipe, config, data, model=model, processing_class=tokenizer, **keywords)


def reward_functions(recipe: Recipe, config: Any) -> list[Any]:
    """What a recipe's `reward_funcs` and `reward_models` name, in this order. Raises UserError where they name none."""
    folder = Path(recipe.path).parent
    functions = [guard(load_function(name, folder=folder)) for name in config.reward_funcs or ()]
    options = {"trust_remote_code": config.trust_remote_code, "device": config.device}
    functions += [guard(load_reward_model(path, **options)) for path in config.reward_models or ()]
    if not functions:
        raise UserError(
            f"{recipe.path} names no reward: set reward_funcs (package.module:function, or file.py:function beside the "
            "recipe) or reward_models"
        )
    return functions


def _references(trainer: Any) -> dict[str, Any]:
    """Reference log-probs found in the cache and computed, by data set; empty where none was looked up."""
    reports = trainer.reference_reports if isinstance(trainer, References) else {}
    return {name: asdict(report) for name, report in reports.items()}


def _say_what_runs(recipe: Recipe, trainer: Any) -> None:
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    attention = ""  # that of image networks is torch's own
    if not recipe.method.of_images:
        attention = f", attention {model.config._attn_implementation.removeprefix('shared_prompt_')}"
    trainable = get_model_param_count(model, trainable_only=True)  # under ZeRO-3 of all shards
    logger.info(
        "%s: %s; %d process%s, batch %d a step; weights in %s%s, %s parameters trained.",
        recipe.method.name,
        args.choices,
        args.world_size,
        "" if args.world_size == 1 else "es",
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        str(model.dtype).removeprefix("torch."),
        attention,
        f"{trainable:,}",
    )


def _draw(recipe: Recipe, history: list[dict[str, Any]], evaluation: Any, path: Path) -> None:
    """One picture; each named evaluation set is a line of its own."""
    from llmalign.evaluation.plots import plot_training  # matplotlib is slow to import

    title = recipe.method.name
    names = list(evaluation) if isinstance(evaluation, dict) else [title]
    runs = {
        name: [{key.replace(f"eval_{name}_", "eval_"): value for key, value in entry.items()} for entry in history]
        for name in names
    }
    logged = {
        key.removeprefix("eval_")
        for run in runs.values()
        for entry in run
        for key, value in entry.items()
        if value is not None
    }
    panels = IMAGE_PANELS if recipe.method.of_images else (*PANELS, *SAMPLED_PANELS)
    chosen = [panel for panel in panels if panel.metric in logged]
    if chosen:
        plot_training(runs, path, title=title, panels=chosen)


def _require_model(finished: Path) -> None:
    """Raise UserError where a finished run's model is not what was written, judged by its manifest and by sizes."""
    try:
        manifest = read_manifest(finished.parent)
        wrong = [] if manifest is None else differences(finished.parent, manifest.files, quick=True)
    except BrokenManifest as error:
        wrong = [str(error)]
    if wrong:
        raise UserError(
            f"{finished} says that this run is finished, but in {finished.parent} {wrong[0]}: remove {finished.name}, "
            "and --resume auto goes on from the last checkpoint and saves the model again"
        )


def _measured_before(finished: Path) -> dict[str, Any]:
    """What a finished run has measured."""
    try:
        result: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{finished} is cut off or damaged: remove it, and the run is measured again") from error
    return result


def _measured_at_the_end(trainer: Any) -> bool:
    """Whether the last step was evaluated, and the model is still that step's and not an earlier, better one."""
    last = _measurements(trainer.state.log_history, step=trainer.state.global_step)
    return bool(last) and not trainer.args.load_best_model_at_end


def _measurements(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Evaluation metrics of one step, the latest of each, without timings; `eval_` is taken off."""
    return {
        key.removeprefix("eval_"): value
        for entry in history
        for key, value in entry.items()
        if entry["step"] == step and key.startswith("eval_") and not key.endswith(TIMINGS)
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    to_disk(aside)
    os.replace(aside, path)
    to_disk(path.parent)
