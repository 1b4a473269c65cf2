"""Policy filtration: PPO on the completions of each prompt that a rank filter keeps."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmalign import losses
from llmalign.errors import UserError
from llmalign.rewards.model import ModelReward
from llmalign.trainers._trl import SampledBase
from llmalign.trainers.critic import (
    VALUE_HEAD,
    Critic,
    CriticGradients,
    HeadCritic,
    ModelCritic,
    starting_point,
    unguarded,
)
from llmalign.trainers.pf_ppo_config import AFTER, GROUP, HEAD, RESAMPLE
from llmalign.trainers.rollouts import Rollout, groups_of, spread
from llmalign.types import PromptGroups, RolloutScores


class PFPPOTrainer(SampledBase):
    """Ranks the completions of each prompt by reward, keeps some (arXiv 2409.06957, Section 4), and runs PPO on them.

    The reward of a token is `-beta (log pi_old - log ref)`, plus the completion's at its last token; a critic and GAE
    make advantages of it, or, with `advantage: group`, the rewards of all other completions of the prompt do, those
    that are filtered out included. Completions that are filtered out stay in the batch with weight 0. `critic_model` is
    a reward model (an instance, which is copied, or a path) for `critic: model`, in place of the one in the config.
    Raises UserError for a critic under FSDP and for an optimizer that was made elsewhere, which lacks the critic.
    """

    _name = "PF-PPO"
    _tag_names = ["llmalign", "pf-ppo"]
    critic: Critic | None = None
    _sampled_values: Tensor
    _values: Tensor

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *, critic_model: Any = None, **kwargs: Any) -> None:
        self.needs_reference = args.beta > 0
        super().__init__(model, reward_funcs, args, **kwargs)
        if critic_model is not None and (args.advantage == GROUP or args.critic == HEAD):
            raise UserError(
                "critic_model is given, but only critic: model with advantage: gae starts from one; drop it"
            )
        if args.advantage == GROUP:
            return
        if self.is_fsdp_enabled:
            raise UserError("a critic is not trained under FSDP: set advantage: group, or train under DDP or ZeRO")
        if args.critic == HEAD:
            self.critic = HeadCritic(self.model)
            if self.use_vllm:
                self._send_weights_without(self.critic)
        else:
            models = [one for one in map(unguarded, self.reward_funcs) if isinstance(one, ModelReward)]
            self.critic = ModelCritic(
                starting_point(critic_model, args, self.reward_funcs, self.processing_class),
                args=args,
                accelerator=self.accelerator,
                pad_token_id=self.processing_class.pad_token_id,
                normalize=all(one.normalize for one in models),
            )
            self.add_callback(CriticGradients(self.critic))

    def _send_weights_without(self, critic: HeadCritic) -> None:
        """Keep the value head from vLLM, which takes the policy's weights by name and knows none of it."""
        send = self.vllm_generation.sync_weights

        def sync_weights() -> None:
            with critic.set_aside():
                send()

        self.vllm_generation.sync_weights = sync_weights

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The policy's optimizer with a group for the critic, which has a learning rate of its own."""
        if self.critic is None:
            return super().create_optimizer(model)
        own = self.critic.parameters()
        if self.optimizer is None:
            for weight in own:
                weight.requires_grad_(False)  # a head lies among the policy's parameters
            optimizer = super().create_optimizer(model)
            for weight in own:
                weight.requires_grad_(True)
            decayed = set(self.get_decay_parameter_names(self.critic.module))
            named = list(self.critic.module.named_parameters())
            for decay in (True, False):
                group = [weight for name, weight in named if (name in decayed) == decay]
                if group:
                    rate = self.args.weight_decay if decay else 0.0
                    options = {"lr": self.args.critic_learning_rate, "weight_decay": rate}
                    optimizer.add_param_group({"params": group, **options})
        groups = self.optimizer.param_groups if isinstance(self.optimizer, torch.optim.Optimizer) else []
        if not any(weight is own[0] for group in groups for weight in group["params"]):
            raise UserError(
                "the optimizer was made elsewhere (`optimizers`, or DeepSpeed's config) and lacks the critic with its "
                "learning rate: leave it to this trainer, or set advantage: group"
            )
        return self.optimizer

    def gradient_groups(self, model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
        """Policy and critic apart, so that a critic that is far off does not shrink the policy's steps."""
        if self.critic is None:
            return super().gradient_groups(model)
        own = list(self.critic.module.named_parameters())
        known = {id(weight) for _, weight in own}
        policy = [(name, weight) for name, weight in model.named_parameters() if id(weight) not in known]
        return [policy, [(f"critic.{name}", weight) for name, weight in own]]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.critic is not None and not self.is_deepspeed_enabled:  # DeepSpeed clips by itself, all at once
            self._metrics["train"]["critic/grad_norm"].append(float(self.gradient_norms[1]))
        return norm

    def sampler_token_logps(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """See the base; the sampler's values are read in the same pass where they can be."""
        if self.critic is None:
            return super().sampler_token_logps(model, rollout)
        shape = rollout["completion_ids"].shape
        parts = self.in_parts(groups_of(rollout))
        with torch.no_grad(), self.accelerator.autocast():
            read = [self._logps_and_values(model, groups, shape[2]) for groups in parts]
        logps, self._sampled_values = (torch.cat(part).view(shape) for part in zip(*read, strict=True))
        return logps

    def _logps_and_values(self, model: nn.Module, groups: PromptGroups, width: int) -> tuple[Tensor, Tensor]:
        """Of the completions' tokens, (N, width) each; the value of a token is that before it is known."""
        if isinstance(self.critic, ModelCritic):
            return self.token_logps(model, groups, width), spread(self.critic.values(groups), groups, width)
        layout = self.laid_out(model, groups)
        logps, values = model(**layout.inputs, scored=layout.scored, targets=layout.targets, reader=VALUE_HEAD)
        return spread(logps, groups, width), spread(values, groups, width)

    def rollout_scores(self, model: nn.Module, rollout: Rollout) -> RolloutScores:
        """See the base; the critic's values of the same completions are kept for the loss."""
        if self.critic is None:
            return super().rollout_scores(model, rollout)
        shape = rollout["completion_ids"].shape
        logps, values = self._logps_and_values(model, groups_of(rollout), shape[2])
        self._values = values.view(shape)
        return self._scores(rollout, logps.view(shape))

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """Weights (P, K) of the filter; advantages and, of a critic, values and returns, (P, K, T)."""
        counts = self._select(rollout, scores)
        present = scores.token_mask & self._usable(scores)[:, :, None]
        judged = {"weights": self.keep(counts)}
        if self.critic is None:
            advantages = self._group_advantages(scores)[:, :, None] * present
        else:
            judged["values"] = self._sampled_values
            advantages, judged["returns"] = self._gae(scores, judged["values"])
        # A completion that was drawn twice counts twice in the mean, as it does in the loss.
        after = self.args.whitening == AFTER
        repeats = int(counts.max()) if after else 1
        drawn = torch.arange(max(repeats, 1), device=counts.device)[:, None, None, None] < counts[:, :, None]
        whitened = losses.whiten(
            advantages.expand(len(drawn), *advantages.shape),
            drawn & present if after else present[None],
            self.over_ranks,
        )
        judged["advantages"] = whitened[0]
        self._note_rollout(judged, present, counts)
        return judged

    def _usable(self, scores: RolloutScores) -> Tensor:
        """Completions (P, K) with a reward and, where truncated ones are masked, with tokens."""
        return scores.mask.bool() & scores.token_mask.any(dim=2)

    def _select(self, rollout: Rollout, scores: RolloutScores) -> Tensor:
        """How often each completion is trained on, (P, K)."""
        args, groups, usable = self.args, groups_of(rollout), self._usable(scores)
        drawn = []
        for row, (prompt, completions) in enumerate(zip(groups.prompts, groups.completions, strict=True)):
            # Drawn by what the prompt holds, so that the choice does not depend on how rows fall to ranks.
            digest = hashlib.sha256(repr((args.seed, prompt, completions)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            rewards, mask = scores.rewards[row : row + 1], usable[row : row + 1]
            strategy = args.strategy if rewards.shape[1] > 1 else "none"  # one alone, as evaluation may have it
            if args.selection == RESAMPLE:
                draws = args.draws or rewards.shape[1]
                drawn.append(losses.resample(rewards, strategy, draws, generator, power=args.power, mask=mask))
            else:
                drawn.append(losses.select(rewards, strategy, generator, power=args.power, mask=mask).long())
        return torch.cat(drawn)

    def _gae(self, scores: RolloutScores, values: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns (P, K, T) of all completions."""
        mask = scores.token_mask.flatten(0, 1)
        rewards = losses.token_rewards(
            scores.rewards.flatten(),
            scores.token_old.flatten(0, 1),
            scores.token_reference.flatten(0, 1),
            mask,
            kl_coef=self.args.beta,
            clamp=self.args.reward_clip,
        )
        both = losses.gae(rewards, values.flatten(0, 1), mask, self.args.gamma, self.args.gae_lambda)
        return both[0].view(values.shape), both[1].view(values.shape)

    def _group_advantages(self, scores: RolloutScores) -> Tensor:
        """The reward with its divergence less the mean of the prompt's other completions, (P, K), 0 for one alone."""
        present = self._usable(scores).float()
        rewards = (
            scores.rewards
            if self.args.reward_clip is None
            else scores.rewards.clamp(-self.args.reward_clip, self.args.reward_clip)
        )
        rewards = (rewards - self.args.beta * (scores.proposal - scores.reference)) * present
        others = present.sum(1, keepdim=True) - 1
        baseline = (rewards.sum(1, keepdim=True) - rewards) / others.clamp(min=1)
        return ((rewards - baseline) * present).masked_fill(others < 1, 0.0)

    def _note_rollout(self, judged: Rollout, present: Tensor, counts: Tensor) -> None:
        """Log what the filter kept, and how much of the returns' variance the sampler's values explain there."""
        kept = (present & (counts > 0)[:, :, None]).double()
        rows = (counts > 0).float()
        found = {"kept": (rows, torch.ones_like(rows))}
        if self.critic is not None:
            returns, error = judged["returns"].double(), (judged["returns"] - judged["values"]).double()
            sums = [(part * kept).sum() for part in (torch.ones_like(returns), returns, returns**2, error, error**2)]
            count, first, second, error_first, error_second = self.over_ranks(torch.stack(sums)).unbind()
            variance = second / count - (first / count) ** 2
            unexplained = error_second / count - (error_first / count) ** 2
            known = ((count > 1) & (variance > 0)).double()
            share = torch.nan_to_num(1 - unexplained / variance)
            found["critic/explained_variance"] = (share, known)
        self.note(found)

    def _kept_tokens(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """Tokens (P K, T) that the loss reads: what is filtered out, whatever it holds, reaches no weight."""
        return (scores.token_mask & (rollout["weights"] > 0)[:, :, None]).flatten(0, 1)

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """PPO's clipped loss of every completion, plus `value_coef` times the critic's, (P, K)."""
        kept = self._kept_tokens(scores, rollout)
        old, advantages = scores.token_old.flatten(0, 1), rollout["advantages"].flatten(0, 1)
        loss = losses.ppo_clip(scores.token_policy.flatten(0, 1), old, advantages, kept, self.args.clip)
        if self.critic is not None:
            loss = loss + self.args.value_coef * self._value_loss(rollout, self._values, kept)
        return loss.view(scores.policy.shape)

    def _value_loss(self, rollout: Rollout, values: Tensor, kept: Tensor) -> Tensor:
        """`losses.value_clip` of every completion, (P K,)."""
        old, returns = rollout["values"].flatten(0, 1), rollout["returns"].flatten(0, 1)
        return losses.value_clip(values.flatten(0, 1), old, returns, kept, self.args.value_clip)

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the tokens that are trained on: how far the policy and the values are from the sampler's."""
        kept = self._kept_tokens(scores, rollout)
        weight, rows = kept.float(), (rollout["weights"] > 0).flatten().float()
        log_ratio = torch.where(kept, (scores.token_policy - scores.token_old).detach().flatten(0, 1), 0.0)
        ratio = log_ratio.exp()
        found = {
            "ratio": (ratio, weight),
            "kl_to_sampler": (ratio - 1 - log_ratio, weight),
            "clip_fraction": (((ratio - 1).abs() > self.args.clip).float(), weight),
        }
        if self.needs_reference:
            apart = (scores.token_policy - scores.token_reference).detach().flatten(0, 1)
            found["kl_per_token"] = (torch.where(kept, apart, 0.0), weight)
        if self.critic is not None:
            values = self._values.detach()
            moved = (values - rollout["values"]).flatten(0, 1).abs()
            found["critic/value_loss"] = (self._value_loss(rollout, values, kept), rows)
            found["critic/value"] = (values.flatten(0, 1), weight)
            found["critic/clip_fraction"] = ((moved > self.args.value_clip).float(), weight)
        return found

    def own_state(self) -> dict[str, Any]:
        """The layout that the critic reads in, which its first batch decided."""
        return {"critic_scoring": self.critic.scorer.kind} if isinstance(self.critic, ModelCritic) else {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """See `own_state`."""
        if isinstance(self.critic, ModelCritic):
            self.critic.go_on_as(state["critic_scoring"])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.critic is not None:
            self.critic.save(Path(output_dir), writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.critic is not None and not self.is_deepspeed_enabled:
            self.critic.load(Path(checkpoint))  # DeepSpeed's own checkpoint holds a head with the policy
