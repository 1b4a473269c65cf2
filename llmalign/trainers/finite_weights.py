"""Weights that are not finite are neither saved, measured nor sampled from."""

import math
from itertools import chain
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from llmalign.errors import UserError
from llmalign.processes import from_all_processes
from llmalign.trainers.finite import FiniteStepsMixin
from llmalign.trainers.running_out import where_to_go_on


class FiniteWeightsMixin(FiniteStepsMixin):
    """Looks at the weights that are trained wherever something is made of them.

    An optimizer can make NaN of a finite gradient (0 / 0 with `adam_epsilon: 0`) or step beyond what the dtype holds,
    which the next step's loss would show; a checkpoint that is saved before it would look whole. Not covered: frozen
    weights, and the image trainers' pictures, whose next loss shows it.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See Trainer. Raises UserError where the last step leaves weights that are not finite."""
        result = super().train(*args, **kwargs)
        self.require_finite_weights()
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See Trainer. Raises UserError where weights are not finite."""
        self.require_finite_weights()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_weights()
        super()._save_checkpoint(model, trial)

    def require_finite_weights(self) -> None:
        """Raise UserError, on all ranks alike, where a trained weight is NaN or infinite on any; all ranks call it."""
        named = {
            name: own
            for name, weight in chain(*self.gradient_groups(self.model))
            if weight.requires_grad and (own := self._own_part(weight)).numel()
        }
        largest = get_total_norm(list(named.values()), norm_type=math.inf)
        flag = (~torch.as_tensor(largest, device=self.accelerator.device).isfinite()).float()
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag, "sum")
        if not flag:
            return
        bad = next((name for name, own in named.items() if not bool(own.isfinite().all())), None)
        first = next(name for name in from_all_processes(bad) if name is not None)
        step = self.state.global_step
        if not step:
            raise UserError(f"The model has weights that are not finite (first of {first}): take another one.")
        raise UserError(
            f"Step {step} left weights that are not finite (first of {first}), although its loss and gradient were: "
            f"lower learning_rate, or raise adam_epsilon; {where_to_go_on(self.args.output_dir)}."
        )

    def _own_part(self, weight: Any) -> Tensor:
        """What this rank holds of a weight."""
        if isinstance(weight, DTensor):
            local: Tensor = weight.to_local().detach()
            return local
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self._is_zero3:
            part: Tensor = weight.ds_tensor
            return part
        whole: Tensor = weight.detach()
        return whole

    @property
    def _is_zero3(self) -> bool:
        return self.accelerator.state.deepspeed_plugin.zero_stage == 3
