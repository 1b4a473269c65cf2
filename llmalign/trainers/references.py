"""Where the reference's log-probs come from: scored during training, or looked up in the cache on disk."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from llmalign.data.reference_cache import (
    ReferenceCache,
    Report,
    ScoreKey,
    default_root,
    keep_rows,
    look_up_rows,
    score_ahead,
    weights_digest,
)
from llmalign.errors import UserError
from llmalign.processes import fail_together, lowest_of_all
from llmalign.scores.scoring import Scorer, batch_dependent
from llmalign.trainers.text_scores import CHECKED_GROUPS, short_groups
from llmalign.types import PromptGroups

logger = logging.getLogger(__name__)

CHOICE_FILE = "references.json"
AHEAD_TOKENS = 16_384  # tokens scored at a time while the cache is filled
CHECKED_ROWS = 4
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


def cache_root(folder: str | None) -> Path:
    """Where log-probs are kept under a recipe's `reference_cache_dir`; None: in the user's cache."""
    return Path(folder).expanduser() if folder else default_root()


class RememberChoice(TrainerCallback):
    """Keeps what was chosen in the output folder: a resumed run must not choose anew with a fuller cache."""

    def __init__(self, choice: dict[str, bool]) -> None:
        self.choice = choice

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the choice once training starts."""
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(args.output_dir) / CHOICE_FILE).write_text(json.dumps(self.choice))


class References:
    """Gives the rows of a data set their reference log-probs where looking them up costs less than scoring them.

    `args.precompute_ref_log_probs`: True, always ahead of training through the cache; False, always during training;
    None, by cost, set by set. Mixed into a Trainer that has `frozen_logps` and `reference_adapter`.
    """

    args: Any
    accelerator: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any
    ref_model: Any
    scorer: Scorer
    #: columns of a row's reference log-probs, completion by completion
    reference_columns: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps")
    _ready = False
    #: whether a set is a stream, whose rows may lack the log-probs that others have
    _streams = False
    _digests: dict[tuple[int, str | None], str]
    #: what looking the sets up took, by their names
    reference_reports: dict[str, Report]

    def add_references(self, wanted: bool | None) -> None:
        """Choose for the training set and every evaluation set, once the models are there and nothing is wrapped."""
        self._ready = True
        self._digests = {}
        self.reference_reports = {}
        choice: dict[str, bool] = {}
        kept = self._remembered() if wanted is None else {}

        def choose(rows: Any, name: str) -> Any:
            choice[name] = self._ahead(name, rows, kept.get(name, wanted))
            self._streams |= isinstance(rows, IterableDataset)
            return rows

        self.map_sets(choose)
        if wanted is None:
            self.add_callback(RememberChoice(choice))  # type: ignore[attr-defined]
        # Another run may fill the cache while the ranks look, each for itself.
        choice = broadcast_object_list([choice])[0]
        self.map_sets(lambda rows, name: self.with_references(rows, name) if choice[name] else rows)
        self.precompute_ref_logps = choice["train"]  # what TRL does with a set given to `evaluate` later
        if self.ref_model is None and not (all(choice.values()) and not self._streams):
            if not isinstance(self.model, PeftModel):
                self.ref_model = self.load_start()  # type: ignore[attr-defined]

    def reference_logps(self, inputs: dict[str, Any]) -> Tensor:
        """Reference log-probs (N,) of a batch: its columns, else the frozen model or the adapter switched off."""
        if self.reference_columns[0] in inputs:
            known = self.columns_of(inputs)
            if not self._streams or known.isfinite().all():
                return known
        model = self.ref_model if self.ref_model is not None else self.model
        return self.frozen_logps(model, self.referred(inputs["groups"]), self.reference_adapter)  # type: ignore[attr-defined]

    def referred(self, groups: PromptGroups) -> PromptGroups:
        """The completions that the reference scores: of a pair the two, and not RPO's base response."""
        return groups.first(2)

    def with_references(self, dataset: Any, name: str) -> Any:
        """The data set with its reference log-probs as columns, looked up or scored now."""
        if self.reference_columns[0] in next(iter(dataset)):
            return dataset
        # A stream is only looked up, so that the model need not be able to score yet.
        start = self.model if isinstance(dataset, IterableDataset) else self.start_for_scoring()  # type: ignore[attr-defined]
        model = self.ref_model if self.ref_model is not None else start
        return self.with_logps(dataset, name, model, self.reference_adapter, self.reference_columns)  # type: ignore[attr-defined]

    def with_logps(
        self, dataset: Any, name: str, model: nn.Module, adapter: str | None, columns: tuple[str, ...]
    ) -> Any:
        """The data set with log-probs under a frozen model as columns, from the cache, which is filled first.

        A stream is looked up row by row as it comes, NaN where the cache lacks one.
        """
        cache = self._cache(model, adapter, dataset)
        if isinstance(dataset, IterableDataset):
            return self._looked_up(dataset, name, cache, columns)
        report = score_ahead(
            cache,
            _token_ids(dataset),
            self._groups_of,
            lambda groups: self.frozen_logps(model, groups, adapter),  # type: ignore[attr-defined]
            tokens_per_batch=self.args.tokens_per_batch or AHEAD_TOKENS,
            description=f"Scoring {name} under the frozen model",
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            together=fail_together,
            agree=lambda jobs: broadcast_object_list([jobs])[0],
            even=self.accelerator.distributed_type in SHARDED,
            disable=self.args.disable_tqdm,
        )
        self.reference_reports[name] = self.reference_reports.get(name, Report(0, 0, 0.0)) + report
        logger.info(
            "%s: %d log-probs found in the cache, %d computed (%.1f s).",
            name, report.found, report.computed, report.seconds,
        )  # fmt: skip
        own = look_up_rows(cache, _token_ids(dataset), self._groups_of)
        # Hosts may keep caches of their own: each gets from the others what its own lacks.
        logps = lowest_of_all(own, self.accelerator.device)
        if np.isnan(logps).any():
            raise UserError(
                f"{int(np.isnan(logps).sum())} log-probs of {name} are not in {cache.folder} although they were just "
                "computed: set reference_cache_dir to another folder"
            )
        if np.isnan(own).any():
            keep_rows(cache, _token_ids(dataset), self._groups_of, logps)
        return self.add_logps(dataset, logps, columns)

    def add_logps(self, dataset: Dataset, logps: np.ndarray, columns: tuple[str, ...]) -> Dataset:
        """Log-probs (N,) of a data set's completions as columns of its rows."""
        for column, values in zip(columns, logps.reshape(len(dataset), -1).T, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def columns_of(self, inputs: dict[str, Any]) -> Tensor:
        """Reference log-probs (N,) from the columns of a batch."""
        return torch.stack([inputs[column].float() for column in self.reference_columns], dim=1).flatten()

    def _looked_up(
        self, stream: IterableDataset, name: str, cache: ReferenceCache, columns: tuple[str, ...]
    ) -> IterableDataset:
        """A stream whose rows look their log-probs up as they come; a batch that lacks one is scored on the fly."""

        def look_up(row: dict[str, Any]) -> dict[str, Any]:
            logps = cache.lookup(self._groups_of([row])).tolist()
            return dict(zip(columns, logps if len(columns) > 1 else [logps], strict=True))

        logger.info(
            "%s: a stream; its %s are looked up in the cache, and what is not there is scored.",
            name, " and ".join(columns),
        )  # fmt: skip
        return stream.map(look_up)

    def map_sets(self, function: Callable[[Any, str], Any]) -> None:
        """Replace the training set and every evaluation set by `function` of it and its name."""
        self.train_dataset = function(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: function(rows, name) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = function(self.eval_dataset, "eval")

    def _ahead(self, name: str, dataset: Any, wanted: bool | None) -> bool:
        """Whether a set's log-probs are looked up; said where it was left open."""
        if self.reference_columns[0] in next(iter(dataset)):
            return True
        sharded = self.accelerator.distributed_type in SHARDED
        if isinstance(dataset, IterableDataset):
            return wanted is not False and not sharded  # ranks could not agree on what is missing from a batch
        if wanted is not None or sharded or batch_dependent(self.model.config):
            return bool(wanted)
        rows, visits = len(dataset), self._visits(len(dataset)) if name == "train" else 2 * len(dataset)
        cache = self._cache(self.ref_model or self.model, self.reference_adapter, dataset)  # type: ignore[attr-defined]
        logps = look_up_rows(cache, _token_ids(dataset), self._groups_of)
        missing = round(float(np.isnan(logps).mean()) * rows)
        # At equal cost a second model is worth avoiding; an adapter that is switched off takes no memory.
        ahead = missing <= visits if not isinstance(self.model, PeftModel) else missing < visits
        logger.info(
            "References of %s: %s (%d rows to score ahead of training, %d during it).",
            name, "looked up" if ahead else "scored during training", missing, visits,
        )  # fmt: skip
        return ahead

    def _visits(self, rows: int) -> int:
        """Rows that training scores in all."""
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * step if args.max_steps > 0 else int(args.num_train_epochs * rows)

    def _remembered(self) -> dict[str, bool]:
        """What an interrupted run in this output folder chose."""
        kept = Path(self.args.output_dir) / CHOICE_FILE
        interrupted = kept.is_file() and get_last_checkpoint(self.args.output_dir) is not None
        return json.loads(kept.read_text()) if interrupted else {}

    def _cache(self, model: nn.Module, adapter: str | None, dataset: Any) -> ReferenceCache:
        """The cache of a frozen model's log-probs, as this run would compute them."""
        if not self._layout_checked:  # type: ignore[attr-defined]
            first = self._groups_of(list(islice(_token_ids(dataset), CHECKED_ROWS)))
            self.frozen_logps(model, short_groups(first, CHECKED_GROUPS), adapter)  # type: ignore[attr-defined]
        unwrapped = self.accelerator.unwrap_model(model)
        known = (id(unwrapped), adapter)
        if known not in self._digests:
            self._digests[known] = weights_digest(unwrapped, adapter, gather=_whole)
        key = ScoreKey(
            weights=self._digests[known],
            dtype=str(unwrapped.dtype),
            autocast=self.accelerator.mixed_precision,
            scoring=f"{self.scorer.kind}, {unwrapped.config._attn_implementation}",
            max_length=self.args.max_length,
        )
        return ReferenceCache(cache_root(self.args.reference_cache_dir), key)

    def _groups_of(self, rows: list[dict[str, Any]]) -> PromptGroups:
        return self.referred(self.data_collator.groups(rows))  # type: ignore[attr-defined]


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """A parameter that ZeRO-3 has sharded, gathered for a moment."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _token_ids(dataset: Any) -> Any:
    """A data set's rows without what no score depends on."""
    names = list(next(iter(dataset)))
    return dataset.select_columns([name for name in names if name == "row_id" or name.endswith("_ids")])
