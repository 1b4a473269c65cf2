"""Offline PSO: a distilled few-step model, trained at its own timesteps alone (arXiv 2410.03190)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmalign import losses
from llmalign.diffusion.configs import DiffusionPreferenceConfig
from llmalign.diffusion.process import Flow
from llmalign.diffusion.ratios import pso_scores
from llmalign.diffusion.samplers import EULER, SAMPLERS, build_sampler
from llmalign.diffusion.scores import PairErrors
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.errors import UserError
from llmalign.trainers.validation import positive, refuse_inherited, require
from llmalign.types import PairScores

PSO, PSO_DB = VARIANTS = ("pso", "pso_db")
_FOREIGN = {
    "loss": "the variant decides: pso (logistic) or pso_db (hinge, no reference)",
    "loss_reduction": "its errors are means",
    "error_space": "its errors are those of the noise",
    "train_timesteps": "they are the sampler's",
    "timestep_sampling": "its timesteps are the sampler's, each as often",
    "ties": "it has no soft labels",
    "winner_guard": "its prior term holds the errors",
}


@dataclass
class PSOOfflineConfig(DiffusionPreferenceConfig):
    """Offline PSO; the defaults are those of the authors' personalisation script for SDXL-Turbo."""

    beta: float = field(default=5.0, metadata={"help": "Strength, on errors without Diffusion-DPO's 1/2."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    variant: str = field(default=PSO, metadata={"help": "pso, or pso_db: a hinge without reference."})
    negative_factor: float = field(default=0.1, metadata={"help": "Weight of the rejected picture's error."})
    prior_weight: float = field(default=0.5, metadata={"help": "Weight of the term that keeps its error low."})
    sampler: str | None = field(default=EULER, metadata={"help": f"The distilled model's: {', '.join(SAMPLERS)}."})
    sampling_steps: int = field(default=4, metadata={"help": "Its steps; their timesteps are trained on."})
    winner_guard: str = field(default="off", metadata={"help": "Settled: the prior term holds the errors."})

    def __post_init__(self) -> None:
        refuse_inherited(self, _FOREIGN)
        require(self.variant in VARIANTS, "variant", self.variant, f"one of {', '.join(VARIANTS)}")
        require(self.sampler in (None, *SAMPLERS), "sampler", self.sampler, f"one of {', '.join(SAMPLERS)}")
        positive(self, "sampling_steps", "negative_factor")
        require(self.prior_weight >= 0, "prior_weight", self.prior_weight, "zero or more")
        super().__post_init__()


class PSOOfflineTrainer(DiffusionPreferenceTrainer):
    """PSO on pairs: -log sigmoid of beta [(ref_err_w - n ref_err_l) - (err_w - n err_l)], plus a prior on err_l.

    n is `negative_factor`; pairs are the wanted pictures and the distilled model's own. Errors are those of the noise.
    """

    def __init__(self, model: Any, args: PSOOfflineConfig | None = None, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *rest, **kwargs)
        if isinstance(self.process, Flow):
            raise UserError("method: pso_offline is for distilled diffusion models; this pipeline matches flows")
        if self.args.variant == PSO_DB:
            self.start_may_differ = "this variant has no reference"
        sampler = build_sampler(
            self.args.sampler,
            self.scheduler_config,
            self.args.sampling_steps,
            family=self.family,
            latent_shape=self.latents.latent_shape,
        )
        self.distilled = sampler.timesteps.long()

    def describe(self) -> str:
        """Variant, strength and weights in words."""
        args = self.args
        return (
            f"{args.variant}, beta {args.beta:g}, negative_factor {args.negative_factor:g}, prior_weight "
            f"{args.prior_weight:g}, at the {args.sampling_steps} timesteps of the sampler"
        )

    @property
    def score_scale(self) -> float:
        """A score is minus an error."""
        return 1.0

    @property
    def error_space(self) -> str:
        """Errors of the noise."""
        return "noise"

    def timesteps(self, uniform: Tensor) -> Tensor:
        """The distilled sampler's timesteps, each as often."""
        return self.distilled[(uniform.double() * len(self.distilled)).long()]

    def to_scores(self, errors: PairErrors, *, training: bool) -> PairScores:
        """Scores -error, the rejected ones weighed."""
        return pso_scores(errors, negative_factor=self.args.negative_factor, with_reference=self.args.variant == PSO)

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The logistic or the hinge, and the prior."""
        loss = losses.dpo if self.args.variant == PSO else losses.slic
        prior = -self.args.prior_weight / self.args.negative_factor * scores.rejected
        return {self.args.variant: loss(scores, beta=self.args.beta), "prior": prior}

    def row_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of pairs, their errors as they are."""
        metrics = super().row_metrics(scores, inputs)
        for name in ("chosen", "ref_chosen"):
            metrics[f"error/{name}"] = metrics[f"error/{name}"] / 2
        for name in ("rejected", "ref_rejected"):
            metrics[f"error/{name}"] = metrics[f"error/{name}"] / (2 * self.args.negative_factor)
        return metrics
