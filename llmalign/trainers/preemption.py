"""A run that SIGTERM interrupts saves a checkpoint at the end of its step, on all processes together."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.sigterm import Preempted, Watch, watch
from llmalign.trainers.checkpoint import SafeCheckpointMixin

LONGEST = timedelta(days=1)  # what one process does alone between two steps


class PreemptionMixin(SafeCheckpointMixin):
    """Lets a trainer save itself and stop when SIGTERM comes in `saving_on_sigterm`; without that nothing changes.

    transformers' own `enable_jit_checkpoint` is not used: it saves in the middle of a step, each process for itself,
    and into a folder that looks like a checkpoint before it is one.
    """

    _agreement: "Agreement | None" = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does. Raises Preempted where SIGTERM came and this may be interrupted."""
        looking_out = watch()
        if looking_out is None:
            return super().train(*args, **kwargs)
        self._agreement = Agreement(looking_out, self.args.world_size)
        try:
            result = super().train(*args, **kwargs)
            if self._agreement.end() and self.saved_step == self.state.global_step:
                raise Preempted(self._checkpoint())
            return result
        except Preempted:
            self._agreement.end()
            self._close_trackers()
            raise
        finally:
            looking_out.training = False
            self._agreement = None

    def _run_epoch(self, **options: Any) -> None:
        if self._agreement is not None:
            self._agreement.begin()
        super()._run_epoch(**options)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self._agreement is None or not self._agreement.reached():
            return
        if self.saved_step != self.state.global_step:
            kept, self.args.save_only_model = self.args.save_only_model, False  # training cannot go on from weights
            try:
                self._save_checkpoint(model, trial)
            finally:
                self.args.save_only_model = kept
        raise Preempted(self._checkpoint())

    def _checkpoint(self) -> Path:
        return Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _close_trackers(self) -> None:
        """Let the progress bar and the trackers end; other callbacks measure, for which there is no time."""
        self.is_in_train = False
        for callback in self.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers."):
                callback.on_train_end(self.args, self.state, self.control, model=self.model)


class Agreement:
    """What the processes of a run decide together about a signal that any of them may have got.

    Each step's answer is gathered while the next one is computed, by a group of its own over the CPUs, so that neither
    a GPU nor a process waits for it. One process asks nobody.
    """

    def __init__(self, looking_out: Watch, processes: int) -> None:
        self._watch = looking_out
        self._group: Any = None
        if processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST)
        self._asked: tuple[Tensor, Any] | None = None
        self._open = True

    def begin(self) -> None:
        """An epoch begins; where the signal came before the first one, all processes end here."""
        if not self._watch.training:
            self._watch.training = True
            if self.reached() or self.reached():  # the second has the answer to what the first asked
                raise Preempted(None)

    def reached(self) -> bool:
        """Whether to save and stop here; all processes ask at the same places of their training."""
        if self._group is None:
            return self._watch.came
        answer = self._answer()
        came = torch.tensor([int(self._watch.came)])
        operation = torch.distributed.ReduceOp.MAX
        self._asked = came, torch.distributed.all_reduce(came, operation, group=self._group, async_op=True)
        return answer

    def end(self) -> bool:
        """Training is over on all processes: whether the signal came before. The second call does nothing more.

        Where one failed this is not called, for the others may never answer.
        """
        if self._group is None:
            return self._watch.came
        came = self._answer()
        if self._open:
            torch.distributed.destroy_process_group(self._group)
        self._open = False
        return came

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        (came, work), self._asked = self._asked, None
        work.wait()
        return bool(came)
