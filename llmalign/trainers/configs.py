"""One config per method, validated where it is made; what TRL's configs hold is inherited, or refused by name."""

import math
from dataclasses import dataclass, field

import trl

from llmalign.errors import UserError
from llmalign.scores.scoring import AUTO, KINDS
from llmalign.trainers.batching import check_batching
from llmalign.trainers.pair_loss import HYPER_PARAMETERS, UNBOUNDED, check_pair_loss
from llmalign.trainers.validation import (
    CHECKPOINTING,
    NAN_FILTER,
    ChosenHardware,
    best_by_accuracy,
    check_flip_rate,
    positive,
    refuse_inherited,
    require,
)

#: Inherited fields that a score-based loss does not honour, and what to do instead.
_NOT_HONOURED = {
    "loss_type": "choose the loss by the method (or method: pair with loss: ...)",
    "loss_weights": "losses are not mixed; rpo and irpo hold their own second term",
    "label_smoothing": "use method: rdpo with flip_rate, or method: pair with loss: cdpo and flip_rate",
    "label_smoothing_factor": "use method: rdpo with flip_rate, or method: pair with loss: cdpo and flip_rate",
    "ld_alpha": "use method: dpo, TRL's own trainer",
    "f_divergence_type": "use method: dpo, TRL's own trainer",
    "f_alpha_divergence_coef": "use method: dpo, TRL's own trainer",
    "use_weighting": "use method: dpo, TRL's own trainer",
    "discopop_tau": "use method: dpo, TRL's own trainer",
    "sync_ref_model": "the papers' reference is frozen; use method: dpo, TRL's own trainer",
    "ref_model_mixup_alpha": "the papers' reference is frozen; use method: dpo, TRL's own trainer",
    "ref_model_sync_steps": "the papers' reference is frozen; use method: dpo, TRL's own trainer",
    "padding_free": "TRL 1.16 ignores it",
    "disable_dropout": "dropout makes policy and reference differ before the first step",
    "truncation_mode": "only keep_start is supported, TRL deprecates the other",
    "pad_token": "set tokenizer.pad_token",
    "neftune_noise_alpha": "noise in the embeddings makes policy and reference differ before the first step",
    "include_for_metrics": "metrics are sums over rows, full logits are never built",
    "batch_eval_metrics": "metrics are sums over rows, full logits are never built",
    "use_liger_kernel": "TRL deprecates it; use model_init_kwargs {use_kernels: true}",
}


@dataclass
class DPOConfig(ChosenHardware, trl.DPOConfig):
    """TRL's DPOConfig with precision, device and checkpointing chosen from the hardware where they are left open."""

    gradient_checkpointing: bool | None = field(default=None, metadata={"help": CHECKPOINTING})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": NAN_FILTER})


@dataclass
class SFTConfig(ChosenHardware, trl.SFTConfig):
    """TRL's SFTConfig with precision, device and checkpointing chosen from the hardware where they are left open."""

    gradient_checkpointing: bool | None = field(default=None, metadata={"help": CHECKPOINTING})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": NAN_FILTER})


@dataclass
class RewardConfig(ChosenHardware, trl.RewardConfig):
    """TRL's RewardConfig with precision, device and checkpointing chosen from the hardware where they are left open."""

    gradient_checkpointing: bool | None = field(default=None, metadata={"help": CHECKPOINTING})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": NAN_FILTER})


@dataclass
class ScoreConfig(DPOConfig):
    """What all score-based methods share; inherited fields that they would ignore are refused unless at default."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another reference than the model that training starts from."}
    )
    scoring: str = field(
        default=AUTO, metadata={"help": "auto, shared_prompt (prompts read once), padding_free or padded."}
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Cut each step into micro-batches of at most so many tokens; open: by rows."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None, metadata={"help": "Look the reference up in the cache on disk, filled first; open: by cost."}
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "The cache's folder; open: ~/.cache/llmalign/reference."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained weight is used; searching costs a pass over the graph a step."}
    )
    alarm_chosen_drop: float = field(
        default=50.0, metadata={"help": "Warn when the mean chosen log-prob falls this many nats below the reference."}
    )
    alarm_prompts: int = field(
        default=8, metadata={"help": "Prompts of the evaluation set to generate for, to spot repetition; 0: none."}
    )
    alarm_new_tokens: int = field(default=128, metadata={"help": "Longest generation of the alarm, in tokens."})

    def __post_init__(self) -> None:
        refuse_inherited(self, _NOT_HONOURED | self._unused())
        super().__post_init__()
        if self.tokens_per_batch is not None:
            self.choices += f", micro-batches of at most {self.tokens_per_batch} tokens"
        require(self.scoring in KINDS, "scoring", self.scoring, f"one of {', '.join(KINDS)}")
        check_batching(self)
        positive(self, "alarm_chosen_drop", "alarm_new_tokens")
        require(self.alarm_prompts >= 0, "alarm_prompts", self.alarm_prompts, "zero or more")

    def _unused(self) -> dict[str, str]:
        """Inherited fields that this method's loss has no place for."""
        return {}


@dataclass
class PairConfig(ScoreConfig):
    """PairTrainer's config: `loss` names a function of `llmalign.losses`; only its own hyper-parameters may be set."""

    loss: str = field(default="dpo", metadata={"help": "dpo, cdpo, ipo, slic, irpo, rdpo, ripo, rslic, rpo or inpo."})
    tau: float | None = field(default=None, metadata={"help": "ipo, ripo: strength of the reference."})
    flip_rate: float | None = field(default=None, metadata={"help": "cdpo, rdpo, ripo, rslic: share of wrong labels."})
    eta: float | None = field(default=None, metadata={"help": "rpo: weight of the chosen log-prob."})
    alpha: float | None = field(default=None, metadata={"help": "irpo: weight of the mean chosen log-prob."})

    HYPER_PARAMETERS = {name: keys for name, keys in HYPER_PARAMETERS.items() if name != "inpo"}

    def __post_init__(self) -> None:
        if self.loss == "inpo":
            raise UserError("the inpo loss needs the previous iterate's log-probs: use method: inpo (INPOTrainer)")
        check_pair_loss(self, self.HYPER_PARAMETERS)
        if self.loss in UNBOUNDED:
            best_by_accuracy(self, self.loss)
        super().__post_init__()

    def _unused(self) -> dict[str, str]:
        if "beta" in self.HYPER_PARAMETERS[self.loss]:
            return {}
        return {"beta": f"loss: {self.loss} takes tau"}


@dataclass
class RPOConfig(ScoreConfig):
    """RPO (arXiv 2405.16436): DPO plus eta*beta times the summed log-prob of a base response; the paper's values."""

    beta: float = field(default=0.01, metadata={"help": "Strength of the reference."})
    eta: float = field(default=0.005, metadata={"help": "Weight of the base response's log-prob, times beta."})
    base: str = field(
        default="chosen", metadata={"help": "chosen, reference (one sample a prompt, drawn once) or column (base)."}
    )
    base_new_tokens: int = field(default=256, metadata={"help": "base: reference: longest sample, in tokens."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        positive(self, "beta", "base_new_tokens")
        require(math.isfinite(self.eta) and self.eta >= 0, "eta", self.eta, "zero or a positive finite number")
        require(self.base in ("chosen", "reference", "column"), "base", self.base, "chosen, reference or column")
        super().__post_init__()


@dataclass
class RDPOConfig(ScoreConfig):
    """rDPO (arXiv 2403.00409): DPO's loss made unbiased under labels flipped at a known rate in [0, 0.5)."""

    flip_rate: float | str = field(
        default=0.1, metadata={"help": "Share of flipped labels, or `estimate` from scorer_margin_column."}
    )
    scorer_margin_column: str | None = field(
        default=None, metadata={"help": "Column with an independent scorer's margin (log-odds) of the observed label."}
    )

    def __post_init__(self) -> None:
        positive(self, "beta")
        if self.flip_rate == "estimate":
            if self.scorer_margin_column is None:
                raise UserError("flip_rate: estimate needs scorer_margin_column, an independent scorer's margins")
        else:
            check_flip_rate(self)
            if self.scorer_margin_column is not None:
                raise UserError("scorer_margin_column is only used with flip_rate: estimate")
        best_by_accuracy(self, "rDPO")
        super().__post_init__()


@dataclass
class INPOConfig(ScoreConfig):
    """INPO (arXiv 2407.00617): one iteration against the reference and the previous iterate; the paper's values."""

    eta: float = field(default=0.005, metadata={"help": "Step size; the squared loss aims at 1/(2 eta) nats."})
    tau: float | None = field(default=None, metadata={"help": "Weight of the reference; left open: eta/3."})
    last_model_name_or_path: str | None = field(default=None, metadata={"help": "Previous iterate, a full model."})
    last_adapter: str | None = field(default=None, metadata={"help": "Previous iterate, an adapter of the model."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        positive(self, "eta")
        if self.tau is None:
            self.tau = self.eta / 3
        require(math.isfinite(self.tau) and self.tau >= 0, "tau", self.tau, "zero or a positive finite number")
        if self.last_model_name_or_path is not None and self.last_adapter is not None:
            raise UserError("name the previous iterate once: last_model_name_or_path or last_adapter")
        super().__post_init__()

    def _unused(self) -> dict[str, str]:
        return {"beta": "INPO takes eta and tau"}


@dataclass
class CoPGConfig(ScoreConfig):
    """CoPG (arXiv 2406.19185) on rows of k >= 2 scored completions; beta is the paper's best for TL;DR."""

    beta: float = field(default=0.06, metadata={"help": "Strength of the reference, in units of reward."})
    normalize_rewards: str = field(
        default="none", metadata={"help": "none, group (zero mean, unit deviation a prompt) or dataset."}
    )

    def __post_init__(self) -> None:
        positive(self, "beta")
        require(
            self.normalize_rewards in ("none", "group", "dataset"),
            "normalize_rewards",
            self.normalize_rewards,
            "none, group or dataset",
        )
        super().__post_init__()
