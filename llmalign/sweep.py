"""A grid of recipes over one reference cache: each run in a folder of its own, and a table that compares them."""

import gc
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from llmalign.errors import UserError
from llmalign.evaluation.winrate import wilson
from llmalign.recipe import Recipe, limit_keys, load_recipe
from llmalign.train import METRICS_FILE, TRAIN_ROWS, refuse_endless, run, what_decides_the_result
from llmalign.trainers.configs import ScoreConfig
from llmalign.trainers.loading import check_model_options, choose_dtype
from llmalign.trainers.references import cache_root
from llmalign.trainers.run_folder import HARMLESS_KEYS, guard_output_dir

logger = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"
FINISHED, FAILED, WAITING = "finished", "failed", "waiting"


@dataclass
class Entry:
    """One run of a grid: its values, the recipe that they make, and what came of it (`metrics` once it is finished)."""

    values: dict[str, Any]
    recipe: Recipe
    status: str = WAITING
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """The name of the run's folder, such as `beta=0.05,eta=0.1`."""
        return ",".join(re.sub(r"[^\w.+=-]+", "_", f"{key}={value}") for key, value in self.values.items())

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.recipe.config["output_dir"])

    def measured(self) -> dict[str, float]:
        """Accuracy (with `low` and `high`, where rows are counted), margin, drift and loss of the first evaluation
        set after training, those of them that the method has."""
        after = self.metrics.get("after", {})
        leading = (
            key.removesuffix(end) for end in ("rewards/accuracies", "loss") for key in after if key.endswith(end)
        )
        prefix = next(leading, "")
        keys = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "drift": "drift/chosen", "loss": "loss"}
        found = {name: after[prefix + key] for name, key in keys.items() if prefix + key in after}
        if "accuracy" in found and f"{prefix}rows" in after:
            found["low"], found["high"] = wilson(found["accuracy"], round(after[f"{prefix}rows"]))
        return found

    def as_dict(self) -> dict[str, Any]:
        """For `sweep.json`."""
        return {
            "name": self.name,
            "values": self.values,
            "output_dir": str(self.folder),
            "status": self.status,
            **({"error": self.error} if self.error else {}),
            **self.measured(),
            **{key: self.metrics[key] for key in ("seconds", "references") if key in self.metrics},
        }


def sweep(path: str, grid: Sequence[str], overrides: Sequence[str] = ()) -> list[Entry]:
    """Train once for each combination of values (`beta=.05,.1`), each in `<output_dir>/<values>`; what came of each.

    All recipes are checked before the first run starts; one that is refused stops everything, with nothing written.
    Finished runs are not run again and broken off ones go on, so a sweep that was killed is started again as it was. A
    run that fails is reported and the others still run (of several processes, all stop). Raises UserError for a recipe
    or a grid that is not understood.
    """
    entries = plan(path, grid, overrides)
    home = entries[0].folder.parent
    _say_references(entries)
    for entry in entries:
        if entry.status == FINISHED:
            logger.info("%s is finished already: nothing to do.", entry.name)
    for position, entry in enumerate(entries, start=1):
        if entry.status == FINISHED:
            continue
        logger.info("Run %d of %d: %s.", position, len(entries), entry.name)
        _run(entry)
        _write(home, path, entries)
        gc.collect()  # models of the run before, before the next are loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    _write(home, path, entries)
    return entries


def _say_references(entries: Sequence[Entry]) -> None:
    """Where the runs take their references from; each says for itself how many it found."""
    configs = [entry.recipe.config for entry in entries if entry.recipe.config.get("precompute_ref_log_probs")]
    folders = sorted({str(cache_root(config.get("reference_cache_dir"))) for config in configs})
    if folders:
        logger.info(
            "References: looked up in %s; what is not there is scored by the first run that needs it.",
            " and ".join(folders),
        )


def plan(path: str, grid: Sequence[str], overrides: Sequence[str] = ()) -> list[Entry]:
    """The runs of a grid, every recipe checked; writes nothing. See `sweep`."""
    axes = parse_grid(grid)
    entries = []
    for texts in product(*axes.values()):
        chosen = [f"--{key}={text}" for key, text in zip(axes, texts, strict=True)]
        recipe = load_recipe(path, [*overrides, *chosen])
        if _can_look_up(recipe):
            recipe.config["precompute_ref_log_probs"] = True
        entry = Entry({key: _value(recipe, key) for key in axes}, recipe)
        recipe.config["output_dir"] = str(Path(recipe.config["output_dir"]) / entry.name)
        entries.append(entry)
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"The grid holds {twice[0]} twice; write each value once.")
    for entry in entries:
        _check(entry)
    return entries


def parse_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """`key=v1,v2` as texts by key; commas inside brackets do not part values. Raises UserError for anything else."""
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.replace("-", "_")
        values = [value.strip() for value in _split(text)]
        if not (key.isidentifier() and equals and all(values)):
            raise UserError(
                f"{word!r} is not understood: write what is swept right after the recipe, as key=value1,value2."
            )
        if key in axes:
            raise UserError(f"The grid names `{key}` twice; write all of its values at once.")
        if key == "output_dir":
            raise UserError("`output_dir` cannot be swept: each run gets a folder of its own under it.")
        axes[key] = values
    return axes


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _can_look_up(recipe: Recipe) -> bool:
    """Whether the method reads the cache, its rows can be scored ahead, and the recipe leaves open if it does."""
    scored = issubclass(recipe.method.config, ScoreConfig)
    return scored and not recipe.data.streaming and "precompute_ref_log_probs" not in recipe.config


def _value(recipe: Recipe, key: str) -> Any:
    if key == "method":
        return recipe.method.name
    limits = {f"max_{name}": limit for name, limit in asdict(recipe.limits).items()}
    return {**asdict(recipe.data), **limits, **recipe.model, **recipe.config}[key]


def _check(entry: Entry) -> None:
    """Refuse a recipe that cannot run, or whose folder holds another one's run; note one that has finished."""
    recipe = entry.recipe
    recipe.data.train_sources(), recipe.data.eval_sources()
    config, options = recipe.training_config(), recipe.model_config()
    refuse_endless(recipe, config)
    check_model_options(options)
    options = choose_dtype(options, chosen="dtype" in recipe.model, bf16=config.bf16)
    fingerprint = what_decides_the_result(recipe, config, options)
    guard_output_dir(entry.folder, "auto", fingerprint, {*HARMLESS_KEYS, *limit_keys(), TRAIN_ROWS})
    finished = entry.folder / METRICS_FILE
    if finished.is_file():
        entry.metrics = json.loads(finished.read_text(encoding="utf-8"))
        entry.status = FINISHED


def _run(entry: Entry) -> None:
    try:
        entry.metrics = run(entry.recipe, resume="auto")
        entry.status = FINISHED
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise  # the other processes wait inside this run, which they cannot leave
        logger.error("%s failed: %s", entry.name, error, exc_info=not isinstance(error, UserError))
        entry.status = FAILED
        entry.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def best(entries: Sequence[Entry]) -> Entry | None:
    """The finished run with the highest accuracy, else with the lowest loss; None where nothing was measured."""
    measured = [(entry, entry.measured()) for entry in entries if entry.status == FINISHED]
    for key, sign in (("accuracy", 1), ("loss", -1)):
        known = [(sign * found[key], entry) for entry, found in measured if key in found]
        if known:
            return max(known, key=lambda pair: pair[0])[1]
    return None


def table(entries: Sequence[Entry]) -> Table:
    """The runs side by side, and the best of them with those that its interval cannot be told from."""
    shown = Table(title=f"{len(entries)} runs in {entries[0].folder.parent}")
    for name in entries[0].values:
        shown.add_column(name)
    for name in ("accuracy", "margin", "drift", "loss", "seconds", "references computed", "result"):
        shown.add_column(name, justify="left" if name == "result" else "right")
    for entry in entries:
        found = entry.measured()
        accuracy = f"{found['accuracy']:.3f}" if "accuracy" in found else ""
        if "low" in found:
            accuracy += f" [{found['low']:.3f}, {found['high']:.3f}]"
        numbers = [f"{found[key]:.4g}" if key in found else "" for key in ("margin", "drift", "loss")]
        seconds = f"{entry.metrics['seconds']:.0f}" if "seconds" in entry.metrics else ""
        references = entry.metrics.get("references", {}).values()
        computed = str(sum(report["computed"] for report in references)) if references else ""
        result = f"{entry.status}: {entry.error}" if entry.error else entry.status
        shown.add_row(*map(str, entry.values.values()), accuracy, *numbers, seconds, computed, result)
    shown.caption = _verdict(entries)
    return shown


def _verdict(entries: Sequence[Entry]) -> str:
    winner = best(entries)
    if winner is None:
        return "No run was measured on an evaluation set, so none is the best."
    found = winner.measured()
    if "accuracy" not in found:
        return f"Best by loss: {winner.name} ({found['loss']:.4g})."
    rivals = [
        entry.name
        for entry in entries
        if entry is not winner and entry.measured().get("high", 0.0) >= found.get("low", 1.0)
    ]
    alike = f"; within its interval: {', '.join(rivals)}" if rivals else ""
    return f"Best by accuracy: {winner.name} ({found['accuracy']:.3f}{alike})."


def _write(home: Path, path: str, entries: Sequence[Entry]) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    winner = best(entries)
    content = {
        "recipe": path,
        "best": None if winner is None else winner.name,
        "runs": [entry.as_dict() for entry in entries],
    }
    home.mkdir(parents=True, exist_ok=True)
    aside = home / f"{SWEEP_FILE}.tmp"
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(aside, home / SWEEP_FILE)
