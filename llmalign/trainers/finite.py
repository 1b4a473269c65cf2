"""What happens to an optimizer step whose loss or gradient is not finite: the run stops, or the step is left out."""

import json
import logging
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer

from llmalign.errors import UserError
from llmalign.processes import from_all_processes
from llmalign.trainers.running_out import where_to_go_on
from llmalign.trainers.step_rows import named, rows_of
from llmalign.trainers.validation import STOP, ChosenHardware

logger = logging.getLogger(__name__)

FOLDER = "non_finite"
SKIPPED = "non_finite/skipped"
STATE = "FiniteSteps"  # where trainer_state.json keeps the counts
MOST_IN_A_ROW = 10
SHOWN_PARAMETERS = 5

Group = list[tuple[str, nn.Parameter]]


class FiniteStepsMixin(Trainer):
    """Looks at the losses and the gradient of every optimizer step before the weights change (`args.non_finite`).

    Where one is NaN or infinite on any rank, all ranks stop in that step or, with `skip`, leave it out: weights and
    optimizer stay as they were, the step counts, the learning rate's schedule goes on, and `non_finite/skipped` is
    logged; `MOST_IN_A_ROW` such steps in a row stop the run, too. The step's rows are written to
    `<output_dir>/non_finite/step-<n>.jsonl`. A gradient that fp16 has scaled too high is left to its scaler, which
    skips such steps itself. DeepSpeed's engines (ZeRO) leave a step out by themselves where the gradient is not finite,
    so the rank that has the loss makes its gradient so. Not covered: optimizers that step within the backward pass,
    DeepSpeed without ZeRO, whose weights have changed when it is seen.
    """

    _step_losses: list[tuple[Mapping[str, Any], Tensor]]
    #: of the groups of this step, before they are clipped
    gradient_norms: list[Tensor]
    _loss_before: Tensor
    _logged_at = 0
    _skipped_since_log = 0
    _skipped_now = 0
    _schedule_is_due = False

    def gradient_groups(self, model: nn.Module) -> list[Group]:
        """Named parameters that are trained, in groups that are clipped apart; the first group's norm is logged."""
        return [list(model.named_parameters())]

    def watched(self, loss: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Keep the loss of a training micro-batch until the step is due, and return what is differentiated.

        Without `inputs` it takes the place of the one that was kept last, which a subclass has replaced.
        """
        if not (self.is_in_train and self.model.training):
            return loss
        given = self._step_losses.pop()[0] if inputs is None else inputs
        self._step_losses.append((given, loss.detach()))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """See Trainer; a step begins."""
        self._step_losses, self.gradient_norms = [], []
        self._loss_before = self._tr_loss.clone()
        self._logged_at = self._globalstep_last_logged
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See Trainer; the loss is looked at when the step is due, without waiting for the device now."""
        given = dict(inputs)  # what is added to it while scores are computed may hold the whole graph
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return self.watched(result[0], given), *result[1:]
        return self.watched(result, given)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._measure_gradients(model) if self._whole_gradients else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer calls it in every step, on all ranks, last before the optimizer's."""
        if grad_norm is None and self._whole_gradients:
            grad_norm = self._measure_gradients(model)
        norm = super()._get_grad_norm(model, grad_norm)
        loss, gradient = self._not_finite(norm)
        if loss or gradient:
            self._stop_or_skip(model, "loss" if loss else "gradient")
        else:
            counts = self.state.stateful_callbacks.get(STATE)
            if counts:
                counts["in_a_row"] = 0
            self._clip_as_measured(model)
        return norm

    @property
    def _whole_gradients(self) -> bool:
        """Whether every rank holds the whole gradient, so that it can be measured first and clipped afterwards."""
        sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        first = next(self.model.parameters(), None)
        return self.accelerator.distributed_type not in sharded and not isinstance(first, DTensor)

    def _measure_gradients(self, model: nn.Module) -> Tensor:
        """The first group's norm; gradients stay as they are, because clipping makes NaN of all where one is."""
        self.accelerator.unscale_gradients()
        groups = self.gradient_groups(model)
        self.gradient_norms = [
            get_total_norm([own.grad for _, own in group if own.grad is not None]) for group in groups
        ]
        return self.gradient_norms[0]

    def _clip_as_measured(self, model: nn.Module) -> None:
        """As `torch.nn.utils.clip_grad_norm_` does in one go."""
        if self.args.max_grad_norm > 0 and self.gradient_norms:
            for group, norm in zip(self.gradient_groups(model), self.gradient_norms, strict=True):
                clip_grads_with_norm_([own for _, own in group], self.args.max_grad_norm, norm)

    def _not_finite(self, norm: Any) -> tuple[bool, bool]:
        """Whether a loss of the step, or its gradient, is not finite on any rank; one wait for the device."""
        device = self.accelerator.device
        losses = torch.stack([loss.float() for _, loss in self._step_losses])
        if self.accelerator.mixed_precision == "fp16":
            norms = torch.zeros(1, device=device)
        elif self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            left_out = self.accelerator.optimizer_step_was_skipped or not math.isfinite(norm)
            norms = torch.full((1,), math.nan if left_out else 0.0, device=device)
        else:
            norms = torch.stack([_plain_tensor(own).float().to(device) for own in self.gradient_norms or [norm]])
        flags = (~torch.stack([losses.isfinite().all(), norms.isfinite().all()])).float()
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        loss, gradient = flags.tolist()
        return loss > 0, gradient > 0

    def _stop_or_skip(self, model: nn.Module, what: str) -> None:
        """Write down the step's rows; then stop, or see to it that the optimizer finds nothing to do."""
        step = self.state.global_step + 1
        names = self._bad_gradients(model)
        rows = list(chain(*from_all_processes(self._rows_of_step(step, what, names))))
        path = Path(self.args.output_dir) / FOLDER / f"step-{step}.jsonl"
        if self.args.should_save:
            _write(path, rows)
        guilty = [row for row in rows if isinstance(row["loss"], str)] or rows
        where = f" (first of {names[0]})" if names and what == "gradient" else ""
        fault = f"The {what} of step {step} is not finite{where}: {named(guilty)}; all rows of the step are in {path}."
        sharded = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if sharded and not self.accelerator.optimizer_step_was_skipped:
            raise UserError(f"{fault} DeepSpeed took the step all the same; {where_to_go_on(self.args.output_dir)}.")
        if self._on_bad == STOP:
            precision = ", use bf16 in place of fp16" if self.args.fp16 else ""
            raise UserError(
                f"{fault} The run stops before the weights change: look at these rows, lower learning_rate{precision}, "
                f"or leave such steps out by non_finite: skip; {where_to_go_on(self.args.output_dir)}."
            )
        self._skip_step(step, fault)

    @property
    def _on_bad(self) -> str:
        return self.args.non_finite if isinstance(self.args, ChosenHardware) else STOP

    def _skip_step(self, step: int, fault: str) -> None:
        counts = self.state.stateful_callbacks.setdefault(STATE, {"skipped": 0, "in_a_row": 0})
        counts["skipped"] += 1
        counts["in_a_row"] += 1
        self._skipped_since_log += 1
        self._skipped_now += 1
        logger.warning("%s It is left out (%d so far).", fault, counts["skipped"])
        if counts["in_a_row"] >= MOST_IN_A_ROW:
            raise UserError(
                f"{fault} It is the {MOST_IN_A_ROW}th step in a row that had to be left out, so the run stops: lower "
                f"learning_rate or look at these rows; {where_to_go_on(self.args.output_dir)}."
            )
        self.optimizer.zero_grad(set_to_none=True)  # an optimizer passes over weights without a gradient
        self._tr_loss.copy_(self._loss_before)
        # Where an engine left the step out, Trainer leaves the schedule where it is.
        self._schedule_is_due = self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._schedule_is_due:
            self._schedule_is_due = False
            schedule = self.lr_scheduler
            (schedule.scheduler if isinstance(schedule, AcceleratedScheduler) else schedule).step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _bad_gradients(self, model: nn.Module) -> list[str]:
        """Names of parameters whose gradients are not finite, where this rank holds whole ones."""
        if not self._whole_gradients:
            return []
        bad = [
            name.removeprefix("module.")
            for group in self.gradient_groups(model)
            for name, own in group
            if own.grad is not None and not bool(own.grad.isfinite().all())
        ]
        more = len(bad) - SHOWN_PARAMETERS
        return bad[:SHOWN_PARAMETERS] + ([f"and {more} more"] if more > 0 else [])

    def _rows_of_step(self, step: int, what: str, names: list[str]) -> list[dict[str, Any]]:
        """This rank's rows of the step, as they are written."""
        described = []
        for place, (inputs, loss) in enumerate(self._step_losses):
            value = float(loss)
            common = {
                "step": step, "non_finite": what, "process": self.accelerator.process_index, "micro_batch": place,
                "loss": value if math.isfinite(value) else str(value), "gradients": names,
            }  # fmt: skip
            described += [common | row for row in self.rows_in_words(inputs)]
        return described

    def rows_in_words(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """`row` (its number) and content of each row of a micro-batch."""
        return rows_of(inputs, self.processing_class, self.train_dataset, self.args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See Trainer; steps that were left out have no part in the mean loss, and are counted under `skip`."""
        if self._on_bad != STOP and ("loss" in logs or "train_loss" in logs):
            logs[SKIPPED] = self.state.stateful_callbacks.get(STATE, {}).get("skipped", 0)
        if "loss" in logs:
            logs["loss"] *= _share(self.state.global_step - self._logged_at, self._skipped_since_log)
            self._skipped_since_log = 0
        if "train_loss" in logs:
            logs["train_loss"] *= _share(self.state.global_step - self._initial_global_step, self._skipped_now)
        super().log(logs, start_time)


def _share(steps: int, skipped: int) -> float:
    """What turns a mean over all steps into one over those that were taken; NaN where there is none."""
    if not skipped:
        return 1.0
    return steps / (steps - skipped) if steps > skipped else math.nan


def _plain_tensor(norm: Any) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row. A full disk is no reason to lose the sentence that says what happened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        logger.warning("%s could not be written (%s).", path, error.strerror)
