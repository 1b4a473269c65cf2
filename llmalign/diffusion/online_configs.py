"""Configs of the methods that sample their own pictures: D3PO and online PSO."""

from dataclasses import dataclass, field
from typing import Any

from llmalign.diffusion.configs import ImageConfig
from llmalign.diffusion.samplers import DDIM, EULER, FLOW, SAMPLERS
from llmalign.errors import UserError
from llmalign.trainers.validation import positive, refuse_inherited, require

INITIAL, PREVIOUS = REFERENCES = ("initial", "previous")
PARETO, RANDOM = COMBINATIONS = ("pareto", "random")
_SETTLED = {
    "train_sampling_strategy": "the order within a round is drawn from its seed",
    "num_train_epochs": "rounds and inner_epochs say how much is trained",
    "winner_guard": "there are no denoising errors",
}


@dataclass
class D3POConfig(ImageConfig):
    """D3PO (arXiv 2311.13231); the defaults are those of the authors' code for SD 1.5.

    A round draws two pictures for each of `pairs_per_round` captions, rewards them, and trains on all their steps that
    have noise, `inner_epochs` times. One optimizer step of the authors' takes all steps of a group of pairs: set
    gradient_accumulation_steps to match.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "brightness, (in)compressibility, clip:MODEL, module:function, file.py:function."},
    )
    rounds: int = field(default=400, metadata={"help": "How often pictures are drawn and trained on."})
    pairs_per_round: int = field(default=20, metadata={"help": "Pairs of pictures a round, over all processes."})
    inner_epochs: int = field(default=1, metadata={"help": "Passes over the steps of a round."})
    timestep_fraction: float = field(default=1.0, metadata={"help": "Share of a pair's steps that is trained on."})
    sampler: str | None = field(
        default=None, metadata={"help": f"{', '.join(SAMPLERS)}; left open: flow_sde for flows, else ddim."}
    )
    sampling_steps: int = field(default=20, metadata={"help": "Steps of the sampler."})
    sampling_eta: float = field(default=1.0, metadata={"help": "ddim: share of noise, in (0, 1]."})
    noise_level: float = field(default=0.7, metadata={"help": "flow_sde: strength of the noise."})
    guidance_scale: float = field(
        default=5.0, metadata={"help": "Classifier-free guidance in policy and reference; 1: off."}
    )
    sampling_batch_size: int = field(default=16, metadata={"help": "Pictures drawn at a time."})
    share_initial: bool = field(default=True, metadata={"help": "Both pictures of a pair start from one noise."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the reference."})
    ratio_clip: float | None = field(
        default=0.1, metadata={"help": "Clamp of the probability ratios, on both sides (in the code, not the paper)."}
    )
    reference: str = field(
        default=INITIAL, metadata={"help": "initial, or previous: the policy that drew the round's pictures."}
    )
    combine_rewards: str = field(
        default=PARETO, metadata={"help": "Several rewards: pareto (no worse in any), or random (one of them a pair)."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Settled: rounds come in order."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Settled: see rounds."})
    winner_guard: str = field(default="off", metadata={"help": "Settled: there are no denoising errors."})

    def __post_init__(self) -> None:
        refuse_inherited(self, _SETTLED)
        if not self.reward_funcs:
            raise UserError("reward_funcs is empty: name what judges the pictures, such as brightness or clip:MODEL")
        positive(
            self, "rounds", "pairs_per_round", "inner_epochs", "sampling_steps", "noise_level", "sampling_batch_size",
            "beta",
        )  # fmt: skip
        require(0 < self.timestep_fraction <= 1, "timestep_fraction", self.timestep_fraction, "in (0, 1]")
        require(0 < self.sampling_eta <= 1, "sampling_eta", self.sampling_eta, "in (0, 1]")
        require(self.sampler in (None, *SAMPLERS), "sampler", self.sampler, f"one of {', '.join(SAMPLERS)}")
        for name, kind in (("sampling_eta", DDIM), ("noise_level", FLOW)):
            if self.sampler not in (None, kind):
                refuse_inherited(self, {name: f"it belongs to sampler: {kind}"})
        require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "1 (off) or more")
        require(self.reference in REFERENCES, "reference", self.reference, "initial or previous")
        require(self.combine_rewards in COMBINATIONS, "combine_rewards", self.combine_rewards, "pareto or random")
        if self.ratio_clip is not None:
            require(0 < self.ratio_clip < 1, "ratio_clip", self.ratio_clip, "in (0, 1), or null")
        _best_by_reward(self)
        super().__post_init__()


def _best_by_reward(args: Any) -> None:
    """Let the reward pick the best checkpoint: an evaluation has no loss."""
    if args.metric_for_best_model is None and (args.load_best_model_at_end or args.save_strategy == "best"):
        args.metric_for_best_model, args.greater_is_better = "reward", True


@dataclass
class PSOConfig(D3POConfig):
    """Online PSO (arXiv 2410.03190): D3PO's loss on a distilled model's few steps; the code's values for SDXL-Turbo."""

    sampler: str | None = field(default=EULER, metadata={"help": f"The distilled model's: {', '.join(SAMPLERS)}."})
    sampling_steps: int = field(default=4, metadata={"help": "Steps of the sampler; the last has no noise."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance; distilled models have none."}
    )
    share_initial: bool = field(default=False, metadata={"help": "Both pictures of a pair start from one noise."})
    beta: float = field(default=50.0, metadata={"help": "Strength of the reference."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    combine_rewards: str = field(default=RANDOM, metadata={"help": "Several rewards: random (one a pair), or pareto."})
