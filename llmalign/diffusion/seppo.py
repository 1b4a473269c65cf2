"""SePPO: winners alone; the other side is sampled from a past checkpoint (arXiv 2410.05255)."""

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmalign.diffusion.configs import DiffusionPreferenceConfig
from llmalign.diffusion.pipelines import Conditions
from llmalign.diffusion.ratios import FLIP_RULES, SIGN, seppo_scores
from llmalign.diffusion.rollouts import guided, row_noise, sample_latents
from llmalign.diffusion.samplers import build_sampler
from llmalign.diffusion.scores import PairErrors
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.errors import UserError
from llmalign.processes import from_all_processes
from llmalign.trainers.validation import positive, refuse_inherited, require
from llmalign.types import PairScores

logger = logging.getLogger(__name__)

PAST = "past_{}"
_FOREIGN = {
    "ties": "it has winners alone",
    "ref_model_name_or_path": "the reference is a past checkpoint of the policy",
    "start_adapter": "the first checkpoint is the network without adapters",
}


@dataclass
class SePPOConfig(DiffusionPreferenceConfig):
    """SePPO; what the paper leaves open (beta, the sampler) is Diffusion-DPO's."""

    beta: float = field(default=5000.0, metadata={"help": "Strength of the reference, the paper's beta (T in it)."})
    checkpoint_every: int = field(default=30, metadata={"help": "Optimizer steps between two past checkpoints."})
    flip_rule: str = field(
        default=SIGN,
        metadata={"help": "sign: the sample counts as a winner where the policy lags; indicator: not at all."},
    )
    tie: int = field(
        default=1, metadata={"help": "Where the policy is no better and no worse: 1 plain DPO, 0 nothing."}
    )
    sampling_steps: int = field(default=50, metadata={"help": "Steps of the sampler (DDIM, or Euler for flows)."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Classifier-free guidance of the samples; 1: off."})

    def __post_init__(self) -> None:
        if self.loss != "dpo":
            raise UserError(f"SePPO's loss is dpo with one side flipped, and loss is {self.loss}: leave it out")
        refuse_inherited(self, _FOREIGN)
        positive(self, "checkpoint_every", "sampling_steps")
        require(self.flip_rule in FLIP_RULES, "flip_rule", self.flip_rule, f"one of {', '.join(FLIP_RULES)}")
        require(self.tie in (0, 1), "tie", self.tie, "1 or 0")
        require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "1 (off) or more")
        super().__post_init__()


class SePPOTrainer(DiffusionPreferenceTrainer):
    """Diffusion-DPO of winners against samples of a past checkpoint j, drawn anew every `checkpoint_every` steps.

    The reference is the same checkpoint; checkpoint 0 is the network without adapters, the others are frozen copies of
    the adapter. Where the policy denoises the winner worse than the reference does, the sample is a winner, too.
    Evaluation compares with samples of checkpoint 0, none of them flipped. Needs LoRA.
    """

    images: tuple[str, ...] = ("image",)
    optional_metrics = frozenset({"error/rejected", "error/ref_rejected"})

    def __init__(self, model: Any, args: SePPOConfig | None = None, *rest: Any, **kwargs: Any) -> None:
        if kwargs.get("peft_config") is None:
            raise UserError("SePPO keeps its past checkpoints as adapters: set use_peft: true")
        if kwargs.get("ref_model") is not None:
            raise UserError(f"SePPO takes no ref_model: {_FOREIGN['ref_model_name_or_path']}")
        super().__init__(model, args, *rest, **kwargs)
        self.check_guidance()
        self.sampler = build_sampler(
            None,
            self.scheduler_config,
            self.args.sampling_steps,
            family=self.family,
            latent_shape=self.latents.latent_shape,
            eta=0.0,
            noise_level=0.0,
        )
        self._eval_samples: dict[tuple[int, int], Tensor] = {}  # by row and caption: several sets may share row ids

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """See DiffusionPreferenceTrainer; the checkpoint of this step is chosen first."""
        self.reference_adapter = self.past_checkpoint() if model.training else None
        return super().scores(model, inputs)

    def past_checkpoint(self) -> str | None:
        """The checkpoint that this optimizer step compares with, by the adapter's name; one is kept when it is due."""
        count = self.state.global_step // self.args.checkpoint_every + 1
        denoiser = self.accelerator.unwrap_model(self.model)
        newest = PAST.format(count - 1)
        if count > 1 and newest not in denoiser.adapters:
            denoiser.add_copy(newest)
            logger.info("Step %d: the policy is kept as checkpoint %d.", self.state.global_step, count - 1)
        chosen = random.Random(f"{self.args.seed} {count}").randrange(count)
        return PAST.format(chosen) if chosen else None

    def both_sides(self, pictures: list[Tensor], inputs: dict[str, Any], key: tuple[int | str, ...]) -> list[Tensor]:
        """The winners, and samples of the checkpoint for the same captions."""
        rows = inputs["row_id"].tolist()
        if key == ("eval",):
            known = list(zip(rows, inputs["caption_id"].tolist(), strict=True))
            missing = [place for place, row in enumerate(known) if row not in self._eval_samples]
            if self.shards_weights and any(from_all_processes(bool(missing))):  # one that samples needs the others
                missing = list(range(len(known)))
            if missing:
                conditions = {name: value[missing] for name, value in inputs["conditions"].items()}
                drawn = self._sample([rows[place] for place in missing], conditions, key).cpu()
                self._eval_samples |= dict(zip([known[place] for place in missing], drawn, strict=True))
            samples = torch.stack([self._eval_samples[row] for row in known]).to(pictures[0])
        else:
            samples = self._sample(rows, inputs["conditions"], key)
        return [*pictures, samples]

    def _sample(self, rows: list[int], conditions: Conditions, key: tuple[int | str, ...]) -> Tensor:
        device = self.accelerator.device
        initial = row_noise((self.args.seed, "sample", *key), rows, self.latents.latent_shape).to(device)
        empty = {name: value.to(device) for name, value in self.unconditional.items()}
        denoiser = self.accelerator.unwrap_model(self.model)
        denoise = guided(denoiser, empty, self.args.guidance_scale)
        with torch.no_grad(), self.accelerator.autocast(), denoiser.using(self.reference_adapter):
            return sample_latents(denoise, self.sampler, conditions, initial=initial)

    def to_scores(self, errors: PairErrors, *, training: bool) -> PairScores:
        """In training with the sample's side flipped where the policy lags behind the checkpoint."""
        if not training:
            return super().to_scores(errors, training=training)
        return seppo_scores(errors, rule=self.args.flip_rule, tie=self.args.tie, scale=self.error_scale)

    def row_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of pairs, and the share of rows in which the policy lags, so that the sample is no loser."""
        metrics = super().row_metrics(scores, inputs)
        for name in ("error/rejected", "error/ref_rejected"):
            metrics[name] = metrics[name].abs()  # flipped; 0 where the sample is left out
            metrics[name] = metrics[name].masked_fill(metrics[name] == 0, torch.nan)
        metrics["seppo/lagging"] = (scores.chosen < scores.ref_chosen).float()
        return metrics
