"""Leave out what does not fit `max_length`, instead of training on responses that break off."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from llmalign.errors import UserError

logger = logging.getLogger(__name__)


def drop_overlong(prepared: Dataset | IterableDataset, max_length: int, kind: str) -> Dataset | IterableDataset:
    """Prepared rows that fit `max_length` tokens untruncated, prompt and end-of-text included.

    A pair goes when either response does not fit. A group loses the completions that do not fit, with their rewards,
    and goes when fewer than two are left. What was left out is logged (for a stream, that it will be). Raises
    UserError when nothing is left.
    """
    options: dict[str, Any] = {"fn_kwargs": {"max_length": max_length}}
    whole = isinstance(prepared, Dataset)
    if whole:
        options["desc"] = f"Leaving out what exceeds {max_length} tokens"
    if kind == "groups":
        kept = prepared.map(_trim_group, **options).filter(_has_two, input_columns=["rewards"])
    elif kind == "pairs":
        kept = prepared.filter(_pair_fits, input_columns=["prompt_ids", "chosen_ids", "rejected_ids"], **options)
    elif kind == "text":
        kept = prepared.filter(_text_fits, input_columns=["input_ids"], **options)
    else:
        raise UserError(f"Overlong rows can be left out of pairs, groups and text, not of {kind!r}: leave `overlong`.")
    if not whole:
        logger.info("Rows that exceed max_length %d are left out of the stream as they come.", max_length)
        return kept
    if not len(kept):
        raise UserError(f"None of the {len(prepared):,} rows fits max_length {max_length}; raise it.")
    logger.info(
        "Left out %d of %d rows that exceed max_length %d.", len(prepared) - len(kept), len(prepared), max_length
    )
    return kept


def _pair_fits(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int], max_length: int) -> bool:
    return len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) <= max_length


def _text_fits(input_ids: list[int], max_length: int) -> bool:
    return len(input_ids) <= max_length


def _trim_group(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    room = max_length - len(row["prompt_ids"])
    fits = [index for index, ids in enumerate(row["completion_ids"]) if len(ids) <= room]
    columns = ("completions", "completion_ids", "rewards")
    return {name: [row[name][index] for index in fits] for name in columns if name in row}


def _has_two(rewards: list[float]) -> bool:
    return len(rewards) >= 2
