"""Mirror descent policy optimisation on sampled completions."""

import torch
from torch import Tensor

from llmalign import losses
from llmalign.trainers._trl import SampledBase
from llmalign.trainers.rollouts import Rollout
from llmalign.types import RolloutScores


class MDPOTrainer(SampledBase):
    """Maximises the advantage less a divergence from the sampler, `KL(pi || pi_k) / t_k` (arXiv 2005.09814).

    The reward is `r - beta (log pi_k - log ref)`; its advantage is against the other completions of the prompt, divided
    by the deviation over the whole rollout of all ranks. `t_k` falls linearly over the run to `step_size_floor`.
    """

    _name = "MDPO"
    _tag_names = ["llmalign", "mdpo"]

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """Standardised leave-one-out advantages (P, K)."""
        present = scores.mask.float()
        rewards = (scores.rewards - self.args.beta * (scores.proposal - scores.reference)) * present
        others = (present.sum(1, keepdim=True) - 1).clamp(min=1)
        alone = present.sum(1, keepdim=True) < 2
        advantages = (rewards - (rewards.sum(1, keepdim=True) - rewards) / others) * present
        advantages = advantages.masked_fill(alone, 0.0)
        count, total, squares = self.over_ranks(
            torch.stack([present.sum(), advantages.sum(), advantages.square().sum()]).double()
        )
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return {"advantages": (advantages / (deviation + 1e-8).to(advantages)) * present}

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """`losses.mdpo` of every completion at the current step size."""
        flat = losses.mdpo(
            scores.policy.flatten(), scores.proposal.flatten(), rollout["advantages"].flatten(), self.step_size
        )
        return flat.view(scores.policy.shape)

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """The distance from the sampler, `w log w - w + 1` of the ratios w, and the step size."""
        log_ratio = (scores.policy - scores.proposal).detach()
        ratio = log_ratio.exp()
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
