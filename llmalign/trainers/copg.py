"""CoPG on rows of scored completions, and on completions that are sampled and scored as training goes."""

import logging
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from llmalign import losses
from llmalign.data.collators import GroupCollator
from llmalign.errors import UserError
from llmalign.trainers._trl import PairBase, SampledBase
from llmalign.trainers.configs import CoPGConfig
from llmalign.trainers.preparation import prepare_groups
from llmalign.trainers.replay import ReplayBuffer, joined
from llmalign.trainers.rollouts import Rollout
from llmalign.types import GroupScores, PromptGroups, RolloutScores

logger = logging.getLogger(__name__)


class CoPGTrainer(PairBase):
    """Contrastive policy gradient on k >= 2 completions a prompt with rewards; pairs are k = 2 (arXiv 2406.19185).

    Rewards are used as they are, or normalised as `args.normalize_rewards` says; a `dataset` normalisation takes its
    mean and deviation from the training set and uses them for evaluation too. Not covered: streams with `dataset`.
    """

    prepare = staticmethod(prepare_groups)
    collator = GroupCollator
    optional_metrics = frozenset({"rewards/accuracies", "residual"})
    reference_columns = ("ref_logps",)
    _name = "CoPG"
    _tag_names = ["llmalign", "copg"]

    def __init__(self, model: Any, ref_model: Any = None, args: CoPGConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, **kwargs)
        self.reward_mean, self.reward_std = 0.0, 1.0
        if self.args.normalize_rewards == "dataset":
            if not isinstance(self.train_dataset, Dataset):
                raise UserError("normalize_rewards: dataset cannot read a stream to its end; use group or none")
            rewards = torch.tensor([r for row in self.train_dataset["rewards"] for r in row], dtype=torch.float64)
            if rewards.std() == 0:
                raise UserError("all rewards are equal, so there is nothing to learn and nothing to normalise")
            self.reward_mean, self.reward_std = rewards.mean().item(), rewards.std().item()
            logger.info("Rewards are normalised with mean %.4g, deviation %.4g.", self.reward_mean, self.reward_std)

    def referred(self, groups: PromptGroups) -> PromptGroups:
        """The reference scores every completion."""
        return groups

    def add_logps(self, dataset: Dataset, logps: np.ndarray, columns: tuple[str, ...]) -> Dataset:
        """Log-probs (N,) as a list a row."""
        counts = [len(ids) for ids in dataset["completion_ids"]]
        return dataset.add_column(columns[0], [part.tolist() for part in np.split(logps, np.cumsum(counts)[:-1])])

    def columns_of(self, inputs: dict[str, Any]) -> Tensor:
        """The lists, end to end."""
        return inputs["ref_logps"].float()[inputs["group_mask"]]

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> GroupScores:  # type: ignore[override]
        """Policy and reference log-probs (P, K), 0 where a row has fewer completions than the batch's largest."""
        mask = inputs["group_mask"].bool()
        policy = self.policy_logps(model, inputs["groups"])
        reference = self.reference_logps(inputs)
        zeros = policy.new_zeros(mask.shape)
        return GroupScores(
            policy=zeros.masked_scatter(mask, policy),
            reference=zeros.masked_scatter(mask, reference),
            rewards=self._normalised(inputs["rewards"].float(), mask),
            mask=mask,
        )

    def loss_terms(self, scores: GroupScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The grouped loss, one term."""
        return {"copg": losses.copg(scores, beta=self.args.beta)}

    def row_metrics(self, scores: GroupScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Pairwise residual |dR - beta drho|, order accuracy, and drift from the reference, per prompt.

        `residual` reaches 0 at the optimum (NaN, and left out of the mean, for a row with one completion, whose loss is
        0); `rewards/accuracies` is the share of unequal pairs that the implicit
        reward orders as the reward does (NaN, and left out of the mean, where all rewards of a row are equal).
        """
        return group_metrics(scores, inputs["rewards"].float(), self.args.beta)

    def start_gap(self, scores: GroupScores) -> Tensor:
        """Every completion of the batch is compared with the reference."""
        return (scores.policy - scores.reference).abs().detach()

    @property
    def reward_scale(self) -> float:
        """beta."""
        return self.args.beta

    def _normalised(self, rewards: Tensor, mask: Tensor) -> Tensor:
        if self.args.normalize_rewards == "group":
            return normalised(rewards, mask)
        return torch.where(mask, (rewards - self.reward_mean) / self.reward_std, torch.zeros_like(rewards))


class OnlineCoPGTrainer(SampledBase):
    """The same loss on completions sampled from the policy, and on those of earlier rollouts (arXiv 2406.19185).

    Its gradient is right wherever completions came from, so the sampler's log-probs are never computed and a rollout
    may serve several passes. With `replay_prompts` every rollout is joined by that many prompts drawn from the last
    `replay_capacity` of this rank, whose rewards and reference scores were kept; from the second rollout on.
    """

    needs_proposal = False
    _name = "Online CoPG"
    _tag_names = ["llmalign", "copg"]

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)
        self.replay = ReplayBuffer(args.replay_capacity)

    def finish(self, rollout: Rollout) -> Rollout:
        """The fresh prompts, with replayed ones behind them when training."""
        if not (self.model.training and self.args.replay_prompts):
            return rollout
        rollout = rollout | {"fresh": torch.ones_like(rollout["mask"][:, 0])}
        count = min(self.args.replay_prompts, len(self.replay))
        drawn = self.replay.draw(count - count % self.args.steps_per_generation)
        self.replay.add(rollout)
        return joined(rollout, [row | {"fresh": torch.zeros_like(row["fresh"])} for row in drawn])

    def policy_weights(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """What is replayed was drawn from another policy and says nothing of this one."""
        return scores.mask & rollout["fresh"][:, None] if "fresh" in rollout else scores.mask

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """Weights (P,) that leave out prompts with fewer than two completions to compare."""
        rewards = scores.rewards
        if self.args.normalize_rewards == "group":
            rewards = normalised(rewards, scores.mask)
        return {"weights": self.keep(scores.mask.sum(1) > 1), "scaled_rewards": rewards}

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """The grouped loss, one number a prompt."""
        return losses.copg(self._group(scores, rollout), beta=self.args.beta)

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Those of `CoPGTrainer`, without the prompts that have no value."""
        group = self._group(scores, rollout)
        metrics = group_metrics(group, rollout["rewards"], self.args.beta)
        metrics["drift/chosen"] = metrics["drift/chosen"].masked_fill(~scores.mask.any(dim=1), torch.nan)
        return {name: (value.detach().nan_to_num(), (~value.isnan()).float()) for name, value in metrics.items()}

    def own_state(self) -> dict[str, Any]:
        """The replay buffer."""
        return {"replay": self.replay.state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The replay buffer."""
        self.replay.load(state["replay"])

    def _group(self, scores: RolloutScores, rollout: Rollout) -> GroupScores:
        return GroupScores(scores.policy, scores.reference, rollout["scaled_rewards"], scores.mask)


def normalised(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards (P, K) with zero mean and unit deviation a prompt; 0 where masked and where all are equal."""
    count = mask.sum(1, keepdim=True)
    mean = (rewards * mask).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (rewards - mean) * mask
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Equal rewards differ by the rounding of their mean, which must not be scaled up to unit size.
    unequal = deviation > 1e-6 * rewards.abs().amax(1, keepdim=True).clamp(min=1)
    return torch.where(unequal, centred / deviation.clamp(min=1e-12), torch.zeros_like(rewards))


def group_metrics(scores: GroupScores, rewards: Tensor, beta: float) -> dict[str, Tensor]:
    """Values (P,) of groups: `CoPGTrainer.row_metrics` says which; `rewards` (P, K) are the raw ones."""
    mask = torch.ones_like(scores.rewards, dtype=torch.bool) if scores.mask is None else scores.mask
    rho = scores.policy - scores.reference
    first, second = torch.triu_indices(mask.shape[1], mask.shape[1], offset=1, device=mask.device)
    both = (mask[:, first] & mask[:, second]).float()
    d_reward = scores.rewards[:, first] - scores.rewards[:, second]
    d_rho = rho[:, first] - rho[:, second]
    ordered = both * (d_reward != 0)
    right = ((d_rho * d_reward) > 0).float() + 0.5 * (d_rho == 0).float()
    present = mask.float()
    best = scores.rewards.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    return {
        "residual": (both * (d_reward - beta * d_rho).abs()).sum(1) / both.sum(1),
        "rewards/accuracies": (ordered * right).sum(1) / ordered.sum(1),
        "rewards/mean": (rewards * present).sum(1) / present.sum(1),
        "logps/mean": (scores.policy * present).sum(1) / present.sum(1),
        "drift/mean": (rho * present).sum(1) / present.sum(1),
        "drift/chosen": rho.gather(1, best).squeeze(1),
    }
