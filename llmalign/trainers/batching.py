"""Which rows make an optimizer step, how ranks share them, and how a share is cut to a budget of tokens."""

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, cycle, islice
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_pt_utils import BatchRebalanceSampler

from llmalign.data.ragged import tables
from llmalign.errors import UserError
from llmalign.scores.scoring import PADDED, PADDING_FREE, SHARED_PROMPT, shortest_window
from llmalign.types import PromptGroups


@dataclass(frozen=True)
class RowSizes:
    """What N rows take of a batch under one kind of scoring, int64 arrays (N,).

    tokens: of the row alone. costs: the same with attention's quadratic term. sequences: how many padded sequences the
    row brings, each as wide as the widest of its batch; None where rows pad nothing, so that tokens and costs add up.
    """

    tokens: np.ndarray
    costs: np.ndarray
    sequences: np.ndarray | None = None

    @classmethod
    def of(
        cls, kind: str, lengths: Sequence[np.ndarray], window: int | None = None, multiple_of: int | None = None
    ) -> "RowSizes":
        """From the lengths of N prompts, of all completions, prompt by prompt, and how many each prompt has (N,).

        All rows count as padded, which is never less, where one exceeds the model's sliding `window`.
        """
        prompts, completions, counts = lengths
        owner = np.repeat(np.arange(len(prompts)), counts)
        whole = prompts[owner] + completions
        quadratic = BatchRebalanceSampler.QUADRATIC_COST_COEF
        if kind == PADDED or (window is not None and whole.max(initial=0) > window):
            width = np.zeros_like(prompts)
            np.maximum.at(width, owner, whole)
            width = -(-width // (multiple_of or 1)) * (multiple_of or 1)
            return cls(counts * width, counts * (width + quadratic * width**2).astype(np.int64), counts)
        if kind not in (SHARED_PROMPT, PADDING_FREE):
            raise ValueError(f"no layout is called {kind!r}")
        saved = counts - 1 if kind == SHARED_PROMPT else np.zeros_like(counts)  # readings of the prompt
        tokens = np.bincount(owner, whole, len(prompts)) - saved * prompts
        squares = np.bincount(owner, whole**2, len(prompts)) - saved * prompts**2
        return cls(tokens.astype(np.int64), (tokens + quadratic * squares).astype(np.int64))

    def lists(self, rows: Any = slice(None), *, costs: bool = False) -> tuple[list[int], list[int] | None]:
        """Tokens (or costs) and sequences of some rows, as the functions below take them."""
        return (
            (self.costs if costs else self.tokens)[rows].tolist(),
            None if self.sequences is None else self.sequences[rows].tolist(),
        )

    @classmethod
    def of_groups(cls, groups: PromptGroups, kind: str, **options: Any) -> "RowSizes":
        """Of the rows of a batch."""
        lengths = ([len(prompt) for prompt in groups.prompts], groups.lengths(), groups.counts())
        return cls.of(kind, [np.array(values, dtype=np.int64) for values in lengths], **options)

    @classmethod
    def of_dataset(cls, dataset: Dataset, kind: str, max_length: int | None, **options: Any) -> "RowSizes":
        """Of prepared pairs (`chosen_ids`, `rejected_ids`, `base_ids` where there is one) or groups."""
        nested = "completion_ids" in dataset.column_names
        columns = [name for name in ("chosen_ids", "rejected_ids", "base_ids") if name in dataset.column_names]
        found = []
        for table in tables(dataset, ["prompt_ids", *(["completion_ids"] if nested else columns)], 50_000):
            prompts = _lengths(table["prompt_ids"])
            if nested:
                counts = _lengths(table["completion_ids"])
                completions = _lengths(pyarrow.compute.list_flatten(table["completion_ids"]))
            else:
                counts = np.full(len(prompts), len(columns))
                completions = np.stack([_lengths(table[name]) for name in columns], axis=1).reshape(-1)
            if max_length is not None:
                completions = np.minimum(completions, np.repeat(np.maximum(max_length - prompts, 0), counts))
            found.append((prompts, completions, counts))
        return cls.of(kind, [np.concatenate(values) for values in zip(*found, strict=True)], **options)


def _lengths(column: Any) -> np.ndarray:
    return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)


def needed_parts(
    tokens: Sequence[int], budget: int, sequences: Sequence[int] | None = None, row_ids: Sequence[int] | None = None
) -> int:
    """Fewest contiguous parts that each stay within `budget`; see `split_rows`.

    Raises UserError naming the largest row (its position without `row_ids`) where one row alone exceeds the budget.
    """
    if max(tokens) > budget:
        worst = max(range(len(tokens)), key=tokens.__getitem__)
        raise UserError(
            f"Row {worst if row_ids is None else int(row_ids[worst])} alone has {tokens[worst]} tokens, more than "
            f"tokens_per_batch {budget}; raise tokens_per_batch to at least {tokens[worst]} or lower max_length."
        )
    return len(_fill(tokens, sequences, budget))


def split_rows(tokens: Sequence[int], parts: int, sequences: Sequence[int] | None = None) -> list[list[int]]:
    """Cut row positions into exactly `parts` non-empty contiguous parts, the largest as small as it can be.

    A part weighs the sum of its `tokens`; with `sequences` (padded) the number of its sequences times its widest row.
    Raises ValueError where there are fewer rows than parts.
    """
    if not 1 <= parts <= len(tokens):
        raise ValueError(f"{len(tokens)} rows cannot be cut into {parts} parts")
    low, high = max(tokens), group_weight(range(len(tokens)), tokens, sequences)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(tokens, sequences, middle)) <= parts else (middle + 1, high)
    return _fill(tokens, sequences, low, parts)


def _fill(tokens: Sequence[int], sequences: Sequence[int] | None, limit: int, parts: int = 0) -> list[list[int]]:
    """Contiguous parts, each as full as `limit` allows, at least `parts` of them."""
    filled: list[list[int]] = []
    held = (0, 0, 0)  # tokens that add up, padded sequences, their width
    for position, weight in enumerate(tokens):
        row = (weight, 0, 0)
        if sequences is not None:
            row = (0, sequences[position], weight // max(sequences[position], 1))
        joined = (held[0] + row[0], held[1] + row[1], max(held[2], row[2]))
        spare = len(tokens) - position > parts - len(filled)
        if filled and spare and joined[0] + joined[1] * joined[2] <= limit:
            filled[-1].append(position)
            held = joined
        else:
            filled.append([position])
            held = row
    return filled


def group_weight(group: Sequence[int], tokens: Sequence[int], sequences: Sequence[int] | None = None) -> int:
    """What the rows of one group weigh together; see `split_rows`."""
    if sequences is None:
        return sum(tokens[row] for row in group)
    return sum(sequences[row] for row in group) * max(tokens[row] // max(sequences[row], 1) for row in group)


def balanced_groups(tokens: Sequence[int], groups: int, sequences: Sequence[int] | None = None) -> list[list[int]]:
    """Positions in exactly `groups` non-empty groups of nearly equal weight, heaviest first; see `split_rows`.

    Where weights add up, each row, largest first, goes to the lightest group; padded rows stay with rows as wide.
    """
    if sequences is not None:
        order = sorted(range(len(tokens)), key=lambda row: tokens[row] // max(sequences[row], 1), reverse=True)
        parts = split_rows([tokens[row] for row in order], groups, [sequences[row] for row in order])
        found = [[order[position] for position in part] for part in parts]
    else:
        found = [[] for _ in range(groups)]
        lightest = [(0, group) for group in range(groups)]
        for row in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
            load, group = lightest[0]
            found[group].append(row)
            heapq.heapreplace(lightest, (load + tokens[row], group))
    return sorted(found, key=lambda group: group_weight(group, tokens, sequences), reverse=True)


class StepSampler(BatchRebalanceSampler):
    """Lists of row positions for one rank; the rows of a step follow from (seed, epoch, step) and the effective batch.

    Ranks, micro-batches and the budget change only who scores what. Without `tokens_per_batch` a step is `grad_accum`
    lists per rank, of balanced cost. With it a step is ONE list per rank: m parts of at most that many tokens, one
    after the other, m the same on every rank. A tail (`drop_last` False) with fewer rows than parts repeats its own,
    which `fillers` tells. Raises UserError where one row alone exceeds the budget.
    """

    def __init__(
        self,
        sizes: RowSizes,
        effective_batch_size: int,
        dp_size: int,
        grad_accum: int = 1,
        *,
        tokens_per_batch: int | None = None,
        row_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sizes.tokens.tolist(), effective_batch_size, dp_size, grad_accum, **options)
        if tokens_per_batch is not None:
            if grad_accum != 1:
                raise ValueError("a step within a token budget is one list per rank: grad_accum must be 1")
            needed_parts(self.lengths, tokens_per_batch, row_ids=row_ids)
        self.sizes = sizes
        self.tokens_per_batch = tokens_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, self.num_global_batches * self.effective_batch_size, self.effective_batch_size):
            rows = order[start : start + self.effective_batch_size]
            yield from [[rows[place % len(rows)] for place in places] for places in self._shares(rows)]

    def fillers(self) -> list[list[bool]]:
        """For each of this rank's lists of the epoch's last step, which of its rows only repeat others of the step."""
        start = (self.num_global_batches - 1) * self.effective_batch_size
        rows = self._order()[start : start + self.effective_batch_size]
        return [[place >= len(rows) for place in places] for places in self._shares(rows)]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = len(self.lengths)
        return torch.randperm(rows, generator=generator).tolist() if self.shuffle else list(range(rows))

    def _shares(self, rows: list[int]) -> list[list[int]]:
        """This rank's lists of a step, as places among its rows; places behind the last stand for rows repeated."""
        groups = self._groups(rows)
        # Groups of like weight side by side; the direction turns each time, so that the ranks' sums even out.
        slots = [groups[first : first + self.dp_size] for first in range(0, len(groups), self.dp_size)]
        mine = [slot[self.rank if turn % 2 == 0 else -1 - self.rank] for turn, slot in enumerate(slots)]
        return mine if self.tokens_per_batch is None else [list(chain(*mine))]

    def _groups(self, rows: list[int]) -> list[list[int]]:
        """The places of a step in as many groups as all ranks have micro-batches, heaviest first."""
        budget = self.tokens_per_batch
        for parts in count(self.grad_accum):
            places = max(self.dp_size * parts, len(rows))
            tokens, sequences = self.sizes.lists(list(islice(cycle(rows), places)), costs=budget is None)
            groups = balanced_groups(tokens, self.dp_size * parts, sequences)
            if budget is None or group_weight(groups[0], tokens, sequences) <= budget:
                break  # at the latest with one row in each group
        return groups


def take_rows(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch, in the order of `rows`: tensors by their first dimension, groups with their completions.

    Raises TypeError for anything else, which could not be cut.
    """
    taken: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, PromptGroups):
            taken[key] = value.take(rows)
        elif isinstance(value, Tensor):
            taken[key] = value[torch.tensor(rows, dtype=torch.long, device=value.device)]
        else:
            raise TypeError(f"{key} of a batch is a {type(value).__name__}, which has no rows to take")
    return taken


def check_batching(args: Any) -> None:
    """Raise UserError where a config's `tokens_per_batch` is no budget or contradicts how rows are batched."""
    budget = args.tokens_per_batch
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UserError(f"tokens_per_batch must be a positive whole number, got {budget!r}")
    if args.gradient_accumulation_steps != 1:
        raise UserError(
            f"tokens_per_batch cuts each step into as many micro-batches as it needs, so gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} has no place beside it; make per_device_train_batch_size the rows of "
            "a step per process and leave gradient_accumulation_steps at 1"
        )
    if args.train_sampling_strategy == "group_by_length":
        raise UserError("tokens_per_batch needs no train_sampling_strategy: group_by_length; leave it at random")


class MicroBatchMixin:
    """Batches by `tokens_per_batch` or cost, for a Trainer with a `scorer`; before PairTrainerMixin in the MRO.

    Each step is cut into the same number of parts on every rank, each scored and freed before the next; gradients are
    reduced with the last (under FSDP with each, which keeps them sharded). Evaluation keeps its fixed batches.
    """

    args: Any
    accelerator: Any
    scorer: Any
    _shared_out_for: str | None
    _parts = 1
    _step_sampler: StepSampler | None = None

    def get_train_dataloader(self) -> Any:
        """Refuse what cannot be cut alike on all ranks: a stream under DeepSpeed or FSDP."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if self.args.tokens_per_batch is not None and sharded and not isinstance(self.train_dataset, Dataset):  # type: ignore[attr-defined]
            raise UserError("tokens_per_batch on a stream works on one process or under DDP; leave it out, or load it")
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args = self.args
        if args.tokens_per_batch is None and args.train_sampling_strategy != "batch_rebalance":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = args.seed if args.data_seed is None else args.data_seed
        rows = self._train_batch_size * args.gradient_accumulation_steps * args.world_size  # type: ignore[attr-defined]
        self._step_sampler = StepSampler(
            RowSizes.of_dataset(dataset, self._shared_out_for or self.scorer.kind, args.max_length, **self._counting()),
            rows, args.world_size,
            args.gradient_accumulation_steps, tokens_per_batch=args.tokens_per_batch, row_ids=dataset["row_id"],
            rank=args.process_index, seed=seed, drop_last=args.dataloader_drop_last,
            shuffle=args.train_sampling_strategy != "sequential",
        )  # fmt: skip
        return self._step_sampler

    def _run_epoch(self, *, epoch: int, **options: Any) -> None:
        # Resumed within an epoch on several ranks, Trainer does not find the sampler below its two wrappers.
        if self._step_sampler is not None:
            self._step_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **options)  # type: ignore[misc]

    def fillers(self, batches: list[dict[str, Any]]) -> list[list[bool]]:
        """See PairTrainerMixin: those of the sampler that shares out the rows, where there is one."""
        return super().fillers(batches) if self._step_sampler is None else self._step_sampler.fillers()  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Take the rows of one optimizer step and agree over ranks on the number of parts they are cut into."""
        batches, rows = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if self.args.tokens_per_batch is not None:
            own = [0, 0]
            if batches:  # one: gradient_accumulation_steps is 1
                tokens, sequences = self._sizes(batches[0]).lists()
                own = [needed_parts(tokens, self.args.tokens_per_batch, sequences, batches[0]["row_id"]), len(tokens)]
            ranks = torch.tensor([own])
            if self.accelerator.num_processes > 1:
                ranks = self.accelerator.gather(ranks.to(self.accelerator.device))
            self._parts, fewest = int(ranks[:, 0].max()), int(ranks[:, 1].min())
            if self._parts > fewest:
                raise UserError(
                    f"a process has {fewest} rows for a step in {self._parts} parts, because a stream ends unevenly "
                    f"or scoring fell back to {self.scorer.kind} after the rows were shared out; raise tokens_per_batch"
                    f" or set scoring: {self.scorer.kind}"
                )
        return batches, rows

    def _sizes(self, batch: dict[str, Any]) -> RowSizes:
        return RowSizes.of_groups(batch["groups"], self.scorer.kind, **self._counting())

    def _counting(self) -> dict[str, int | None]:
        window = shortest_window(self.model.config)  # type: ignore[attr-defined]
        return {"window": window, "multiple_of": self.args.pad_to_multiple_of}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, part by part; returns the sum of the parts' losses, detached."""
        step = super().training_step  # type: ignore[misc]
        if self.args.tokens_per_batch is None or self._parts == 1:
            return step(model, inputs, num_items_in_batch)
        tokens, sequences = self._sizes(inputs).lists()
        losses = []
        for index, rows in enumerate(split_rows(tokens, self._parts, sequences)):
            with self._reducing(model, last=index == self._parts - 1):
                losses.append(step(model, take_rows(inputs, rows), num_items_in_batch))
        return torch.stack(losses).sum()

    def _reducing(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        """Let gradients be reduced over ranks in the last part alone."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # The engine adds up every backward and steps after the one that accelerate calls synchronised.
            self.accelerator.gradient_state._set_sync_gradients(last)
        elif not last and self.accelerator.distributed_type != DistributedType.FSDP:
            return self.accelerator.no_sync(model)
        return contextlib.nullcontext()
