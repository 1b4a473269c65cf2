"""D3PO and online PSO: pictures drawn by the policy, preferred by a reward, learned from step by step."""

import logging
import random
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from llmalign import losses
from llmalign.diffusion.image_trainer import ImageTrainer
from llmalign.diffusion.online_configs import PREVIOUS, RANDOM, D3POConfig, PSOConfig
from llmalign.diffusion.pipelines import Conditions
from llmalign.diffusion.ratios import clipped_fraction, pareto_preference, transition_scores
from llmalign.diffusion.rollouts import Denoise, Rollout, guided, row_noise, sample_transitions, transition_logps
from llmalign.diffusion.rounds import Round, RoundCollator, RoundRows
from llmalign.diffusion.samplers import build_sampler
from llmalign.errors import UserError
from llmalign.rewards.images import ImageReward
from llmalign.trainers.pair import START_TOLERANCE
from llmalign.types import PairScores

logger = logging.getLogger(__name__)

__all__ = ["D3POConfig", "D3POTrainer", "PSOConfig", "PSOTrainer"]

SIDES = 2


class D3POTrainer(ImageTrainer):
    """DPO on the transitions of pairs of rollouts for one caption, the better by its reward chosen (arXiv 2311.13231).

    `train_dataset` and `eval_dataset` hold captions, `reward_functions` are called with captions and pictures. The loss
    stays near log 2, since beta times a mean log-ratio is small: the reward is what to look at. Evaluation draws one
    picture a caption, from the same noise every time. A checkpoint in the middle of a round holds the round.
    """

    images: tuple[str, ...] = ()
    keeps_vae = True
    start_tolerance = START_TOLERANCE  # log-ratios, which the size of a batch moves by some 1e-6
    optional_metrics = frozenset({"reward"})

    def __init__(
        self, model: Any, args: D3POConfig | None = None, *rest: Any, reward_functions: list[ImageReward], **kwargs: Any
    ) -> None:
        super().__init__(model, args, *rest, **kwargs)
        self.check_guidance()
        if self.reference is not None and self.reference_adapter is not None:
            raise UserError("start_adapter and another reference: its copy would be the reference, too; drop one")
        self.reward_functions = reward_functions
        args = self.args
        shape = self._latent_shape()
        self.sampler = build_sampler(
            args.sampler,
            self.scheduler_config,
            args.sampling_steps,
            family=self.family,
            latent_shape=shape,
            eta=args.sampling_eta,
            noise_level=args.noise_level,
        )
        steps = self.sampler.stochastic
        kept = max(1, round(args.timestep_fraction * len(steps)))
        self.shape = shape
        self.captions = self.latents.texts
        self.train_dataset: Any = RoundRows(
            self.train_dataset,
            rounds=args.rounds,
            pairs=args.pairs_per_round,
            steps=steps,
            kept_steps=kept,
            inner_epochs=args.inner_epochs,
            seed=args.seed,
        )
        self._check_rounds(kept)
        self.data_collator = RoundCollator(self.latents, ())
        self._round: Round | None = None
        logger.info("%s; %d of %d steps trained on.", self.describe(), kept, len(self.sampler))

    def describe(self) -> str:
        """Rounds, strength and rewards in words."""
        named = ", ".join(reward.__name__ for reward in self.reward_functions)
        args = self.args
        return f"{args.rounds} rounds of {args.pairs_per_round} pairs, beta {args.beta:g}, preferred by {named}"

    def _latent_shape(self) -> tuple[int, ...]:
        assert self.vae is not None
        side = self.resolution // self.family.vae_scale_factor
        return (self.vae.config.latent_channels, side, side)

    def _check_rounds(self, kept: int) -> None:
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.train_dataset.per_round % step:
            raise UserError(
                f"a round has {self.train_dataset.per_round} rows ({args.pairs_per_round} pairs, {kept} steps with "
                f"noise, {args.inner_epochs} inner_epochs) and an optimizer step takes {step}: make the first a "
                "multiple of the second, so that no step mixes rounds"
            )
        if args.pairs_per_round < args.world_size:
            raise UserError(
                f"pairs_per_round is {args.pairs_per_round} and there are {args.world_size} processes: each draws one "
                "pair or more"
            )
        steps = len(self.train_dataset) // step
        if args.max_steps > steps:
            raise UserError(
                f"max_steps is {args.max_steps} and the rounds have {steps} optimizer steps, after which they would "
                "be drawn again from the same noise: raise rounds"
            )

    @property
    def reward_scale(self) -> float:
        """beta."""
        return self.args.beta

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Clipped log-ratios of the transitions of a batch of pairs, the preferred picture's chosen."""
        drawn = self._drawn(int(inputs["round"][0]))
        device = inputs["row_id"].device
        pairs, steps = inputs["pair"].cpu(), inputs["step"].cpu()
        taken = self._taken(drawn, inputs)
        policy_model = self.accelerator.unwrap_model(model)
        if self.args.reference == PREVIOUS:
            reference = drawn.log_probs[steps, pairs].to(device)
        else:
            frozen = self.reference or policy_model
            with torch.no_grad(), frozen.using(self.reference_adapter):
                reference = self._logps(frozen, *taken)
        policy = self._logps(model, *taken)
        preference = drawn.preference[pairs].to(device)
        if self.args.ratio_clip is not None:
            inputs["clipped"] = clipped_fraction(policy, reference, self.args.ratio_clip)
        inputs["preferred"] = (preference != 0).float()
        inputs["rewards"] = drawn.rewards[pairs].to(device)
        return transition_scores(policy, reference, preference, clip=self.args.ratio_clip)

    def _taken(self, drawn: Round, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        """The transitions of a batch of B pairs, 2B rows: their steps, the latents before and after, the conditions."""
        device = inputs["row_id"].device
        pairs, steps = inputs["pair"].cpu(), inputs["step"].cpu()
        before = drawn.latents[steps, pairs].flatten(0, 1).to(device)
        after = drawn.latents[steps + 1, pairs].flatten(0, 1).to(device)
        return steps.repeat_interleave(SIDES), before, after, _repeated(inputs["conditions"])

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """See PairTrainerMixin: the transitions of all pairs together and pair by pair."""
        steps, before, after, conditions = self._taken(self._drawn(int(inputs["round"][0])), inputs)
        with torch.no_grad():
            whole = self._logps(model, steps, before, after, conditions)
            parts = []
            for start in range(0, len(steps), SIDES):
                rows = slice(start, start + SIDES)
                own = {name: value[rows] for name, value in conditions.items()}
                parts.append(self._logps(model, steps[rows], before[rows], after[rows], own))
        return float((whole - torch.cat(parts)).abs().max())

    def _logps(self, model: nn.Module, steps: Tensor, before: Tensor, after: Tensor, conditions: Conditions) -> Tensor:
        with self.accelerator.autocast():
            logps = transition_logps(self._guided(model), self.sampler, steps, before, after, conditions)
        return logps.float().reshape(-1, SIDES)

    def _guided(self, model: nn.Module) -> Denoise:
        empty = {name: value.to(self.accelerator.device) for name, value in self.unconditional.items()}
        return guided(model, empty, self.args.guidance_scale)

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """DPO of the clipped log-ratios, Eq. 14."""
        return {"d3po": losses.dpo(scores, beta=self.args.beta)}

    def row_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of pairs, the rewards of what was drawn, the shares of clipped ratios and of preferred pairs."""
        metrics = super().row_metrics(scores, inputs)
        metrics["reward"] = inputs["rewards"].mean(dim=(1, 2))
        metrics["pairs/preferred"] = inputs["preferred"]
        if "clipped" in inputs:
            metrics["ratios/clipped"] = inputs["clipped"]
        return metrics

    def _drawn(self, number: int) -> Round:
        if self._round is None or self._round.number != number:
            self._round = self._draw_round(number)
        return self._round

    def _draw_round(self, number: int) -> Round:
        """Draw two pictures for each caption of a round, each process its share, and let the rewards prefer one."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        ids = self.train_dataset.caption_ids(number)
        own = list(range(rank, len(ids), world))
        denoiser = self.accelerator.unwrap_model(self.model)
        training = denoiser.training
        denoiser.eval()
        size = max(1, self.args.sampling_batch_size // SIDES)
        batches = _batches(own, size)
        parts = [self._draw_pairs(denoiser, number, some, [ids[pair] for pair in some]) for some in batches]
        most = len(_batches(list(range(0, len(ids), world)), size))
        for _ in range(most - len(batches) if self.shards_weights else 0):  # all are asked for the weights as often
            self._rollout(denoiser, number, batches[0], [ids[pair] for pair in batches[0]])
        denoiser.train(training)
        drawn = [torch.cat(column, dim=axis) for column, axis in zip(zip(*parts, strict=True), (1, 1, 0), strict=True)]
        shares = gather_object([drawn]) if world > 1 else [drawn]
        latents, log_probs, rewards = (
            _interleaved([share[place] for share in shares], axis) for place, axis in enumerate((1, 1, 0))
        )
        self._refuse_failing(rewards)
        preference = self._preference(number, rewards)
        if not bool(preference.any()):
            logger.warning(
                "No pair of round %d has a winner, because both pictures have equal rewards: it teaches nothing.",
                number + 1,
            )
        return Round(number, latents, log_probs, preference, rewards)

    def _refuse_failing(self, rewards: Tensor) -> None:
        """Raise UserError where a reward gave nothing at all for a whole round."""
        for place, reward in enumerate(self.reward_functions):
            if bool(rewards[..., place].isnan().all()):
                why = "; ".join(reward.guarded.messages) or "it returned no number"
                raise UserError(f"{reward.__name__} gave no reward for any of a round's pictures: {why}")

    def _draw_pairs(
        self, denoiser: nn.Module, number: int, pairs: list[int], captions: list[int]
    ) -> tuple[Tensor, ...]:
        rollout = self._rollout(denoiser, number, pairs, captions)
        rewards = self._rewards(
            rollout.latents[-1], [self.captions[caption] for caption in captions for _ in range(SIDES)]
        )
        return (
            rollout.latents.unflatten(1, (-1, SIDES)),
            rollout.log_probs.unflatten(1, (-1, SIDES)),
            rewards.unflatten(0, (-1, SIDES)),
        )

    def _rollout(self, denoiser: nn.Module, number: int, pairs: list[int], captions: list[int]) -> Rollout:
        device, seed = self.accelerator.device, self.args.seed
        sides = [(pair, side) for pair in pairs for side in range(SIDES)]

        def noise(name: str, *step: int) -> Tensor:
            rows = [
                row_noise(
                    (seed, name, number, *step, pair),
                    [0 if name == "initial" and self.args.share_initial else side],
                    self.shape,
                )
                for pair, side in sides
            ]
            return torch.cat(rows).to(device)

        conditions = {name: value.to(device) for name, value in _repeated(self.latents.conditions(captions)).items()}
        with self.accelerator.autocast():
            return sample_transitions(
                self._guided(denoiser),
                self.sampler,
                conditions,
                initial=noise("initial"),
                noise=lambda step: noise("step", step),
            )

    @torch.no_grad()
    def _rewards(self, latents: Tensor, captions: list[str]) -> Tensor:
        """Rewards (N, R) of latents (N, C, h, w) decoded to pictures."""
        assert self.vae is not None
        images = [
            Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
            for some in latents.split(self.args.encode_batch_size)
            for picture in self.family.decode(self.vae, some.to(self.accelerator.device))
        ]
        return torch.stack([reward(captions, images) for reward in self.reward_functions], dim=1)

    def _preference(self, number: int, rewards: Tensor) -> Tensor:
        first, second = rewards.unbind(dim=1)
        if self.args.combine_rewards == RANDOM and rewards.shape[-1] > 1:
            rng = random.Random(f"{self.args.seed} {number}")
            one = torch.tensor([[rng.randrange(rewards.shape[-1])] for _ in range(len(rewards))])
            first, second = first.gather(1, one), second.gather(1, one)
        return pareto_preference(first, second)

    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list | None = None
    ) -> tuple[None, None, None]:
        """Draw a picture for each caption, from the same noise every time, and keep its reward."""
        inputs = self._prepare_inputs(inputs)
        rows = inputs["row_id"].tolist()
        seed, device = self.args.seed, self.accelerator.device
        with self.accelerator.autocast():
            rollout = sample_transitions(
                self._guided(self.accelerator.unwrap_model(model)),
                self.sampler,
                inputs["conditions"],
                initial=row_noise((seed, "eval"), rows, self.shape).to(device),
                noise=lambda step: row_noise((seed, "eval", step), rows, self.shape).to(device),
            )
        rewards = self._rewards(
            rollout.latents[-1], [self.captions[caption] for caption in inputs["caption_id"].tolist()]
        )
        self._eval_rows.add(inputs["row_id"], {"reward": rewards.mean(dim=1).to(device)})
        return None, None, None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and self._round is not None and folder != Path(self.args.output_dir):
            self._round.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._round = Round.load(Path(resume_from_checkpoint))


class PSOTrainer(D3POTrainer):
    """D3PO's loss on the few steps of a distilled model, all but the last, which has no noise (arXiv 2410.03190)."""


def _repeated(conditions: Conditions) -> Conditions:
    """Each row for both pictures of its pair."""
    return {name: value.repeat_interleave(SIDES, dim=0) for name, value in conditions.items()}


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _interleaved(shares: list[Tensor], axis: int) -> Tensor:
    """What rank r drew for the pairs r, r + ranks, ... in the order of the pairs."""
    total = sum(share.shape[axis] for share in shares)
    order = torch.tensor(
        [pair // len(shares) + sum(s.shape[axis] for s in shares[: pair % len(shares)]) for pair in range(total)]
    )
    return torch.cat(shares, dim=axis).index_select(axis, order)
