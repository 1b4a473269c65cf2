"""Configs of the on-policy methods: TRL's sampling options, and what the loss and the reward of each need."""

import math
import os
from dataclasses import dataclass, field, fields

import trl

from llmalign.errors import UserError
from llmalign.scores.scoring import AUTO, KINDS
from llmalign.trainers.validation import CHECKPOINTING, NAN_FILTER, ChosenHardware, positive, refuse_inherited, require

_NOT_HONOURED = {
    "epsilon": "the ratio is not clipped in this loss",
    "epsilon_high": "the ratio is not clipped in this loss",
    "normalize_advantages": "the method says how its advantages are scaled",
    "reward_clip_range": "clip in the reward function, or set reward_clip of the methods that have it",
    "sync_ref_model": "the reference is frozen",
    "ref_model_mixup_alpha": "the reference is frozen",
    "ref_model_sync_steps": "the reference is frozen",
    "router_aux_loss_coef": "the auxiliary loss of mixtures of experts is not part of these losses",
    "use_liger_kernel": "TRL deprecates it; use model_init_kwargs {use_kernels: true}",
    "disable_dropout": "dropout makes policy and sampler differ before the first step",
    "neftune_noise_alpha": "noise in the embeddings makes policy and sampler differ before the first step",
    "label_smoothing_factor": "there are no labels",
    "use_transformers_paged": "use vLLM on a GPU, or TRL's ordinary generation",
}


@dataclass
class SampledConfig(ChosenHardware, trl.RLOOConfig):
    """What all on-policy methods share; inherited fields that they would ignore are refused unless at default.

    `per_device_train_batch_size` counts completions and must hold whole groups of `num_generations`. Raises UserError
    for continuous batching on a CPU or on float32 weights: it is slower there, and casts the weights that are trained.
    """

    num_generations: int = field(default=2, metadata={"help": "Completions of a prompt in a rollout."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "The same in evaluation; open: as many."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": CHECKPOINTING})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": NAN_FILTER})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout is always off here."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Functions by import path: package.module:function or file.py:function."}
    )
    reward_models: list[str] | None = field(default=None, metadata={"help": "Reward models, each a path or Hub name."})
    reward_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of the data that the reward functions are given beside the prompt."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another reference than the model that training starts from."}
    )
    sampling_batch_size: int | None = field(
        default=None, metadata={"help": "Completions that a device samples at a time, without vLLM; open: a rollout's."}
    )
    scoring: str = field(
        default=AUTO, metadata={"help": "auto, shared_prompt (prompts read once), padding_free or padded."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "`llmalign train` drops prompts of more tokens, and counts them; open: none."}
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Completions a device; open: 8, or the nearest number of whole groups."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What picks the best checkpoint; open: the highest reward (f-DPG: lowest js)."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})

    #: what picks the best checkpoint where nothing else is named, and whether more of it is better
    _best = ("reward", True)

    def __post_init__(self) -> None:
        refuse_inherited(self, {**_NOT_HONOURED, **self._unused()})
        self.disable_dropout = True
        self._check_group()
        self._whole_groups("per_device_train_batch_size", self.num_generations)
        size = self.num_generations_eval or self.num_generations
        open_default = next(entry.default for entry in fields(self) if entry.name == "per_device_eval_batch_size")
        if self.per_device_eval_batch_size == open_default:
            self.per_device_eval_batch_size = max(open_default // size, 1) * size
        self._whole_groups("per_device_eval_batch_size", size)
        self._check_as_rloo()
        require(self.scoring in KINDS, "scoring", self.scoring, f"one of {', '.join(KINDS)}")
        positive(self, "temperature", "max_completion_length")
        require(self.beta >= 0 and math.isfinite(self.beta), "beta", self.beta, "zero or a positive finite number")
        self._check_passes()
        self._best_by_reward()
        for name in ("max_prompt_length", "sampling_batch_size"):
            if getattr(self, name) is not None:
                positive(self, name)
        self._check_sampling()
        if self.top_p < 1 or self.top_k or self.min_p or self.repetition_penalty != 1:
            self.choices += ", log-probs of the distribution before top_p, top_k, min_p and repetition_penalty"

    @property
    def max_length(self) -> int | None:
        """The longest prompt that is kept, in tokens: what the preparation of data asks every config for."""
        return self.max_prompt_length

    def _check_group(self) -> None:
        """A completion is compared with the others of its prompt, unless a method has something else to compare."""
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")

    def _check_as_rloo(self) -> None:
        """TRL's own checks; it asks for two completions a prompt, so one is shown to it as a rollout of one prompt."""
        if self.num_generations > 1:
            super().__post_init__()
            return
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        own = self.per_device_train_batch_size * steps
        rollout = self.generation_batch_size or own * int(os.environ.get("WORLD_SIZE", "1"))
        rule = "at least 2: advantages are whitened over a rollout"
        require(rollout > 1, "per_device_train_batch_size", rollout, rule)
        self.num_generations, self.num_generations_eval = rollout, self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = 1

    def _whole_groups(self, name: str, size: int) -> None:
        require(getattr(self, name) % size == 0, name, getattr(self, name), f"a multiple of num_generations, {size}")

    def _check_sampling(self) -> None:
        if self.use_transformers_continuous_batching and self.use_cpu:
            raise UserError(
                "use_transformers_continuous_batching is refused on a CPU: it is slower there; leave it off"
            )
        if self.use_vllm and self.sampling_batch_size is not None:
            raise UserError("sampling_batch_size is set, but vLLM has batches of its own; leave it out")
        known = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
        twice = sorted(known & set(self.generation_kwargs or ()))
        if twice:
            raise UserError(
                f"generation_kwargs sets {twice[0]}, which scoring would not know of; set {twice[0]} itself"
            )
        if self.reward_models and self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3:
            raise UserError("reward_models would be sharded under ZeRO-3 and never gathered: use ZeRO-2 or DDP")

    def _check_passes(self) -> None:
        """Several passes over a rollout must serve several steps, or they compute the same gradient again."""
        steps = self.num_iterations * self.steps_per_generation / self.gradient_accumulation_steps
        rule = "1, or so many that a rollout serves at least two optimizer steps"
        require(self.num_iterations == 1 or steps >= 2, "num_iterations", self.num_iterations, rule)

    def _best_by_reward(self) -> None:
        """The surrogate losses say nothing about which checkpoint is best."""
        if not self.load_best_model_at_end and self.save_strategy != "best":
            return
        if self.metric_for_best_model in (None, "loss"):  # transformers' default
            self.metric_for_best_model, self.greater_is_better = self._best
        if self.metric_for_best_model.split("_")[-1] == "loss":
            raise UserError(
                "the loss of a sampling method cannot pick the best checkpoint; set metric_for_best_model: "
                f"{self._best[0]}"
            )

    def _unused(self) -> dict[str, str]:
        """Inherited fields that this method's loss has no place for."""
        return {}


@dataclass
class MDPOConfig(SampledConfig):
    """MDPO (arXiv 2005.09814): KL-regularised steps from the sampler, several to a rollout, with a falling step size.

    `beta` is the weight of the divergence from the frozen reference inside the reward. Raises UserError for fewer than
    two steps a rollout: at the sampler itself the divergence has no gradient, so one step is plain policy gradient.
    """

    beta: float = field(default=0.05, metadata={"help": "Weight of the log-ratio to the reference in the reward."})
    step_size: float = field(default=1.0, metadata={"help": "t of the first rollout, in standardised advantages."})
    step_size_floor: float = field(default=0.05, metadata={"help": "t of the last rollouts; t falls linearly to it."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over a rollout, m."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "step_size", "step_size_floor")
        require(self.step_size_floor <= self.step_size, "step_size_floor", self.step_size_floor, "at most step_size")
        steps = self.num_iterations * self.steps_per_generation / self.gradient_accumulation_steps
        require(
            steps >= 2,
            "num_iterations",
            self.num_iterations,
            "at least 2 (or steps_per_generation twice gradient_accumulation_steps), so that a rollout serves two "
            "steps: with one, MDPO is plain policy gradient",
        )


@dataclass
class OnlineCoPGConfig(SampledConfig):
    """CoPG (arXiv 2406.19185) on sampled completions; beta is the paper's best for TL;DR."""

    beta: float = field(default=0.06, metadata={"help": "Strength of the reference, in units of reward."})
    normalize_rewards: str = field(
        default="none", metadata={"help": "none, or group (zero mean, unit deviation a prompt)."}
    )
    replay_prompts: int = field(
        default=0, metadata={"help": "Prompts of earlier rollouts that join each rollout of a rank; 0: none."}
    )
    replay_capacity: int = field(default=1024, metadata={"help": "Prompts that a rank keeps for that."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "beta")
        known = ("none", "group")
        require(self.normalize_rewards in known, "normalize_rewards", self.normalize_rewards, "none or group")
        require(self.replay_prompts >= 0, "replay_prompts", self.replay_prompts, "zero or more")
        positive(self, "replay_capacity")
        if not self.replay_prompts:
            refuse_inherited(self, {"replay_capacity": "set replay_prompts, without which nothing is replayed"})
        else:
            rule = f"a multiple of steps_per_generation, {self.steps_per_generation}"
            whole = self.replay_prompts % self.steps_per_generation == 0
            require(whole, "replay_prompts", self.replay_prompts, rule)
            enough = self.replay_prompts <= self.replay_capacity
            require(enough, "replay_prompts", self.replay_prompts, f"at most replay_capacity, {self.replay_capacity}")
