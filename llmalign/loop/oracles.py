"""From a recipe's keys to its oracle, and what stands for that oracle in a kept comparison."""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmalign.errors import UserError
from llmalign.judges import JudgeClient, PairwiseJudge
from llmalign.judges.template import DEFAULT_TEMPLATE
from llmalign.loop.run import Run, identity
from llmalign.rewards.classifiers import require_folder
from llmalign.rewards.functions import Guarded, guard, load_function, source_digest
from llmalign.rewards.model import load_reward_model
from llmalign.rewards.pair_model import load_preference_model
from llmalign.rewards.preference import FunctionOracle, JudgeOracle, ModelOracle, Oracle, RewardOracle

logger = logging.getLogger(__name__)

TRIED = ("Yes, of course.", "No.")
ANSWERS_FILE = "judge-answers.sqlite"


def oracle_identity(run: Run) -> str:
    """A hash of what the oracle answers by: the file that a function is in, a model's weights, or judge and question.

    Not covered: what such a file imports.
    """
    loop = run.loop
    parts: list[str] = [str(loop.oracle), str(loop.both_orders)]
    for name in [loop.preference_function, *(loop.reward_funcs or ())]:
        parts += [name, source_digest(_function(run, name))] if name else []
    for path in [loop.preference_model, *(loop.reward_models or ())]:
        parts += [identity(path)] if path else []
    if loop.oracle == "judge":
        parts += [str(loop.judge_model), loop.judge_answers, template(run)]
        parts += [*loop.judge_letters, str(loop.judge_top_logprobs)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_oracle(run: Run) -> Oracle | RewardOracle:
    """The recipe's oracle, its models loaded. Raises UserError where something that it names is not there."""
    loop, options = run.loop, {"trust_remote_code": run.config.trust_remote_code, "device": run.config.device}
    if loop.oracle == "preference_function":
        return _function_oracle(run)
    if loop.oracle == "preference_model":
        return ModelOracle(load_preference_model(str(loop.preference_model), **options))
    if loop.oracle == "reward":
        models = [load_reward_model(path, **options) for path in loop.reward_models or ()]
        return RewardOracle([*_reward_functions(run), *models])
    return JudgeOracle(_judge(run, run.folder))


def check_oracle(run: Run) -> None:
    """Raise UserError where a model's folder, a judge's package or its key is missing, before anything is written."""
    for path in [run.loop.preference_model, *(run.loop.reward_models or ())]:
        if path is not None:
            require_folder(path, "check the path")
    if run.loop.oracle == "judge":
        with TemporaryDirectory() as scratch, _judge(run, Path(scratch)).client as client:
            client.check()


def try_oracle(run: Run) -> None:
    """Ask functions once, before hours of sampling: raises UserError where one gives something else than it must.

    A preference function that likes a place, whatever stands there, is said.
    """
    row = run.prompts[0]
    columns = {name: [row[name]] for name in run.loop.oracle_columns or ()}
    if run.loop.oracle == "preference_function":
        oracle = _function_oracle(run)
        orders = [oracle.preferences([row["prompt"]], [one], [two], **columns)[0] for one, two in (TRIED, TRIED[::-1])]
        if abs(sum(orders) - 1) > 1e-6:
            logger.warning(
                "%s gives P = %.3g and, the other way round, %.3g, which do not add up to 1: where an answer stands "
                "matters to it; set both_orders: true.",
                oracle.name, *orders,
            )  # fmt: skip
    elif run.loop.reward_funcs:
        functions, ids = RewardOracle(_reward_functions(run)), [run.tokenizer(TRIED[0])["input_ids"]]
        if math.isnan(functions.rewards([row["prompt"]], [TRIED[0]], completion_ids=ids, **columns)[0]):
            logger.warning("The reward of %r is none; see the warning above, if there is one.", TRIED[0])


def template(run: Run) -> str:
    """The judge's question. Raises UserError where the recipe names a file that is not there."""
    if run.loop.judge_template is None:
        return DEFAULT_TEMPLATE
    paths = [Path(run.recipe.path).parent / run.loop.judge_template, Path(run.loop.judge_template)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UserError(f"there is no judge_template {run.loop.judge_template}, beside the recipe or here")
    return found.read_text(encoding="utf-8")


def _judge(run: Run, folder: Path) -> PairwiseJudge:
    loop = run.loop
    client = JudgeClient(
        str(loop.judge_model),
        str(loop.judge_url),
        cache=Path(loop.judge_cache).expanduser() if loop.judge_cache else folder / ANSWERS_FILE,
        api_key_env=loop.judge_api_key_env,
        concurrency=loop.judge_concurrency,
        timeout=loop.judge_timeout,
        patience=loop.judge_patience,
        max_requests=loop.judge_max_requests,
        max_tokens=loop.judge_max_tokens,
        budget=str(run.folder.resolve()),
    )
    return PairwiseJudge(
        client,
        answers=loop.judge_answers,  # type: ignore[arg-type]  # one of config.ANSWERS
        both_orders=loop.both_orders,
        template=template(run),
        letters=(loop.judge_letters[0], loop.judge_letters[1]),
        top_logprobs=loop.judge_top_logprobs,
        progress=not run.config.disable_tqdm,
    )


def _function_oracle(run: Run) -> FunctionOracle:
    name = str(run.loop.preference_function)
    return FunctionOracle(_function(run, name), name, both_orders=run.loop.both_orders)


def _reward_functions(run: Run) -> list[Guarded]:
    return [guard(_function(run, name), name) for name in run.loop.reward_funcs or ()]


def _function(run: Run, name: str) -> Callable[..., Any]:
    return load_function(name, folder=Path(run.recipe.path).parent)
