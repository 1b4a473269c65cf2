"""What text and images hand to a run alike: rows that are ready, and a trainer that is built when it is due."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llmalign.errors import UserError
from llmalign.prepare import Data
from llmalign.recipe import Recipe
from llmalign.refusals import refusals

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Work:
    """The rows of a run, what builds its trainer and, where there is one, the command that comes after it."""

    data: Data
    build: Callable[[], Any]
    next: str | None = None


def built(recipe: Recipe, config: Any, data: Data, **keywords: Any) -> Any:
    """The method's trainer; what its parts refuse is said in their own words, as a UserError."""
    _check_trackers(config.report_to)
    set_seed(config.seed)  # new adapters and heads are drawn while the trainer is built
    with refusals(recipe.blame, "the trainer could not be built"):
        return recipe.method.trainer(args=config, train_dataset=data.train, eval_dataset=data.evaluation, **keywords)


def _check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that transformers knows and that is not installed, before anything is loaded."""
    missing = [name for name in names if name not in ("none", "all", *get_available_reporting_integrations())]
    known = [name for name in missing if name in INTEGRATION_TO_CALLBACK]
    if known:
        raise UserError(f"report_to names {known[0]}, which is not installed: pip install {known[0]}, or leave it out")
    if missing:
        raise UserError(f"report_to names {missing[0]}, which transformers does not know: {', '.join(TRACKERS)}, ...")
