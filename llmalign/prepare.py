"""The rows of a recipe, read, tokenized, examined and split, before any model weights are loaded."""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig

from llmalign.data.doctor import Limits, Report, drop_overlong, examine, refuse
from llmalign.data.formats import DataSource, load
from llmalign.data.report import RowReport
from llmalign.data.text import tokenize_text
from llmalign.errors import UserError
from llmalign.recipe import Recipe
from llmalign.trainers import prepare_groups, prepare_pairs, prepare_prompts
from llmalign.trainers.loading import require_chat_template
from llmalign.trainers.pair import PairTrainerMixin

logger = logging.getLogger(__name__)

# Made by the preparation; TRL's own trainers make their own columns and would take these for finished ones.
PREPARED_COLUMNS = {
    "pairs": ["prompt_ids", "chosen_ids", "rejected_ids"], "text": ["input_ids", "completion_mask"],
    "prompts": ["prompt_ids"],
}  # fmt: skip
HELD_OUT = "held_out"
LARGEST_HOLDOUT = 0.1

AnyDataset: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class Data:
    """What a trainer takes, and what the doctor found in each set that was read."""

    train: AnyDataset
    evaluation: AnyDataset | dict[str, AnyDataset] | None
    reports: Mapping[str, RowReport]

    def train_digest(self) -> str | None:
        """SHA-256 of the training rows as they go to the trainer, in their order; None for a stream."""
        if not isinstance(self.train, Dataset):
            return None
        digest = hashlib.sha256()
        for table in self.train.with_format("arrow").iter(batch_size=1000):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
                writer.write_table(table.combine_chunks().replace_schema_metadata())
            digest.update(sink.getvalue())
        return digest.hexdigest()


def prepare(recipe: Recipe, tokenizer: Any, config: Any, eos_ids: list[int]) -> Data:
    """Load, tokenize and examine every data set of a recipe; rows that do not fit go where `overlong` says.

    Raises UserError where the doctor finds more than the recipe's limits allow.
    """
    sources = {"train": recipe.data.train_sources(), **recipe.data.eval_sources()}
    make = PREPARATIONS[recipe.method.kind]
    template = {"chat_template_kwargs": config.chat_template_kwargs} if recipe.method.kind == "prompts" else {}
    reports: dict[str, Report] = {}
    ready: dict[str, AnyDataset] = {}
    for name, found in sources.items():
        raw = _load(recipe, config, name, found)
        options = {"max_length": config.max_length, "num_proc": config.dataset_num_proc, "name": name, **template}
        rows = make(raw, tokenizer, **options)
        reports[name] = examine(
            raw,
            rows,
            tokenizer,
            kind=recipe.method.kind,
            max_length=config.max_length,
            eos_ids=eos_ids,
            limits=_limits(recipe),
        )
        _refuse(name, reports[name])
        ready[name] = _for_trainer(recipe, config, name, rows)
    train = ready.pop("train")
    if not ready and recipe.data.holdout_rows:
        train, ready[HELD_OUT] = hold_out(train, recipe.data.holdout_rows, config.seed)
    alone = recipe.data.eval_datasets is None and len(ready) == 1
    return Data(train=train, evaluation=next(iter(ready.values())) if alone else ready or None, reports=reports)


def hold_out(rows: AnyDataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `count` rows, all rows of a prompt on one side; at most a tenth of the rows, which is logged.

    Raises UserError for a stream, and where the rows do not have two different prompts.
    """
    if not isinstance(rows, Dataset):
        raise UserError("`holdout_rows` cannot split a stream: name an evaluation set, or set it to 0.")
    wanted = max(1, min(count, int(LARGEST_HOLDOUT * len(rows))))
    column = next(name for name in ("prompt", "messages", "text", "caption") if name in rows.column_names)
    keys = [json.dumps(value) for value in rows[column]]
    sizes = Counter(keys)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    taken: set[str] = set()
    total = 0
    while total < wanted:
        key = order.pop()
        taken.add(key)
        total += sizes[key]
    if not order:
        raise UserError("`holdout_rows` leaves nothing to train on: the rows share one prompt; set it to 0.")
    logger.info("No evaluation set is named: %d rows are held out, on prompts that training never sees.", total)
    return (
        rows.select([index for index, key in enumerate(keys) if key not in taken]),
        rows.select([index for index, key in enumerate(keys) if key in taken]),
    )


def end_ids(tokenizer: Any, path: str, revision: str | None = None) -> list[int]:
    """Token ids that end a response: the tokenizer's EOS and those that the model's generation config names."""
    found = {tokenizer.eos_token_id}
    try:
        named = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:
        logger.info("The model has no generation config: %r alone ends a response.", tokenizer.eos_token)
        return sorted(found)
    return sorted(found.union(named if isinstance(named, list) else [] if named is None else [named]))


def prepare_text(
    dataset: AnyDataset, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train"
) -> AnyDataset:
    """SFT rows as the doctor looks at them; nothing is cut or dropped, so `max_length` is not used here."""
    require_chat_template(tokenizer, next(iter(dataset)))
    return tokenize_text(dataset, tokenizer, num_proc=num_proc, name=name)


PREPARATIONS = {"pairs": prepare_pairs, "groups": prepare_groups, "prompts": prepare_prompts, "text": prepare_text}


def _load(recipe: Recipe, config: Any, name: str, sources: list[DataSource]) -> AnyDataset:
    margins = recipe.config.get("scorer_margin_column")
    keep = (margins,) if margins and name == "train" else tuple(recipe.config.get("reward_columns") or ())
    with config.main_process_first(desc=f"reading the {name} data"):
        return load(
            sources,
            kind=recipe.method.kind,
            streaming=recipe.data.streaming and name == "train",
            seed=config.seed,
            keep=keep,
        )


def _limits(recipe: Recipe) -> Limits:
    """With `overlong: drop` nothing is cut, so no limit on cut or dropped rows applies."""
    assert isinstance(recipe.limits, Limits)  # a method of text
    return replace(recipe.limits, truncated=1.0, dropped=1.0) if recipe.data.overlong == "drop" else recipe.limits


def _refuse(name: str, report: Report) -> None:
    try:
        refuse(report)
    except UserError as error:
        raise UserError(f"The {name} data: {error}") from error


def _for_trainer(recipe: Recipe, config: Any, name: str, rows: AnyDataset) -> AnyDataset:
    if recipe.data.overlong == "drop" and config.max_length is not None:
        rows = drop_overlong(rows, config.max_length, recipe.method.kind)
    if isinstance(rows, Dataset):
        if not len(rows):
            raise UserError(f"No row of the {name} data fits max_length {config.max_length}; raise it.")
        logger.info("%s: %d rows go to the trainer.", name, len(rows))
    if issubclass(recipe.method.trainer, PairTrainerMixin):
        return rows
    return rows.remove_columns(PREPARED_COLUMNS[recipe.method.kind])
