"""Batches of token ids: pairs, groups of k scored completions, prompts.

All tensors of ids and masks are int64. Sequences are prompt + completion, cut on the right at `max_length`, as the
doctor counts them. `row_id` comes first in every batch, so that counting the rows of a batch by its first tensor is
right. Not covered: images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmalign.errors import UserError

LOGP_KEYS = ("ref_chosen_logps", "ref_rejected_logps", "last_chosen_logps", "last_rejected_logps")

Example = dict[str, Any]
Batch = dict[str, Tensor]


@dataclass
class _Completions:
    """What the collators of prompt + completion share."""

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def _pack(self, sequences: Sequence[tuple[Example, list[int]]], prefix: str = "") -> Batch:
        """Right-padded `input_ids`, `attention_mask`, `completion_mask` (N, T) of N (row, completion ids)."""
        limit = self.max_length
        rows = [(row["prompt_ids"] + completion)[:limit] for row, completion in sequences]
        width = _rounded(max(map(len, rows), default=0), self.pad_to_multiple_of)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        completion_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, (ids, (row, _)) in enumerate(zip(rows, sequences, strict=True)):
            start = len(row["prompt_ids"])
            if limit is not None and start >= limit:
                raise UserError(
                    f"Row {row['row_id']}: the prompt alone has {start} tokens and fills max_length {limit}, which "
                    "leaves nothing of its completions to train on; raise max_length or drop the row."
                )
            input_ids[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[index, : len(ids)] = 1
            completion_mask[index, start : len(ids)] = 1
        return {
            f"{prefix}input_ids": input_ids,
            f"{prefix}attention_mask": attention_mask,
            f"{prefix}completion_mask": completion_mask,
        }


@dataclass
class PairCollator(_Completions):
    """B preference rows as 2B sequences, all chosen first and then all rejected.

    Takes rows with `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids` and returns `row_id` (B,), `input_ids`,
    `attention_mask`, `completion_mask` (2B, T); where the rows have them also the reference's and last iterate's
    log-probs (B,) float32, `flipped` (B,) bool, and for `base_ids` the three tensors with the prefix `base_` (B, T').
    Raises UserError naming the row whose prompt alone fills max_length.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        first = examples[0]
        both = [(row, row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in examples]
        batch = {"row_id": _row_ids(examples), **self._pack(both)}
        for key in LOGP_KEYS:
            if key in first:
                batch[key] = torch.tensor([row[key] for row in examples], dtype=torch.float32)
        if "flipped" in first:
            batch["flipped"] = torch.tensor([row["flipped"] for row in examples], dtype=torch.bool)
        if "base_ids" in first:
            batch.update(self._pack([(row, row["base_ids"]) for row in examples], prefix="base_"))
        return batch


@dataclass
class GroupCollator(_Completions):
    """P prompts with their scored completions, flattened prompt by prompt.

    Takes rows with `row_id`, `prompt_ids`, `completion_ids` (k lists) and `rewards` (k numbers) and returns `row_id`
    (P,), `input_ids`, `attention_mask`, `completion_mask` (N, T) for the N completions there are, `rewards` (P, K)
    float32, 0 where there is none, and `group_mask` (P, K) bool. K is the largest k of the batch; sequence n belongs to
    the n-th true entry of `group_mask` in row-major order. Raises UserError naming the row whose prompt alone fills
    max_length, or whose completions and rewards differ in number.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        most = max(len(row["completion_ids"]) for row in examples)
        rewards = torch.zeros((len(examples), most), dtype=torch.float32)
        group_mask = torch.zeros((len(examples), most), dtype=torch.bool)
        for index, row in enumerate(examples):
            present = len(row["completion_ids"])
            if len(row["rewards"]) != present:
                raise UserError(f"Row {row['row_id']} has {present} completions and {len(row['rewards'])} rewards.")
            rewards[index, :present] = torch.tensor(row["rewards"], dtype=torch.float32)
            group_mask[index, :present] = True
        flat = [(row, ids) for row in examples for ids in row["completion_ids"]]
        return {"row_id": _row_ids(examples), **self._pack(flat), "rewards": rewards, "group_mask": group_mask}


@dataclass
class PromptCollator:
    """B prompts for generation: `row_id` (B,), left-padded `input_ids` and `attention_mask` (B, T).

    A prompt of more than `max_length` tokens keeps its end, which is what a completion continues.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        rows = [row["prompt_ids"][-self.max_length :] if self.max_length else row["prompt_ids"] for row in examples]
        width = _rounded(max(map(len, rows)), self.pad_to_multiple_of)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, ids in enumerate(rows):
            input_ids[index, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            attention_mask[index, width - len(ids) :] = 1
        return {"row_id": _row_ids(examples), "input_ids": input_ids, "attention_mask": attention_mask}


def _row_ids(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([row["row_id"] for row in examples], dtype=torch.long)


def _rounded(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple
