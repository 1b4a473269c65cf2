"""Preference optimisation of image models: the trainer of pairs, with denoising errors for scores."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmalign import losses
from llmalign.data.images import TIE
from llmalign.diffusion.configs import SFT, DiffusionPreferenceConfig, effective_beta
from llmalign.diffusion.image_trainer import ImageTrainer
from llmalign.diffusion.latents import FLIPPED, moments_to_latents
from llmalign.diffusion.noise import draw
from llmalign.diffusion.pipelines import Conditions
from llmalign.diffusion.process import Flow
from llmalign.diffusion.scores import PairErrors, denoising_errors, pair_scores
from llmalign.errors import UserError
from llmalign.trainers.pair_loss import PairLoss
from llmalign.types import PairScores

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
SATURATED = 5.0  # an argument of the logistic beyond which its gradient is below 1 %


@dataclass(frozen=True)
class Noisy:
    """Pictures made noisy, N = 2B with the chosen ones first; ``weight`` (N,) multiplies their errors."""

    latents: Tensor
    timesteps: Tensor
    conditions: Conditions
    target: Tensor
    weight: Tensor


class DiffusionPreferenceTrainer(PairLoss, ImageTrainer):
    """Trains with any pairwise loss of `llmalign.losses` on s = -error/2; `loss: dpo` is Diffusion-DPO (2311.12908).

    A pair meets one timestep and one noise in every epoch, drawn from a generator of its own. Evaluation uses a fixed
    grid of `eval_timesteps` timesteps, each with a noise of its own, flips and dropped captions off, latents at their
    means; a row's scores are averaged over the grid before they meet the loss, which is lower than of single draws.
    INPO's previous iterate is `start_adapter`, and its reference the network without adapters.
    """

    images: tuple[str, ...] = SIDES

    def __init__(self, model: Any, args: DiffusionPreferenceConfig | None = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None and kwargs.get("ref_model") is None:
            kwargs["ref_model"] = args.ref_model_name_or_path
        super().__init__(model, args, *rest, **kwargs)
        if self.args.timestep_sampling is not None:
            if not isinstance(self.process, Flow) and self.args.timestep_sampling != "uniform":
                raise UserError("timestep_sampling: logit_normal is for flow matching; this pipeline samples uniformly")
            if isinstance(self.process, Flow):
                uniform = self.args.timestep_sampling == "uniform"
                self.process = Flow(self.process.sigmas, self.process.timesteps, logit_normal=not uniform)
        self._check_timesteps()
        for name, rows in self.latents.sets.items() if self.args.ties == "drop" else ():
            if "label" in rows.column_names and TIE in rows["label"][:]:
                raise UserError(f"the {name} rows hold ties (labels of .5): leave them out, or set ties: soft")
        self.dimensions = int(torch.Size(self.latents.latent_shape).numel())
        self.error_scale = float(self.dimensions) if self.args.loss_reduction == "sum" else 1.0
        self.last_adapter: str | None = None
        self._settle_references(explicit=kwargs.get("ref_model") is not None)
        logger.info(self.describe())

    def _settle_references(self, *, explicit: bool) -> None:
        """What the copy of `start_adapter` is: the previous iterate for INPO, else the reference."""
        if self.args.loss == "inpo":
            self.last_adapter, self.reference_adapter = self.reference_adapter, None
            if self.last_adapter is not None:
                self.start_may_differ = None
            elif explicit:
                raise UserError("loss: inpo with another reference needs start_adapter, whose copy it compares with")
        elif explicit and self.reference_adapter is not None:
            raise UserError("start_adapter and another reference: its copy would be the reference, too; drop one")

    def describe(self) -> str:
        """Loss, strength and effective strength in words."""
        size = "x".join(map(str, self.latents.latent_shape))
        words = f"loss {self.args.loss}, latents {size} (D = {self.dimensions:,})"
        if "beta" in self.hyper_parameters:
            effective = effective_beta(self.args.beta, self.dimensions, self.args.loss_reduction)
            words += f", beta {self.args.beta:g}: {effective:.3g} a unit of summed squared error"
        return words

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The keywords of the loss; the plain denoising loss has none."""
        return {} if self.args.loss == SFT else super().hyper_parameters

    @property
    def reward_scale(self) -> float:
        """beta, tau or eta; 1 for the plain denoising loss."""
        return 1.0 if self.args.loss == SFT else super().reward_scale

    @property
    def score_scale(self) -> float:
        """What an error is multiplied by, without its sign, to make a score."""
        return self.error_scale / 2

    @property
    def error_space(self) -> str:
        """Whether errors are those of the network's target or of the noise."""
        return self.args.error_space

    def flips(self, args: Any) -> bool:
        """Mirror images are encoded where they may be used."""
        return args.random_flip != "none"

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Scores of a batch of pairs at one (timestep, noise) each in training, at the fixed grid in evaluation."""
        if model.training:
            return self._scored(model, inputs, self._train_batch(inputs))
        grid = self.args.eval_timesteps
        parts = [vars(self._scored(model, inputs, self._eval_batch(inputs, place))) for place in range(grid)]
        means = {
            name: torch.stack([part[name] for part in parts]).mean(dim=0)
            for name, value in parts[0].items()
            if value is not None
        }
        return PairScores(**means)

    def _scored(self, model: nn.Module, inputs: dict[str, Any], noisy: Noisy) -> PairScores:
        policy_model = self.model  # not unwrapped from `model`, for which accelerate looks at every module
        with torch.no_grad():  # before the policy, so that nothing of this pass is held while gradients are
            frozen = self.reference or policy_model
            with frozen.using(self.reference_adapter):
                reference = self._errors(frozen, noisy)
            previous: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.last_adapter is not None:
                with policy_model.using(self.last_adapter):
                    previous = self._errors(policy_model, noisy)
            elif self.args.loss == "inpo":
                previous = reference
        policy = self._errors(model, noisy)
        return self.to_scores(PairErrors(*policy, *reference, *previous), training=model.training)

    def to_scores(self, errors: PairErrors, *, training: bool) -> PairScores:
        """Scores of denoising errors; methods that weigh the sides differently replace it."""
        return pair_scores(errors, scale=self.error_scale)

    def _errors(self, model: nn.Module, noisy: Noisy) -> tuple[Tensor, Tensor]:
        """Errors (B,) of the chosen and of the rejected pictures."""
        with self.accelerator.autocast():
            prediction = model(noisy.latents, noisy.timesteps, noisy.conditions)
        chosen, rejected = (denoising_errors(prediction, noisy.target) * noisy.weight).chunk(2)
        return chosen, rejected

    def _train_batch(self, inputs: dict[str, Any]) -> Noisy:
        epoch = int((self.state.epoch or 0.0) + 1e-9)
        rows = inputs["row_id"].tolist()
        draws = draw((self.args.seed, "train", epoch), rows, self.latents.latent_shape, shared=self.args.shared_noise)
        device = inputs["row_id"].device
        flip = draws.flip < 0.5
        if self.args.random_flip == "pair":
            flip = flip[:, :1].expand(-1, 2)
        pictures = []
        for side, name in enumerate(self.images):
            moments = inputs[name]
            if self.args.random_flip != "none":
                mirrored = flip[:, side].to(device)[:, None, None, None]
                moments = torch.where(mirrored, inputs[name + FLIPPED], moments)
            noise = draws.latent[:, side].to(device) if self.args.sample_latents else None
            pictures.append(moments_to_latents(moments, noise, self.family))
        pictures = self.both_sides(pictures, inputs, (epoch,))
        conditions = self._dropped(inputs["conditions"], (draws.drop < self.args.caption_dropout).to(device))
        return self._noisy(pictures, draws.noise.to(device), self.timesteps(draws.time).to(device), conditions)

    def _eval_batch(self, inputs: dict[str, Any], place: int) -> Noisy:
        rows = inputs["row_id"].tolist()
        draws = draw((self.args.seed, "eval", place), rows, self.latents.latent_shape)
        device = inputs["row_id"].device
        middle = torch.full_like(draws.time, (place + 0.5) / self.args.eval_timesteps)
        pictures = [moments_to_latents(inputs[name], None, self.family) for name in self.images]
        pictures = self.both_sides(pictures, inputs, ("eval",))
        return self._noisy(pictures, draws.noise.to(device), self.timesteps(middle).to(device), inputs["conditions"])

    def both_sides(self, pictures: list[Tensor], inputs: dict[str, Any], key: tuple[int | str, ...]) -> list[Tensor]:
        """The latents (B, C, h, w) of chosen and rejected pictures; methods that make one side replace it."""
        return pictures

    def _noisy(self, pictures: list[Tensor], noise: Tensor, index: Tensor, conditions: Conditions) -> Noisy:
        clean, noise, index = torch.cat(pictures), noise.transpose(0, 1).flatten(0, 1), index.repeat(2)
        weight = torch.ones_like(index, dtype=torch.float32)
        if self.error_space == "noise":
            weight = self.process.noise_weight(index).float()
        return Noisy(
            latents=self.process.add_noise(clean, noise, index),
            timesteps=self.process.model_timesteps(index),
            conditions={name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in conditions.items()},
            target=self.process.target(clean, noise, index),
            weight=weight,
        )

    def _dropped(self, conditions: Conditions, drop: Tensor) -> Conditions:
        if self.args.caption_dropout == 0:
            return conditions
        empty = {name: value.to(drop.device) for name, value in self.latents.empty().items()}
        return {
            name: torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
            for name, value in conditions.items()
        }

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Indices (B,) into the schedule from uniform numbers."""
        if self.args.train_timesteps is None:
            return self.process.draw(uniform)
        known = torch.tensor(self.args.train_timesteps)
        return known[(uniform.double() * len(known)).long()]

    def _check_timesteps(self) -> None:
        wrong = [step for step in self.args.train_timesteps or [] if not 0 <= step < len(self.process)]
        if wrong:
            raise UserError(
                f"train_timesteps: {wrong[0]} is outside the schedule, which has 0 to {len(self.process) - 1}"
            )

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The chosen loss; under `ties: soft` cDPO with a rate a row; with `winner_guard: sft` the winners' term."""
        args = self.args
        if args.loss == SFT:
            return {SFT: -2 * scores.chosen}
        if args.ties == "soft":
            unsure, rate = 1 - inputs["label"], args.flip_rate or 0.0
            rates = unsure * (1 - rate) + (1 - unsure) * rate
            terms = {args.loss: losses.cdpo(scores, beta=args.beta, flip_rate=rates.to(scores.chosen.dtype))}
        elif args.loss == "irpo":  # an error is a mean already
            ones = torch.ones_like(scores.chosen)
            terms = super().loss_terms(replace(scores, chosen_lengths=ones, rejected_lengths=ones), inputs)
        else:
            terms = super().loss_terms(scores, inputs)
        if args.winner_guard == SFT:
            excess = torch.relu(args.winner_error_limit * scores.ref_chosen - scores.chosen)  # scores are negative
            terms["winner_sft"] = args.winner_sft_weight * self.reward_scale * excess
        return terms

    def row_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of pairs, the denoising errors, and how far the logistic is saturated."""
        metrics = super().row_metrics(scores, inputs)
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
            metrics[f"error/{name}"] = -2 / self.error_scale * getattr(scores, name)
        margins = metrics["rewards/margins"]
        metrics["rewards/margins_abs"] = margins.abs()
        metrics["rewards/saturated"] = (margins.abs() > SATURATED).float()
        return metrics

    def start_gap(self, scores: PairScores) -> Tensor:
        """INPO starts from the previous iterate, every other loss from the reference."""
        if scores.last_chosen is None or scores.last_rejected is None:
            return super().start_gap(scores)
        return super().start_gap(replace(scores, ref_chosen=scores.last_chosen, ref_rejected=scores.last_rejected))

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """See PairTrainerMixin: the pictures denoised together and one by one."""
        noisy = self._train_batch(inputs)
        with torch.no_grad():
            whole = torch.cat(self._errors(model, noisy))
            parts = []
            for row in range(len(noisy.timesteps)):
                one = {name: value[row : row + 1] for name, value in vars(noisy).items() if name != "conditions"}
                own = {name: value[row : row + 1] for name, value in noisy.conditions.items()}
                with self.accelerator.autocast():
                    prediction = model(one["latents"], one["timesteps"], own)
                parts.append(denoising_errors(prediction, one["target"]) * one["weight"])
        return float((whole - torch.cat(parts)).abs().max()) * self.score_scale
