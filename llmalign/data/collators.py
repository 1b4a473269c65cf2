"""Batches of token ids: pairs, groups of k scored completions, prompts.

A batch of responses is not padded: it holds `row_id` (B,) int64 and `groups`, a PromptGroups with a prompt a row and
its completions, cut on the right so that prompt and completion have at most `max_length` tokens, as the doctor counts
them; how they are laid out for a model is decided when they are scored. Not covered: images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmalign.errors import UserError
from llmalign.types import PromptGroups

LOGP_KEYS = ("ref_chosen_logps", "ref_rejected_logps", "last_chosen_logps", "last_rejected_logps")

Example = dict[str, Any]
Batch = dict[str, Any]


@dataclass
class _Completions:
    """What the collators of prompts with completions share."""

    max_length: int | None = None

    def groups(self, examples: Sequence[Example]) -> PromptGroups:
        """The rows' prompts and completions alone."""
        return PromptGroups([row["prompt_ids"] for row in examples], [self._cut(row) for row in examples])

    def _completions(self, row: Example) -> list[list[int]]:
        raise NotImplementedError

    def _cut(self, row: Example) -> list[list[int]]:
        start = len(row["prompt_ids"])
        if self.max_length is not None and start >= self.max_length:
            raise UserError(
                f"Row {row['row_id']}: the prompt alone has {start} tokens and fills max_length {self.max_length}, "
                "which leaves nothing of its completions to train on; raise max_length or drop the row."
            )
        if start == 0:
            raise UserError(
                f"Row {row['row_id']} has an empty prompt, so nothing predicts the first token of its completions; "
                "start prompts with the BOS token or drop the row."
            )
        limit = None if self.max_length is None else self.max_length - start
        return [completion[:limit] for completion in self._completions(row)]


@dataclass
class PairCollator(_Completions):
    """B preference rows as B groups: chosen, rejected and, where the rows have `base_ids`, that third.

    Takes rows with `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids` and returns `row_id` (B,), `groups`; where the
    rows have them also the reference's and last iterate's log-probs (B,) float32 and `flipped` (B,) bool. Raises
    UserError naming the row whose prompt alone fills max_length, or that has nothing to score.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        first = examples[0]
        batch: Batch = {"row_id": _row_ids(examples), "groups": self.groups(examples)}
        for key in LOGP_KEYS:
            if key in first:
                batch[key] = torch.tensor([row[key] for row in examples], dtype=torch.float32)
        if "flipped" in first:
            batch["flipped"] = torch.tensor([row["flipped"] for row in examples], dtype=torch.bool)
        return batch

    def _completions(self, row: Example) -> list[list[int]]:
        return [row[key] for key in ("chosen_ids", "rejected_ids", "base_ids") if key in row]


@dataclass
class GroupCollator(_Completions):
    """P prompts with their scored completions.

    Takes rows with `row_id`, `prompt_ids`, `completion_ids` (k lists) and `rewards` (k numbers) and returns `row_id`
    (P,), `groups`, `rewards` (P, K) float32, 0 where there is none, `group_mask` (P, K) bool and, where the rows have
    them, `ref_logps` (P, K) float32. K is the largest k of the batch; completion n of all belongs to the n-th true
    entry of `group_mask` in row-major order. Raises UserError naming the row whose prompt alone fills max_length or is
    empty, that has no completions, or whose completions and rewards differ in number.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        for row in examples:
            if len(row["rewards"]) != len(row["completion_ids"]):
                raise UserError(
                    f"Row {row['row_id']} has {len(row['completion_ids'])} completions and {len(row['rewards'])} "
                    "rewards."
                )
            if not row["completion_ids"]:
                raise UserError(f"Row {row['row_id']} has no completions, so nothing to score; drop the row.")
        batch: Batch = {"row_id": _row_ids(examples), "groups": self.groups(examples)}
        batch["rewards"] = _rows_of([row["rewards"] for row in examples])
        batch["group_mask"] = _rows_of([[1.0] * len(row["rewards"]) for row in examples]).bool()
        if "ref_logps" in examples[0]:
            batch["ref_logps"] = _rows_of([row["ref_logps"] for row in examples])
        return batch

    def _completions(self, row: Example) -> list[list[int]]:
        return row["completion_ids"]


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


def _rows_of(values: Sequence[Sequence[float]]) -> Tensor:
    """Lists of different lengths as one float32 tensor, 0 where a list has ended."""
    rows = [torch.tensor(row, dtype=torch.float32) for row in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _row_ids(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([row["row_id"] for row in examples], dtype=torch.long)


def _rounded(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple
