"""Mirror descent policy optimisation on sampled completions."""

import math
from typing import Any

import torch
from torch import Tensor

from llmalign import losses
from llmalign.losses.policy_gradient import MAX_LOG_RATIO
from llmalign.trainers._trl import SampledBase
from llmalign.trainers.rollouts import Rollout
from llmalign.types import RolloutScores

ROUNDING = 1e-6  # a deviation of rewards below this share of their size is float32's, and teaches nothing


class MDPOTrainer(SampledBase):
    """Maximises the advantage less a divergence from the sampler, `KL(pi || pi_k) / t_k` (arXiv 2005.09814).

    The reward is `r - beta (log pi_k - log ref)`; its advantage is against the other completions of the prompt, divided
    by the deviation over the whole rollout of all ranks. `t_k` falls linearly over the run to `step_size_floor`.
    """

    _name = "MDPO"
    _tag_names = ["llmalign", "mdpo"]

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        self.needs_reference = args.beta > 0
        super().__init__(model, reward_funcs, args, **kwargs)

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """Standardised leave-one-out advantages (P, K); 0 where all rewards of the rollout are equal to rounding."""
        present = scores.mask.double()
        rewards = scores.rewards.double() - self.args.beta * (scores.proposal - scores.reference).double()
        count = present.sum(1, keepdim=True)
        centred = (rewards - (rewards * present).sum(1, keepdim=True) / count.clamp(min=1)) * present
        # The mean of the others is (k mean - r) / (k - 1), so r less it is k / (k - 1) times r less the mean.
        advantages = torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0)
        sums = [present.sum(), advantages.square().sum(), (rewards.abs() * present).sum()]
        rows, squares, size = self.over_ranks(torch.stack(sums)).tolist()
        deviation = math.sqrt(squares / max(rows, 1))
        if deviation <= ROUNDING * max(1.0, size / max(rows, 1)):
            return {"advantages": torch.zeros_like(scores.policy)}
        return {"advantages": (advantages / deviation).to(scores.policy)}

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """`losses.mdpo` of every completion at the current step size."""
        flat = losses.mdpo(
            scores.policy.flatten(), scores.proposal.flatten(), rollout["advantages"].flatten(), self.step_size
        )
        return flat.view(scores.policy.shape)

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """The distance from the sampler, `w log w - w + 1` of the ratios w, and the step size."""
        log_ratio = (scores.policy - scores.proposal).detach()
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        weight = scores.mask.float()
        return {
            "kl_to_sampler": (ratio * log_ratio - ratio + 1, weight),
            "ratio": (ratio, weight),
            "step_size": (torch.full_like(weight, self.step_size), weight),
        }

    @property
    def step_size(self) -> float:
        """t_k of the rollout at hand."""
        passes = self.args.num_iterations * self.args.steps_per_generation
        rollouts = max(-(-self.state.max_steps * self.args.gradient_accumulation_steps // passes), 1)
        return losses.annealed_step_size(
            min(self._step // passes, rollouts - 1),
            rollouts,
            start=self.args.step_size,
            floor=self.args.step_size_floor,
        )
