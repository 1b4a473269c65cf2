"""Lengths of the rows that a trainer gets, the batches that it makes of them, and the steps of the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset

from llmalign.scores.scoring import PADDED
from llmalign.trainers.batching import RowSizes
from llmalign.types import PromptGroups

SHUFFLES = 0  # the seed of the shuffled epoch that padding is counted on


@dataclass(frozen=True)
class Lengths:
    """Tokens of N rows: of each row's prompt (N,), and of its completions, row by row, `counts` (N,) of them."""

    prompts: np.ndarray
    completions: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def alike(cls, rows: int, prompt: int, completions: Sequence[int]) -> "Lengths":
        """So many rows of one shape."""
        return cls(np.full(rows, prompt), np.tile(np.array(completions), rows), np.full(rows, len(completions)))

    @classmethod
    def of(cls, rows: Dataset, max_length: int | None) -> "Lengths":
        """Of prepared rows of any kind; what `max_length` cuts off is not counted."""
        table = rows.with_format("arrow")[:]
        names = [name for name in ("chosen_ids", "rejected_ids", "base_ids") if name in rows.column_names]
        if "completion_ids" in rows.column_names:
            counts = _lengths(table["completion_ids"])
            completions = _lengths(pyarrow.compute.list_flatten(table["completion_ids"]))
        elif names:
            counts = np.full(len(rows), len(names))
            completions = np.stack([_lengths(table[name]) for name in names], axis=1).reshape(-1)
        elif "input_ids" in rows.column_names:
            counts, completions = np.ones(len(rows), dtype=np.int64), _lengths(table["input_ids"])
        else:
            counts, completions = np.zeros(len(rows), dtype=np.int64), np.zeros(0, dtype=np.int64)
        own = "prompt_ids" in rows.column_names
        prompts = _lengths(table["prompt_ids"]) if own else np.zeros(len(rows), dtype=np.int64)
        if max_length is not None and len(completions):
            completions = np.minimum(completions, np.repeat(np.maximum(max_length - prompts, 0), counts))
        return cls(prompts, completions, counts)

    def take(self, rows: Sequence[int]) -> "Lengths":
        """Some rows, in the order of `rows`."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        parts = [self.completions[starts[row] : starts[row + 1]] for row in rows]
        kept = np.array(list(rows), dtype=np.int64)
        return Lengths(self.prompts[kept], np.concatenate([self.completions[:0], *parts]), self.counts[kept])

    def groups(self, token: int = 0) -> PromptGroups:
        """Rows of these lengths, every token the same; a prompt has one token at least."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        return PromptGroups(
            [[token] * max(int(length), 1) for length in self.prompts],
            [
                [[token] * int(length) for length in self.completions[starts[row] : starts[row + 1]]]
                for row in range(len(self))
            ],
        )

    def merged(self) -> "Lengths":
        """One row in place of all: a prompt and completions as long as theirs together, fed alike.

        Rows that are laid out without padding take what their tokens take, so a pass over it holds as many bytes as
        one over all of them, in far fewer operations. Rows of unequal numbers of completions come back as they are.
        """
        rows, counts = len(self), set(self.counts.tolist())
        if rows < 2 or len(counts) != 1 or 0 in counts:
            return self
        (count,) = counts
        saved = count * (rows - 1)  # the last token of every completion is never fed
        prompt = max(int(self.prompts.sum()) - saved, 1)
        return Lengths.alike(1, prompt, self.completions.reshape(rows, count).sum(axis=0).tolist())

    def whole(self) -> np.ndarray:
        """Tokens of every sequence, prompt and completion."""
        return np.repeat(self.prompts, self.counts) + self.completions

    def widest(self) -> np.ndarray:
        """Tokens of the longest sequence of each row, (N,)."""
        longest = self.prompts.copy()
        np.maximum.at(longest, np.repeat(np.arange(len(self)), self.counts), self.whole())
        return longest

    def sizes(self, kind: str, **options: Any) -> RowSizes:
        """What the rows take of a batch under one kind of scoring."""
        return RowSizes.of(kind, [self.prompts, self.completions, self.counts], **options)


def _lengths(column: Any) -> np.ndarray:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pyarrow.compute.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)


def longest_batch(lengths: Lengths, sizes: RowSizes, rows: int, budget: int | None = None) -> Lengths:
    """The longest rows together, which a shuffle may bring: `rows` of them, or as many as a budget of tokens holds."""
    order = np.argsort(-sizes.costs, kind="stable")
    if budget is None:
        return lengths.take(order[:rows].tolist())
    taken: list[int] = []
    held = sequences = width = 0
    for row in order.tolist():
        tokens = int(sizes.tokens[row])
        if sizes.sequences is not None:
            own = int(sizes.sequences[row])
            weight = (sequences + own) * max(width, tokens // max(own, 1))
            sequences, width = sequences + own, max(width, tokens // max(own, 1))
        else:
            weight = held + tokens
        if taken and weight > budget or len(taken) == rows:
            break
        held = weight
        taken.append(row)
    return lengths.take(taken)


@dataclass(frozen=True)
class Counts:
    """Of a run: rows and tokens. `fed`: what the model reads in an epoch, padding included."""

    rows: int
    tokens: int  # of prompts, each once a row, and of completions
    fed: int
    scored: int
    longest: int

    @property
    def padding(self) -> float:
        """Share of what is read that only fills up."""
        return 1 - min(self.tokens / self.fed, 1.0) if self.fed else 0.0


def counted(lengths: Lengths, kind: str, batch: int, *, repeats: bool) -> Counts:
    """Tokens of an epoch; padded rows are as wide as the widest of their batch in one shuffled epoch.

    `repeats`: a prompt that is read once for each of its completions counts as often, so that only padding is padding.
    """
    owners = np.repeat(np.arange(len(lengths)), lengths.counts)
    tokens = int(lengths.prompts.sum() + lengths.completions.sum())
    if repeats:
        tokens = int(lengths.whole().sum())
    if kind == PADDED:
        order = np.random.default_rng(SHUFFLES).permutation(len(lengths))
        widest = lengths.widest()
        fed = 0
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            fed += int(widest[some].max()) * int(lengths.counts[some].sum())
    else:
        fed = int(lengths.sizes(kind).tokens.sum())
    longest = int(lengths.whole().max()) if len(owners) else int(lengths.prompts.max(initial=0))
    return Counts(len(lengths), tokens, fed, int(lengths.completions.sum()), longest)


def steps_of(rows: int, batch: int, accumulation: int, processes: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run over `rows`; the last batch of an epoch may be smaller."""
    if max_steps > 0:
        return max_steps
    batches = math.ceil(rows / (batch * processes))
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def sampled_steps(prompts: int, rollout: int, passes: int, accumulation: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run that samples: whole rollouts of so many prompts alone, each in `passes` micro-batches.

    Micro-batches of all passes over a rollout (`num_iterations`) are counted.
    """
    if max_steps > 0:
        return max_steps
    batches = prompts // max(rollout, 1) * passes
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))
