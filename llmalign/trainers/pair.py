"""The part that every score-based trainer shares, whatever the modality: loss, metrics, evaluation, start check."""

import logging
from collections.abc import Mapping, Sized
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from llmalign.errors import UserError
from llmalign.scores.rounding import rounded_limit
from llmalign.types import GroupScores, PairScores

logger = logging.getLogger(__name__)

START_TOLERANCE = 1e-4  # nats per sequence, float32
FILLER = "filler"  # in a batch: (B,) bool, true where a row is repeated only to fill the batch and counts for nothing


class RowMetrics:
    """Per-row values gathered over batches and ranks, so that a mean weighs every row the same.

    `unique=True` counts a row once however often the sampler repeated it to fill the last batch of a rank.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {}

    def add(self, row_ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Keep one (B,) value per metric, all with the same row ids (B,); stays on the device until it is asked."""
        self._rows.append(row_ids.detach())
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def means(
        self, accelerator: Accelerator, *, unique: bool, optional: frozenset[str] = frozenset()
    ) -> dict[str, float]:
        """Reduce to one mean per metric over all ranks, add the number of `rows`, and forget them.

        In an `optional` metric NaN says that a row has no value: it is left out, and so is a metric without any
        value. Everywhere else NaN is a fault and shows in the mean.
        """
        own: dict[str, Any] = {name: torch.cat(chunks).cpu().numpy() for name, chunks in self._values.items()}
        rows = torch.cat(self._rows).cpu().numpy() if self._rows else np.zeros(0, dtype=np.int64)
        self._rows, self._values = [], {}
        parts = gather_object([(rows, own)]) if accelerator.num_processes > 1 else [(rows, own)]
        row_ids = np.concatenate([part[0] for part in parts])
        keep = np.unique(row_ids, return_index=True)[1] if unique else np.arange(len(row_ids))
        means = {"rows": float(len(keep))}
        for name in own:
            values = np.concatenate([part[1][name] for part in parts])[keep]
            if name in optional:
                values = values[~np.isnan(values)]
            if len(values):
                means[name] = float(values.mean())
        return means


class PairTrainerMixin:
    """Adds to a `transformers.Trainer` a loss that is a pure function of scores; placed before it in the MRO.

    A subclass gives `scores` (from the model and a batch whose `row_id` is (B,)), `loss_terms` (named (B,) tensors
    whose sum is minimised) and `row_metrics`. The loss of an optimizer step is the sum over its rows divided by the
    rows of the whole step on all ranks, so that accumulation and data parallelism equal one large batch.
    Not covered: `compute_metrics` on logits, which no batch here ever holds.
    """

    accelerator: Accelerator
    args: Any
    train_dataset: Any
    loss_is_scaled_for_ga = True
    #: why the first batch may differ from the model that training starts from; None: it must not
    start_may_differ: str | None = None
    #: how far apart policy and start may be, in units of the scores
    start_tolerance = START_TOLERANCE
    #: what scores are counted in, after a number
    score_unit = " nats"
    #: metrics in which NaN says that a row has no value
    optional_metrics = frozenset({"rewards/accuracies_length_matched"})

    _start_checked = False

    @cached_property
    def _train_rows(self) -> RowMetrics:
        return RowMetrics()

    @cached_property
    def _eval_rows(self) -> RowMetrics:
        return RowMetrics()

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores | GroupScores:
        """Scores of a batch, policy with gradients, everything else without."""
        raise NotImplementedError

    def loss_terms(self, scores: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Named terms (B,) of the loss; their sum is minimised and, where there are several, each is logged."""
        raise NotImplementedError

    def row_metrics(self, scores: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Values to log, (B,) each; the default serves pairs."""
        return self._pair_metrics(scores, inputs)

    def start_gap(self, scores: Any) -> Tensor:
        """Absolute distance in nats (any shape) between the policy and the model that training starts from."""
        return torch.stack(
            [(scores.chosen - scores.ref_chosen).abs(), (scores.rejected - scores.ref_rejected).abs()]
        ).detach()

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """Largest change (nats) of a score when the batch is split, the measure of a low precision's own noise."""
        raise NotImplementedError

    @property
    def reward_scale(self) -> float:
        """Factor from log-ratios to implicit rewards (beta, or tau where the loss has no beta)."""
        raise NotImplementedError

    def _pair_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Implicit rewards, which text and images have alike."""
        chosen = scores.chosen - scores.ref_chosen
        rejected = scores.rejected - scores.ref_rejected
        accuracies = share_first(chosen, rejected)
        metrics = {
            "rewards/chosen": self.reward_scale * chosen,
            "rewards/rejected": self.reward_scale * rejected,
            "rewards/margins": self.reward_scale * (chosen - rejected),
            "rewards/accuracies": accuracies,
        }
        if "flipped" in inputs:
            metrics["rewards/accuracies_clean"] = torch.where(inputs["flipped"], 1 - accuracies, accuracies)
        return metrics

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean loss of the batch, or its share of the whole optimizer step where its row count is given."""
        if return_outputs:
            raise ValueError("this trainer has no outputs besides its loss: the full logits are never built")
        scores = self.scores(model, inputs)
        terms = self.loss_terms(scores, inputs)
        losses = torch.stack(list(terms.values())).sum(dim=0)
        training = model.training
        if training and not self._start_checked:
            self._check_start(model, inputs, scores)
        values = self.row_metrics(scores, inputs)
        if len(terms) > 1:
            values |= {f"loss/{name}": term for name, term in terms.items()}
        if training and FILLER in inputs:
            counted = ~inputs[FILLER]
            losses, values = losses[counted], {name: value[counted] for name, value in values.items()}
            self._train_rows.add(inputs["row_id"][counted], values)
        elif training:
            self._train_rows.add(inputs["row_id"], values)
        else:
            self._eval_rows.add(inputs["row_id"], values | {"loss": losses})
        if num_items_in_batch is None:
            return losses.mean()
        # Data parallelism averages gradients over ranks; the factor turns that average back into a sum.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Take the micro-batches of one optimizer step, mark fillers and count the other rows over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        rows = sum(len(batch["row_id"]) for batch in batches)
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            for batch, marks in zip(batches, self.fillers(batches), strict=True):
                if any(marks):
                    batch[FILLER] = torch.tensor(marks, device=batch["row_id"].device)
                    rows -= sum(marks)
        total = self.accelerator.reduce(torch.tensor(rows, device=self.accelerator.device), "sum")
        return batches, (total if batches else None)

    def fillers(self, batches: list[dict[str, Any]]) -> list[list[bool]]:
        """For each micro-batch of an epoch's last step, which rows were repeated to give every rank as many.

        accelerate deals rows out rank by rank, round by round, and fills up the last round alone. Fillers have weight
        0, so that the step is the same for any number of processes. Not covered: a stream, whose length nobody knows.
        """
        marks = [[False] * len(batch["row_id"]) for batch in batches]
        ranks = self.accelerator.num_processes
        if ranks > 1 and isinstance(self.train_dataset, Sized) and not self.args.dataloader_drop_last:
            size = len(marks[-1])
            rest = len(self.train_dataset) % (size * ranks) or size * ranks
            first = size * self.accelerator.process_index
            marks[-1] = [place >= rest for place in range(first, first + size)]
        return marks

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list | None = None
    ) -> tuple[Tensor, None, None]:
        """Loss of an evaluation batch; its rows' metrics are kept until the end of the evaluation."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run the evaluation, then replace its batch means by means over rows, each row counted once."""
        self._eval_rows = RowMetrics()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        means = self._eval_rows.means(self.accelerator, unique=True, optional=self.optional_metrics)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all rows since the last log to a training log."""
        if "loss" in logs:
            means = self._train_rows.means(self.accelerator, unique=False, optional=self.optional_metrics)
            logs.update({name: value for name, value in means.items() if name != "rows"})
        super().log(logs, start_time)  # type: ignore[misc]

    def _check_start(self, model: nn.Module, inputs: dict[str, Any], scores: Any) -> None:
        """Stop a fresh run whose first batch scores differently under the policy and the model it started from."""
        self._start_checked = True
        accelerator = self.accelerator
        gap = float(accelerator.gather(self.start_gap(scores).max().reshape(1)).max())
        step = self.state.global_step  # type: ignore[attr-defined]
        excuse = f"resumed at step {step}" if step > 0 else self.start_may_differ
        if excuse is not None:
            words = "Start check: the policy is %.2e%s from the model it is compared with (%s)."
            logger.info(words, gap, self.score_unit, excuse)
            return
        exact = accelerator.mixed_precision == "no" and next(model.parameters()).dtype == torch.float32
        own = [_largest(scores), 0.0 if exact else self.split_gap(model, inputs)]
        over_ranks = accelerator.gather(torch.tensor([own], dtype=torch.float64, device=accelerator.device))
        largest, noise = over_ranks.amax(dim=0).tolist()
        limit = max(rounded_limit(self.start_tolerance, largest), 2 * noise)
        if not gap <= limit:
            raise UserError(
                f"On the first batch the policy scores a response {gap:.3g}{self.score_unit} away from the model it "
                f"started from (limit {limit:.3g}), so the loss would not start where the method says: the reference "
                "is another model, an adapter does not start at zero, or dropout is on; name another reference "
                "explicitly (ref_model_name_or_path) if it is meant."
            )
        words = "Start check passed: policy and start differ by %.2e%s (limit %.2e)."
        logger.info(words, gap, self.score_unit, limit)


def _largest(scores: PairScores | GroupScores) -> float:
    """The policy's largest score, without its sign."""
    policy = scores.policy if isinstance(scores, GroupScores) else torch.stack([scores.chosen, scores.rejected])
    return float(policy.detach().abs().max())


def share_first(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first is larger, one half where they are equal, so that an untrained policy scores 0.5."""
    return (first > second).float() + 0.5 * (first == second).float()
