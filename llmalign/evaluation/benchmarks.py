"""Benchmarks of the lm-evaluation-harness, where it is installed."""

import difflib
import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
_FIRST_FILTER = "none"  # the harness's name for answers taken as they are
_NEAREST = 3


def require_benchmarks() -> None:
    """Raise UserError where the harness is not installed, with the line that installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks are run by lm-eval, which is not installed: pip install 'llmalign[benchmarks]'")


def run_benchmarks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    include_path: Path | str | None = None,
    seed: int = 0,
) -> Scores:
    """Run tasks of lm-eval on a loaded model, an adapter beside its base included: {task: {metric: value}}.

    A metric is named as the harness names it, with its filter after a comma where that is another than none; its
    standard error has `_stderr` at the end and is left out where there is none. A group of tasks has entries for
    itself, where it has a mean of its own, and for each of its tasks. `limit` takes the first rows of each task,
    `num_fewshot` None is what the task says, `include_path` is a folder of further tasks, `chat_template` puts
    questions through the tokenizer's template. Raises UserError where lm-eval is missing, for an unknown task, and
    where a task's data cannot be fetched or used. Not covered: tasks that run the model's code, several processes.
    """
    require_benchmarks()
    if limit is not None and limit < 1:
        raise UserError(f"a limit of benchmark rows is at least 1, not {limit}")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"there is no folder of benchmark tasks {str(include_path)!r}")
    if chat_template and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template to put benchmarks' questions through")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,import-untyped,unused-ignore]

    manager = TaskManager(include_path=None if include_path is None else str(Path(include_path).expanduser()))
    _require_tasks(tasks, manager)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    wrapped = HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager,
            apply_chat_template=chat_template, log_samples=False, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:  # a Hub that cannot be reached raises an OSError, too
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise UserError(f"the benchmarks {', '.join(tasks)} cannot be run ({reason})") from error
    return {**_scores(found.get("groups", {})), **_scores(found["results"])}


def _require_tasks(tasks: Sequence[str], manager: Any) -> None:
    if not tasks:
        raise UserError("no benchmark is named")
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=_NEAREST)
            hint = f"the nearest are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise UserError(f"lm-eval has no task {task!r}; {hint}")


def _scores(results: dict[str, dict[str, Any]]) -> Scores:
    """Numbers by the names of their metrics; what the harness adds (names, counts) is left out."""
    found: Scores = {}
    for task, values in results.items():
        own = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                own[metric if kind == _FIRST_FILTER else key] = float(value)
        if own:
            found[task] = own
    return found
