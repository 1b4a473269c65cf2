"""A frozen copy of the policy that completions are sampled from, replaced when the policy is nearer to the target."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmalign.errors import UserError
from llmalign.processes import fail_together
from llmalign.trainers._trl import SampledBase
from llmalign.trainers.rollouts import Rollout
from llmalign.types import RolloutScores

logger = logging.getLogger(__name__)

_ADAPTER = "proposal"
_FILE = "proposal.safetensors"


class OfflineProposalMixin(SampledBase):
    """Samples from a copy where `args.proposal` is `offline`, else from the policy; for trainers with a target.

    The copy is a whole model, or an adapter beside the one that is trained. Every `proposal_update_interval` steps it
    takes over the policy's weights if `KL(p || pi) < KL(p || q)`, estimated on the rollout at hand over all ranks.
    Checkpoints hold its weights. Evaluation samples from the policy. Raises UserError under DeepSpeed and FSDP, where
    the copy's weights lie in pieces.
    """

    model_wrapped: Any
    _copy: nn.Module | None = None
    _looked_at_step = 0

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)
        if not self._offline:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "proposal: offline keeps a whole copy of the policy, which DeepSpeed and FSDP do not; use online"
            )
        if isinstance(self.model, PeftModel):
            self.freeze_adapter(_ADAPTER)
        else:
            self._copy = self.freeze(copy.deepcopy(self.model))

    @property
    def _offline(self) -> bool:
        return bool(self.args.proposal == "offline")

    def _generate_and_score_completions(self, inputs: Any) -> Rollout:
        with self._sampling_from_copy() if self._offline and self.model.training else contextlib.nullcontext():
            return super()._generate_and_score_completions(inputs)

    def sampler_token_logps(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs (P, K, T) of fresh completions under what drew them."""
        return super().sampler_token_logps(
            self._copy if self._copy is not None and self.model.training else model, rollout
        )

    @contextlib.contextmanager
    def _sampling_from_copy(self) -> Iterator[None]:
        """Put the copy where TRL takes what it samples from."""
        if self._copy is None:
            with self.as_adapter(self.model, _ADAPTER):
                yield
            return
        policy, self.model_wrapped = self.model_wrapped, self._copy
        try:
            yield
        finally:
            self.model_wrapped = policy

    def policy_scores(self, rollout: Rollout, scores: RolloutScores) -> Tensor:
        """Log-probs (P, K) of a fresh rollout under the policy, without gradients; the sampler's where that is it."""
        if not (self._offline and self.model.training):
            return scores.proposal
        with self.as_adapter(self.model, "default") if self._copy is None else contextlib.nullcontext():
            token_policy = self.frozen_token_logps(self.model, rollout)
        return self._scores(rollout, token_policy).policy

    def look_at_proposal(self, rollout: Rollout, scores: RolloutScores, log_p: Tensor, kept: Tensor) -> None:
        """Replace the copy if it is time and the policy is nearer to the target; `log_p` is normalised, all (P, K)."""
        step = self.state.global_step
        if not self._offline or step - self._looked_at_step < self.args.proposal_update_interval:
            return
        self._looked_at_step = step
        gap = (scores.proposal - self.policy_scores(rollout, scores)).double()
        # KL(p | pi) - KL(p | q) = E_q[p/q log(q/pi)]; what p gives probability 0 adds nothing.
        weight = torch.where(kept, (log_p - scores.proposal).double().exp(), 0.0)
        total, count = self.over_ranks(torch.stack([(weight * gap).sum(), kept.double().sum()])).tolist()
        nearer = total < 0
        if nearer:
            for _, own, policy in self._parameters():
                own.data.copy_(policy.data)
        logger.info("Proposal at step %d: %s.", step, "replaced by the policy" if nearer else "kept")
        one = torch.ones((), dtype=torch.float64, device=self.accelerator.device)
        self.note({"proposal/kl_change": (one * total / max(count, 1), one), "proposal/replaced": (one * nearer, one)})

    def _parameters(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter of the copy, parameter of the policy."""
        policy = self.accelerator.unwrap_model(self.model)
        own = dict(policy.named_parameters())
        if self._copy is not None:
            return [(name, value, own[name]) for name, value in self._copy.named_parameters()]
        return [
            (name, value, own[name.replace(f".{_ADAPTER}.", ".default.")])
            for name, value in own.items()
            if f".{_ADAPTER}." in name
        ]

    def own_state(self) -> dict[str, Any]:
        """When the copy was looked at last; its weights are in a file of their own, once for all ranks."""
        return super().own_state() | {"looked_at_step": self._looked_at_step}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """When the copy was looked at last."""
        super().load_own_state(state)
        self._looked_at_step = state["looked_at_step"]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._offline and self.args.should_save:
            weights = {name: value.detach().cpu().contiguous() for name, value, _ in self._parameters()}
            save_file(weights, Path(output_dir) / _FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._offline:
            return
        file = Path(checkpoint) / _FILE
        missing = f"{file.parent} holds no {_FILE}, the weights that were sampled from; resume from another checkpoint"
        fail_together(None if file.is_file() else missing)
        weights = load_file(file)
        for name, value, _ in self._parameters():
            value.data.copy_(weights[name])
