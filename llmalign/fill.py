"""The reference's log-probs of a whole data set, computed before any run asks for them."""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmalign.data.doctor import Limits
from llmalign.data.formats import DataSource
from llmalign.data.reference_cache import Report
from llmalign.errors import UserError
from llmalign.prepare import end_ids, prepare
from llmalign.recipe import DataSection, Recipe
from llmalign.train import build, model_path
from llmalign.trainers import METHODS
from llmalign.trainers.loading import choose_dtype, load_tokenizer
from llmalign.trainers.references import cache_root

logger = logging.getLogger(__name__)

# Methods whose rows are scored as all methods of their kind score them.
METHOD_OF = {"pairs": "pair", "groups": "copg"}
STREAMED_ROWS = 10_000  # rows of a stream that are held at a time


@dataclass(frozen=True)
class Filled:
    """What it took to score a data set, and where its log-probs are kept."""

    report: Report
    root: Path

    def __str__(self) -> str:
        found, computed = self.report.found, self.report.computed
        return (
            f"{found + computed:,} log-probs: {found:,} found, {computed:,} computed ({self.report.seconds:.1f} s), "
            f"kept in {self.root}"
        )


def fill(
    source: DataSource,
    limits: Limits,
    *,
    model: str,
    kind: str = "pairs",
    streaming: bool = False,
    dtype: str | None = None,
    **settings: Any,
) -> Filled:
    """Score what the cache lacks of a data set, prepared and scored by the trainer itself, so that its keys are found.

    `settings` are fields of a method's config that change scores or how they are computed (`max_length`, `bf16`,
    `scoring`, `tokens_per_batch`, `reference_cache_dir`); None leaves one open. A stream is read in parts. Raises
    UserError for data or a model that `llmalign train` would refuse.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="llmalign-cache-") as nowhere:
        recipe = Recipe(
            path="llmalign cache",
            method=METHODS[METHOD_OF[kind]],
            data=DataSection(
                dataset_name={key: value for key, value in asdict(source).items() if value is not None},
                streaming=streaming,
            ),
            limits=limits,
            model={"model_name_or_path": model} | ({} if dtype is None else {"dtype": dtype}),
            config={
                "output_dir": nowhere,
                "precompute_ref_log_probs": True,
                "alarm_prompts": 0,
                "report_to": "none",
                **given,
            },
        )
        return _fill(recipe)


def _fill(recipe: Recipe) -> Filled:
    config = recipe.training_config()
    options = choose_dtype(recipe.model_config(), chosen="dtype" in recipe.model, bf16=config.bf16)
    with config.main_process_first(desc="looking for the model"):
        path = model_path(str(options.model_name_or_path))
    tokenizer = load_tokenizer(path)
    data = prepare(recipe, tokenizer, config, end_ids(tokenizer, path))
    parts = iter([data.train]) if isinstance(data.train, Dataset) else _parts(data.train)
    first = next(parts, None)
    if first is None:
        raise UserError("The stream has no rows, so there is nothing to score.")
    trainer = build(recipe, config, replace(options, model_name_or_path=path), tokenizer, replace(data, train=first))
    for part in parts:
        trainer.with_references(part, "train")
    report: Report = trainer.reference_reports["train"]
    return Filled(report, cache_root(config.reference_cache_dir))


def _parts(stream: Any) -> Iterator[Dataset]:
    rows = iter(stream)
    for first in rows:
        yield Dataset.from_list(list(chain([first], islice(rows, STREAMED_ROWS - 1))))
