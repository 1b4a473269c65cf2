"""What on-policy trainers do with a rollout, apart from sampling it: scores by group, the step's loss, its metrics."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Sampler

from llmalign.errors import UserError
from llmalign.processes import fail_together
from llmalign.rewards.functions import Guarded
from llmalign.scores.rounding import rounded_limit
from llmalign.trainers.pair import START_TOLERANCE
from llmalign.trainers.text_scores import TextScores
from llmalign.types import PromptGroups, RolloutScores

logger = logging.getLogger(__name__)

Rollout = dict[str, Tensor]


class OrderByEpoch(Sampler[int]):
    """A shuffling sampler whose order follows from (seed, epoch), not from how often it was read before."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class RolloutMixin(TextScores):
    """Turns a rollout, P prompts with K sampled completions each, into the loss of a pure function of its scores.

    A rollout is a dict of tensors whose first dimension is P, so that nothing that shuffles or splits it can part a
    group: `prompt_ids`, `prompt_mask` (P, S); `completion_ids`, `completion_mask`, `token_old`, `token_reference`
    (P, K, T); `rewards`, `mask`, `weights` (P, K; or P, where the loss is one number a prompt) and what `judge` adds.
    Rows that a method leaves out keep their place and have weight 0: removing them would leave the ranks with unequal
    work. The loss of a rollout's micro-batches is the weighted mean of its rows' losses, with weights made once a
    rollout from sums over all ranks.
    """

    accelerator: Accelerator
    model: Any
    #: whether the sampler's log-probs are needed; without them `token_old` and `proposal` are 0
    needs_proposal = True
    #: whether the frozen reference's log-probs are needed; without them `token_reference` is 0
    needs_reference = True
    _metrics: Any
    reward_funcs: Any
    group_size: Any
    require_finite_weights: Callable[[], None]
    _start_checked = False
    _unique_tokens = 0
    _order: OrderByEpoch | None = None

    def _generate_and_score_completions(self, inputs: Any) -> Rollout:
        self.require_finite_weights()  # of which sampling would make an error, on a GPU one that ends all use of it
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        numbers = [row.get("row_id", -1) for row in inputs]
        return batch | {"row_id": torch.tensor(numbers, device=batch["prompt_ids"].device)}

    def finish(self, rollout: Rollout) -> Rollout:
        """The rollout that is trained on, made of a fresh one: as it is, or with others joined to it."""
        return rollout

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """Tensors, P first, that the method adds to a fresh rollout (advantages, weights); all ranks call it."""
        return {}

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """Losses of a micro-batch, in the shape of its weights, with gradients; their weighted mean is minimised."""
        raise NotImplementedError

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Values to log with their weights (same shape); each is logged as one mean over all ranks."""
        return {}

    def policy_weights(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """Weights (P, K) with which means over completions are the policy's; drawn from it, all count alike."""
        return scores.mask

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        self._order = OrderByEpoch(super()._get_train_sampler(dataset))  # type: ignore[misc]
        return self._order

    def _run_epoch(self, *, epoch: int, **options: Any) -> None:
        if self._order is not None:  # a stream has none
            self._order.epoch = epoch
        super()._run_epoch(epoch=epoch, **options)  # type: ignore[misc]

    def own_state(self) -> dict[str, Any]:
        """What of the method's running estimates and buffers a checkpoint must hold: tensors and plain values."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take `own_state` of a checkpoint back."""

    def compute_loss(
        self, model: nn.Module, inputs: Rollout, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Weighted mean loss of a micro-batch; micro-batches hold equally many rows, so their mean is the step's."""
        if return_outputs:
            raise ValueError("this trainer has no outputs besides its loss: the full logits are never built")
        scores = self.rollout_scores(model, inputs)
        if model.training and not self._start_checked:
            self._check_rollout_start(model, inputs, scores)
        losses = self.rollout_loss(scores, inputs)
        values = self.rollout_metrics(scores, inputs)
        count = scores.token_mask.sum(dim=2)
        self._unique_tokens = int(count.sum() + inputs["prompt_mask"].sum())
        weights = self.policy_weights(scores, inputs).float()
        if self.needs_reference:
            values["kl_to_reference"] = ((scores.policy - scores.reference).detach(), weights)
        values["entropy"] = (-scores.policy.detach() / count.clamp(min=1), weights)
        self.note(values)
        return (losses * inputs["weights"]).sum() / inputs["weights"].numel()

    def unique_tokens(self, inputs: Any) -> int:
        """Tokens of the last micro-batch: what the data loader gives are prompts, sampled from afterwards."""
        return self._unique_tokens

    def refuse_failing_rewards(self, rows: int) -> None:
        """Raise UserError, on all ranks alike, where a reward function fails on every row of several prompts.

        Also what a function must not go on after (UserError, no memory left): the guard held it back until here, where
        no rank waits for another.
        """
        guarded = [function for function in self.reward_funcs if isinstance(function, Guarded)]
        held = [one.held for one in guarded if one.held is not None]
        own = [*(len(one.failed) for one in guarded), rows, len(held)]
        *counts, rows, stopped = self.over_ranks(torch.tensor(own, device=self.accelerator.device)).tolist()
        if stopped:
            named = [str(one) if isinstance(one, UserError) else f"{type(one).__name__}: {one}" for one in held]
            try:
                fail_together(named[0] if named else None)
            except UserError:
                if held:
                    raise held[0] from None
                raise
        mode = "train" if self.model.training else "eval"
        for function, count in zip(guarded, counts, strict=True):
            if count:
                self._metrics[mode][f"rewards/{function.__name__}/failed"].append(count / rows)
            if count == rows > self.group_size:
                raise UserError(
                    f"The reward function {function.__name__} fails on all {count} rows of a rollout; the first is "
                    f"{function.failed[0]}. Put the function right; a row that it does not apply to returns None."
                )

    def rollout_scores(self, model: nn.Module, rollout: Rollout) -> RolloutScores:
        """All scores of a rollout or of a part of one; the policy's alone carry gradients."""
        token_mask = rollout["completion_mask"].bool()
        token_policy = self.token_logps(model, groups_of(rollout), token_mask.shape[2])
        return self._scores(rollout, token_policy.view(token_mask.shape))

    def sampler_token_logps(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs (P, K, T) of fresh completions under the policy; a method may read more in the same pass."""
        return self.frozen_token_logps(model, rollout)

    def frozen_token_logps(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs (P, K, T) without gradients, as many rows at a time as a micro-batch has."""
        width = rollout["completion_ids"].shape[2]
        with torch.no_grad(), self.accelerator.autocast():
            parts = [self.token_logps(model, groups, width) for groups in self.in_parts(groups_of(rollout))]
        return torch.cat(parts).view(rollout["completion_ids"].shape)

    def in_parts(self, groups: PromptGroups) -> list[PromptGroups]:
        """Prompts, as many at a time as a micro-batch has."""
        mode_rows = (
            self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        )
        at_a_time = max(mode_rows // self.group_size, 1)
        return [
            groups.take(range(start, min(start + at_a_time, len(groups)))) for start in range(0, len(groups), at_a_time)
        ]

    def _scores(self, rollout: Rollout, token_policy: Tensor) -> RolloutScores:
        token_mask = rollout["completion_mask"].bool()
        present = token_mask.to(token_policy.dtype)
        return RolloutScores(
            policy=(token_policy * present).sum(2),
            proposal=(rollout["token_old"] * present).sum(2),
            reference=(rollout["token_reference"] * present).sum(2),
            rewards=rollout["rewards"],
            mask=rollout["mask"],
            token_policy=token_policy,
            token_old=rollout["token_old"],
            token_reference=rollout["token_reference"],
            token_mask=token_mask,
        )

    def token_logps(self, model: nn.Module, groups: PromptGroups, width: int) -> Tensor:
        """Log-probs (N, width) of the completions' tokens in nats, float32, 0 behind their ends."""
        return spread(self.policy_token_logps(model, groups), groups, width)

    def keep(self, rows: Tensor) -> Tensor:
        """Weights that leave out where `rows`, of any shape, is false, with mean 1 over all ranks' rows."""
        rows = rows.float()
        kept, total = self.over_ranks(torch.stack([rows.sum(), torch.ones_like(rows).sum()]))
        return rows * (total / kept.clamp(min=1))

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums over all ranks, so that a mean is taken once, after them."""
        return self.accelerator.reduce(sums, reduction="sum")

    def note(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add to the weighted means over all ranks that the next log has; all ranks name the same in the same order."""
        sums = [torch.stack([(value * weight).sum(), weight.sum()]) for value, weight in values.values()]
        noted = self._noted["train" if self.model.training else "eval"]
        for name, (total, weight) in zip(values, self.over_ranks(torch.stack(sums).double()).tolist(), strict=True):
            before = noted.get(name, (0.0, 0.0))
            noted[name] = (before[0] + total, before[1] + weight)

    @cached_property
    def _noted(self) -> dict[str, dict[str, tuple[float, float]]]:
        return {"train": {}, "eval": {}}

    def _settle_means(self, mode: str) -> None:
        """Hand what was noted to TRL's log, one number each, however many micro-batches it comes from."""
        for name, (total, weight) in self._noted[mode].items():
            if weight:
                self._metrics[mode][name] = [total / weight]
        self._noted[mode].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log."""
        self._settle_means("train" if self.model.training else "eval")
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Sample and measure with random numbers of its own, the same at every evaluation; training's go on untouched.

        What was measured is in the metrics too, so that it can pick the best checkpoint. Over several ranks the prompts
        that fill the last batch count again.
        """
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        self._settle_means("eval")
        for name, values in self._metrics["eval"].items():
            known = [value for value in values if not math.isnan(value)]
            if known:
                output.metrics[f"{metric_key_prefix}_{name}"] = sum(known) / len(known)
        return output

    def _check_rollout_start(self, model: nn.Module, rollout: Rollout, scores: RolloutScores) -> None:
        """Stop a fresh run whose first rollout scores differently under the policy and the frozen reference."""
        self._start_checked = True
        if not self.needs_reference:
            return
        gap = ((scores.policy - scores.reference).detach().abs() * scores.mask).max()
        size = scores.reference.abs().max()
        gap, size = self.accelerator.gather(torch.stack([gap, size])[None]).amax(dim=0).tolist()
        step = self.state.global_step  # type: ignore[attr-defined]
        excuse = f"resumed at step {step}" if step > 0 else self.start_may_differ
        exact = self.accelerator.mixed_precision == "no" and next(self.model.parameters()).dtype == torch.float32
        limit = rounded_limit(START_TOLERANCE, size)
        if excuse is None and not exact:
            own = torch.tensor([self.split_gap(model, {"groups": groups_of(rollout)})], device=self.accelerator.device)
            limit = max(limit, 2 * float(self.accelerator.gather(own).max()))
        if excuse is None and not gap <= limit:
            raise UserError(
                f"On the first rollout the policy scores a completion {gap:.3g} nats away from the model it started "
                f"from (limit {limit:.3g}): the reference is another model, an adapter does not start at zero, or "
                "dropout is on; name another reference explicitly (ref_model_name_or_path) if it is meant."
            )
        logger.info("Start check: policy and reference differ by %.2e nats%s.", gap, f" ({excuse})" if excuse else "")

    #: why the first rollout may differ from the reference; None: it must not
    start_may_differ: str | None = None


def spread(flat: Tensor, groups: PromptGroups, width: int) -> Tensor:
    """Numbers (S,) of the tokens of N completions as (N, width), float32, 0 behind their ends."""
    lengths = torch.tensor(groups.lengths(), device=flat.device)
    places = torch.arange(width, device=flat.device) < lengths[:, None]
    return torch.zeros(places.shape, device=flat.device).masked_scatter(places, flat.float())


def groups_of(rollout: Rollout) -> PromptGroups:
    """The token ids of a rollout without padding."""
    prompts = [
        ids[kept].tolist() for ids, kept in zip(rollout["prompt_ids"], rollout["prompt_mask"].bool(), strict=True)
    ]
    completions = [
        [own[kept].tolist() for own, kept in zip(ids, masks, strict=True)]
        for ids, masks in zip(rollout["completion_ids"], rollout["completion_mask"].bool(), strict=True)
    ]
    return PromptGroups(prompts, completions)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and lists of them."""
    torch.save(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing but tensors and plain values is unpickled. All processes call it together.

    Raises UserError on all of them where one finds no file.
    """
    missing = f"{path.parent} holds no {path.name}, the state of its rollout, so the run cannot go on where it was"
    way_out = "resume from another checkpoint, with as many processes as wrote it."
    fail_together(None if path.is_file() else f"{missing}; {way_out}")
    return torch.load(path, map_location="cpu", weights_only=True)
