"""Configs of the image methods, validated where they are made."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from llmalign.errors import UserError
from llmalign.trainers.pair_loss import HYPER_PARAMETERS, UNBOUNDED, check_pair_loss
from llmalign.trainers.validation import (
    NAN_FILTER,
    ChosenHardware,
    best_by_accuracy,
    positive,
    refuse_inherited,
    require,
)

#: Inherited fields that image trainers do not honour, and what to do instead.
_NOT_HONOURED = {
    "label_smoothing_factor": "use loss: rdpo or cdpo with flip_rate",
    "neftune_noise_alpha": "it belongs to token embeddings",
    "use_liger_kernel": "it belongs to language models",
    "include_for_metrics": "metrics are means over rows",
    "batch_eval_metrics": "metrics are means over rows",
    "gradient_checkpointing_kwargs": "use activation_checkpointing",
}
SFT = "sft"
LOSSES: dict[str, tuple[str, ...]] = {**HYPER_PARAMETERS, SFT: ()}
GUARDS = ("warn", "stop", SFT, "off")


@dataclass
class ImageConfig(ChosenHardware, TrainingArguments):
    """What all image methods share, beside transformers' TrainingArguments; the hardware decides what is left open."""

    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; left open: where CUDA has it."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": NAN_FILTER})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads what it needs."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every trained weight is used."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "None of them changes by itself."})
    resolution: int | None = field(
        default=None, metadata={"help": "Pictures' side in pixels; left open: what the network was made for."}
    )
    guidance_embedding: float = field(
        default=3.5, metadata={"help": "What a network with distilled guidance (Flux dev) is told."}
    )
    start_adapter: str | None = field(
        default=None, metadata={"help": "A LoRA file or run that training goes on from; its copy is the reference."}
    )
    image_cache_dir: str | None = field(
        default=None, metadata={"help": "Encoded pictures and captions; left open: ~/.cache/llmalign/images."}
    )
    encode_batch_size: int = field(default=8, metadata={"help": "Pictures encoded at a time."})
    channels_last: bool | None = field(
        default=None, metadata={"help": "Memory layout of convolutions; left open: channels last for UNets on CUDA."}
    )

    def __post_init__(self) -> None:
        refuse_inherited(self, _NOT_HONOURED)
        require(not self.remove_unused_columns, "remove_unused_columns", True, "false")
        if self.resolution is not None:
            positive(self, "resolution")
        positive(self, "encode_batch_size")
        super().__post_init__()


@dataclass
class DiffusionPreferenceConfig(ImageConfig):
    """Any pairwise loss on denoising errors; the defaults are Diffusion-DPO's for SD 1.5 (arXiv 2311.12908).

    `loss: sft` is the plain denoising loss on the winners, the baseline. With `loss_reduction: sum` errors are summed
    over the latent's dimensions D, so that beta means the same at every resolution: beta_sum = beta / D.
    """

    loss: str = field(default="dpo", metadata={"help": f"{', '.join(LOSSES)}."})
    beta: float = field(default=2000.0, metadata={"help": "Strength of the reference, the paper's beta (T in it)."})
    tau: float | None = field(default=None, metadata={"help": "ipo, ripo, inpo: strength of the reference."})
    flip_rate: float | None = field(default=None, metadata={"help": "cdpo, rdpo, ripo, rslic: share of wrong labels."})
    eta: float | None = field(default=None, metadata={"help": "rpo: weight of the winner's error; inpo: step size."})
    alpha: float | None = field(default=None, metadata={"help": "irpo: weight of the winner's error, without beta."})
    loss_reduction: str = field(default="mean", metadata={"help": "mean (official) or sum over a latent's dimensions."})
    error_space: str = field(
        default="target", metadata={"help": "target, or noise: weight v and flow errors as errors of the noise."}
    )
    timestep_sampling: str | None = field(
        default=None, metadata={"help": "uniform or logit_normal (flow matching alone, where it is the default)."}
    )
    train_timesteps: list[int] | None = field(
        default=None, metadata={"help": "Train on these timesteps alone (a distilled model's), each as often."}
    )
    shared_noise: bool = field(default=True, metadata={"help": "One noise for both pictures of a pair."})
    sample_latents: bool = field(default=True, metadata={"help": "Draw the VAE's latents anew; false: their mean."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of pairs seen with an empty caption."})
    random_flip: str = field(default="none", metadata={"help": "none, image (each alone, official) or pair (as one)."})
    ties: str = field(default="drop", metadata={"help": "drop, or soft: ties and unsure labels as soft labels (cDPO)."})
    eval_timesteps: int = field(default=8, metadata={"help": "Timesteps of the fixed grid that evaluation uses."})
    winner_error_limit: float = field(
        default=1.2, metadata={"help": "The guard acts where a winner's error exceeds the reference's this many times."}
    )
    winner_guard: str = field(
        default="warn", metadata={"help": "warn, stop (the run, saved), sft (a term on such winners) or off."}
    )
    winner_sft_weight: float = field(
        default=1.0, metadata={"help": "winner_guard: sft: weight of the excess, in units of the reward scale."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another reference than the model that training starts from."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        check_pair_loss(self, LOSSES)
        if "beta" not in LOSSES[self.loss]:
            own = ", ".join(LOSSES[self.loss]) or "no strength of the reference"
            refuse_inherited(self, {"beta": f"loss: {self.loss} takes {own}"})
        if self.loss in UNBOUNDED:
            best_by_accuracy(self, self.loss)
        require(self.loss_reduction in ("mean", "sum"), "loss_reduction", self.loss_reduction, "mean or sum")
        require(self.error_space in ("target", "noise"), "error_space", self.error_space, "target or noise")
        samplings = (None, "uniform", "logit_normal")
        require(
            self.timestep_sampling in samplings, "timestep_sampling", self.timestep_sampling, "uniform or logit_normal"
        )
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "in [0, 1)")
        require(self.random_flip in ("none", "image", "pair"), "random_flip", self.random_flip, "none, image or pair")
        require(self.ties in ("drop", "soft"), "ties", self.ties, "drop or soft")
        if self.ties == "soft" and self.loss not in ("dpo", "cdpo"):
            raise UserError(
                f"ties: soft gives soft labels, which loss: {self.loss} cannot take; use dpo, cdpo or ties: drop"
            )
        require(self.winner_guard in GUARDS, "winner_guard", self.winner_guard, f"one of {', '.join(GUARDS)}")
        require(self.winner_error_limit > 1, "winner_error_limit", self.winner_error_limit, "above 1")
        positive(self, "eval_timesteps", "winner_sft_weight")
        if self.winner_guard != SFT:
            refuse_inherited(self, {"winner_sft_weight": "it belongs to winner_guard: sft"})
        if self.train_timesteps is not None and not self.train_timesteps:
            raise UserError("train_timesteps is empty; name at least one, or leave it out")
        if self.train_timesteps is not None and self.timestep_sampling is not None:
            raise UserError("train_timesteps are trained on evenly, so timestep_sampling has no part; drop one")
        super().__post_init__()


def effective_beta(beta: float, dimensions: int, reduction: str) -> float:
    """The factor of the sum of squared errors inside the logistic: beta / (2 D), or beta / 2 where errors are sums."""
    return beta / (2 * dimensions) if reduction == "mean" else beta / 2
