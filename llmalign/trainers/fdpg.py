"""f-DPG on sampled completions: the policy is led to a target distribution by the gradient of an f-divergence."""

import copy
import hashlib
import logging
import math
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from llmalign import losses
from llmalign.errors import UserError
from llmalign.evaluation.divergence import target_terms
from llmalign.evaluation.diversity import distinct_n, self_bleu
from llmalign.losses.divergences import MAX_EXPONENT
from llmalign.rewards.targets import DistributionalTarget, MomentReport
from llmalign.trainers._trl import SampledBase
from llmalign.trainers.partition import BaselineWindow, PartitionFunction
from llmalign.trainers.proposals import OfflineProposalMixin
from llmalign.trainers.rollouts import Rollout, groups_of
from llmalign.types import RolloutScores

logger = logging.getLogger(__name__)

MAX_BIAS = 0.02  # of a moment
BLEU_SAMPLES = 64  # completions of a prompt: its cost grows with them, and it is logged at every rollout


class FDPGTrainer(OfflineProposalMixin, SampledBase):
    """Minimises `D_f(pi || P/Z)`, P the frozen base times a constraint, moments or a reward (arXiv 2302.08215).

    What `reward_funcs` measure goes into P, as `FDPGConfig.target` says; a completion for which a function gives no
    number is left out. Z is a running mean over all rollouts and ranks, updated with a rollout before it is used on it;
    prompts whose Z is 0 so far are skipped. Lambda of a distributional target is solved before the first step, on
    completions of the policy that training starts from, weighted to be the base's where they differ; the moments are
    means over prompts of those of `p(.|prompt)`.
    """

    _name = "f-DPG"
    _tag_names = ["llmalign", "f-dpg"]

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)
        self.target = args.build_target()
        if args.moments is not None and len(args.moments) != len(self.reward_funcs):
            raise UserError(
                f"{len(args.moments)} moments need as many reward_funcs, one feature each; got {len(self.reward_funcs)}"
            )
        self.partition = PartitionFunction(per_context=args.partition == "per_prompt", max_z=args.max_z)
        self.window = BaselineWindow(args.baseline_window)
        #: how the moments of a distributional target were reached; None before that, and after resuming
        self.moment_report: MomentReport | None = None
        self._to_fit = isinstance(self.target, DistributionalTarget)

    def _generate_and_score_completions(self, inputs: Any) -> Rollout:
        if self._to_fit:
            self._fit_target(len(inputs))
        return super()._generate_and_score_completions(inputs)

    def _fit_target(self, rows: int) -> None:
        """Solve lambda on at least `moment_samples` completions, `rows` of them at a time on every rank."""
        mode = "train" if self.model.training else "eval"
        size, processes = self.group_size, self.accelerator.num_processes
        calls = -(-self.args.moment_samples // (rows * processes))
        own = self._prompts_to_fit(calls * processes * rows // size)[self.accelerator.process_index :: processes]
        logger.info("Sampling %d completions to solve the target's lambda on.", calls * processes * rows)
        features, weights, present, owners = [], [], [], []
        for start in range(0, len(own), rows // size):
            inputs = [row for row in own[start : start + rows // size] for _ in range(size)]
            rollout = super()._generate_and_score_completions(inputs)
            scores = self._scores(rollout, rollout["token_old"])
            features.append(rollout["features"].flatten(0, 1))
            weights.append((scores.reference - scores.proposal).flatten())
            present.append(rollout["mask"].flatten())
            prompts = [_number(ids) for ids in groups_of(rollout).prompts]
            owners.append(torch.tensor(prompts, device=rollout["mask"].device).repeat_interleave(size))
        gathered = (self.accelerator.gather(torch.cat(parts)).cpu() for parts in (features, weights, owners, present))
        *everyone, there = gathered
        report = self.target.fit(*(part[there] for part in everyone))
        self.moment_report, self._to_fit = report, False
        logger.info("Target: %s.", report.text())
        if report.biased > MAX_BIAS:
            logger.warning(
                "On half of each prompt's completions the moments are %s instead of %s, so they are off by about as "
                "much on all of them: raise moment_samples_per_prompt, and moment_samples with it.",
                [round(mean, 3) for mean in report.halved], [round(mean, 3) for mean in report.reached],
            )  # fmt: skip
        self._metrics[mode].clear()  # these completions were no step's
        logs = {"moments/newton_steps": report.iterations, "moments/gap": report.gradient_norm}
        logs |= {"moments/samples": report.samples, "moments/effective_samples": report.effective}
        logs |= {"moments/prompts": report.contexts}
        series = {"wanted": report.wanted, "reached": report.reached, "halved": report.halved, "lambda": report.lambdas}
        for name, numbers in series.items():  # a feature that is fixed has no finite lambda
            logs |= {f"moments/{name}_{place}": value for place, value in enumerate(numbers) if math.isfinite(value)}
        self.log(logs)

    def _prompts_to_fit(self, groups: int) -> list[dict[str, Any]]:
        """Rows for that many groups, each as often as gives it `moment_samples_per_prompt` completions, or more."""
        times = min(-(-self.args.moment_samples_per_prompt // self.group_size), groups)
        rows = _some_rows(self.train_dataset, groups // times, self.args.seed)
        return [rows[place * len(rows) // groups] for place in range(groups)]

    def judge(self, rollout: Rollout, scores: RolloutScores) -> Rollout:
        """What was measured (P, K, F); log P (P, K); log Z and a windowed baseline (P,); whose completions count."""
        features, present = self._measured(scores)
        added = {"features": features, "mask": present}
        if self._to_fit:
            return added
        log_p, fault = self._log_target(scores, features, present)
        log_ratios = log_p - scores.proposal[present]
        log_z = self._log_z(rollout, log_ratios, present, fault or self._overflow(rollout, log_ratios, present))
        log_z = log_z.to(scores.proposal)
        kept = present & ~log_z.isneginf()[:, None]
        log_z = log_z.masked_fill(log_z.isneginf(), 0.0)
        # Where a completion is left out anything finite will do, its weight is 0; this makes its p / q 1.
        log_target = (scores.proposal + log_z[:, None]).masked_scatter(present, log_p)
        added |= {"log_target": log_target, "log_z": log_z, "weights": self.keep(kept)}
        if self.model.training:
            self.look_at_proposal(rollout, scores, log_target - log_z[:, None], kept)
        if self.args.baseline == "window":
            added["baseline"] = self._windowed(rollout, scores, added, kept)
        self._note_diversity(rollout)
        return added

    def rollout_loss(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """`losses.fdpg` of every completion."""
        given = _given(scores.policy, scores.proposal, rollout)
        baseline = None
        if self.args.baseline == "one":
            baseline = torch.ones_like(scores.policy)
        elif self.args.baseline == "window":
            baseline = rollout["baseline"][:, None].expand_as(scores.policy)
        elif self.args.baseline == "leave_one_out":
            baseline = losses.leave_one_out_baseline(*given, self.args.divergence, mask=rollout["weights"] > 0)
        policy, proposal, log_target, log_z = (value.flatten() for value in given)
        flat_baseline = None if baseline is None else baseline.flatten()
        flat = losses.fdpg(policy, proposal, log_target, log_z, self.args.divergence, flat_baseline)
        return flat.view(scores.policy.shape)

    def rollout_metrics(self, scores: RolloutScores, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Distances to the target and from the base in nats a completion, what the target asks for, Z, clamping.

        Means under the policy, by importance weights. `kl_pi_p` is left out where the target can be 0: it is infinite
        as soon as a completion fails. `js` is the Jensen-Shannon divergence, half of what the loss `js` minimises.
        """
        weight = (rollout["weights"] > 0).double()
        given = _given(scores.policy.detach(), scores.proposal, rollout)
        policy, proposal, log_target, log_z = (value.flatten() for value in given)
        terms = target_terms(policy, proposal, log_target - log_z, scores.reference.flatten())
        terms["sequence_entropy"], terms["ratio"] = terms.pop("entropy"), terms.pop("weight")
        if self.target.may_be_zero:
            del terms["kl_pi_p"]
        terms["clamped"] = losses.clamped(policy, proposal, log_target, log_z, self.args.divergence).double()
        for name, values in self._wanted(rollout["features"]).items():
            terms[name] = terms["ratio"] * values.flatten()
        metrics = {name: (values.view_as(weight), weight) for name, values in terms.items()}
        alive = (weight > 0).any(dim=1).double()
        metrics["log_z"] = (rollout["log_z"].double(), alive)
        metrics["skipped_prompts"] = (1 - alive, torch.ones_like(alive))
        return metrics

    def policy_weights(self, scores: RolloutScores, rollout: Rollout) -> Tensor:
        """Importance weights of the policy."""
        return scores.mask * (scores.policy.detach() - scores.proposal).clamp(max=MAX_EXPONENT).exp()

    def own_state(self) -> dict[str, Any]:
        """Lambda, the partition functions and the window."""
        return super().own_state() | {
            "target": self.target.state_dict(),
            "to_fit": self._to_fit,
            "partition": self.partition.state_dict(),
            "window": self.window.state_dict(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Lambda, the partition functions and the window."""
        super().load_own_state(state)
        self.target.load_state_dict(state["target"])
        self._to_fit = state["to_fit"]
        self.partition.load_state_dict(state["partition"])
        self.window.load_state_dict(state["window"])

    def _measured(self, scores: RolloutScores) -> tuple[Tensor, Tensor]:
        """What goes into the target (P, K, F), 0 where it is missing, and which completions (P, K) have all of it."""
        start = self.accelerator.process_index * scores.mask.numel()
        own = self._raw_rewards[start : start + scores.mask.numel()].view(*scores.mask.shape, -1)
        features = scores.rewards[..., None] if self.args.target == "reward" else own.nan_to_num()
        return features, scores.mask & ~own.isnan().any(dim=2)

    def _log_target(self, scores: RolloutScores, features: Tensor, present: Tensor) -> tuple[Tensor, str | None]:
        """log P (N,) of the completions that count, or what is wrong with what was measured of them."""
        try:
            return self.target.log_target(scores.reference[present], features[present]), None
        except UserError as error:
            return scores.proposal[present], str(error)

    def _overflow(self, rollout: Rollout, log_ratios: Tensor, present: Tensor) -> str | None:
        """Which prompt has a completion whose P/q is NaN or infinite, and what can be the reason."""
        wrong = log_ratios.isnan() | (log_ratios == torch.inf)
        if not bool(wrong.any()):
            return None
        row = int(present.nonzero()[wrong][0, 0])
        prompt = self.processing_class.decode(groups_of(rollout).prompts[row], skip_special_tokens=True)
        return (
            f"log P - log q of a completion of {prompt[-80:]!r} is {float(log_ratios[wrong][0])}: the model's "
            "log-probs are not finite, or the target's factor (a reward over beta, say) is too large for float32"
        )

    def _wanted(self, features: Tensor) -> dict[str, Tensor]:
        """What of the features (P, K, F) is logged, as values (P, K)."""
        if self.args.target == "reward":
            return {"target_reward": features[..., 0]}
        if self.args.target == "pointwise":
            return {"satisfied": (features == 1).all(dim=2)}
        names = zip(self.reward_func_names, features.unbind(dim=2), strict=True)
        return {f"moment/{name}": values for name, values in names}

    def _log_z(self, rollout: Rollout, log_ratios: Tensor, present: Tensor, fault: str | None) -> Tensor:
        """log Z (P,) with this rollout's ratios P/q in it, -inf where it is 0; evaluation leaves no trace in it.

        Raises UserError on all ranks where one has a fault.
        """
        partition = self.partition if self.model.training else copy.deepcopy(self.partition)
        keys = [_key(ids) for ids in groups_of(rollout).prompts]
        owners = [key for key, row in zip(keys, present, strict=True) for _ in range(int(row.sum()))]
        partition.update(owners, log_ratios, fault)
        seen = [partition.count(key) if partition.per_context else partition.count() for key in keys]
        values = [float(partition.log_z([key])) if count else -torch.inf for key, count in zip(keys, seen, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    def _windowed(self, rollout: Rollout, scores: RolloutScores, added: Rollout, kept: Tensor) -> Tensor:
        """The windowed baseline (P,) as it was before this rollout, which joins it."""
        mean = self.window.mean()
        given = _given(self.policy_scores(rollout, scores), scores.proposal, added)
        policy, proposal, log_target, log_z = (value[kept] for value in given)
        if self.model.training:
            self.window.update(losses.pseudo_rewards(policy, proposal, log_target, log_z, self.args.divergence))
        return torch.full_like(added["log_z"], mean)

    def _note_diversity(self, rollout: Rollout) -> None:
        """Log how different the completions of one prompt are, a mean over prompts; self-BLEU of the first 64."""
        groups = [group for group in groups_of(rollout).completions if len(group) > 1]
        values: dict[str, list[float]] = {
            f"distinct_{n}": [distinct_n(group, n) for group in groups] for n in (1, 2, 3)
        }
        values["self_bleu"] = [self_bleu(group[:BLEU_SAMPLES]) for group in groups]
        device = self.accelerator.device
        tensors = {name: torch.tensor(own, dtype=torch.float64, device=device) for name, own in values.items()}
        self.note({name: (own.nan_to_num(), (~own.isnan()).double()) for name, own in tensors.items()})


def _given(policy: Tensor, proposal: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the losses take, each (P, K)."""
    return policy, proposal, rollout["log_target"], rollout["log_z"][:, None].expand_as(policy)


def _key(ids: list[int]) -> str:
    """A short name of a prompt, the same in every run and on every rank."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _number(ids: list[int]) -> int:
    """The same as a number that a tensor can hold."""
    return int(_key(ids), 16) - 2**63


def _some_rows(dataset: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a data set in an order that follows from the seed, again from its start where it has fewer; of a stream
    the first ones."""
    if not isinstance(dataset, Dataset):
        return list(islice(cycle(islice(dataset, count)), count))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return [dataset[order[place % len(order)]] for place in range(count)]
