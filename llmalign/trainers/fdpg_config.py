"""The config of f-DPG: its target, divergence, partition function, baseline and proposal."""

from dataclasses import dataclass, field

from llmalign.errors import UserError
from llmalign.losses import DIVERGENCES
from llmalign.rewards.targets import DistributionalTarget, PointwiseTarget, RewardTarget, Target
from llmalign.trainers.sampled_configs import SampledConfig
from llmalign.trainers.validation import positive, refuse_foreign, require

TARGETS = ("pointwise", "distributional", "reward")
PARTITIONS = ("per_prompt", "shared")
BASELINES = ("auto", "leave_one_out", "window", "one", "none")
PROPOSALS = ("online", "offline")
#: the only values with which what is sampled has the log-probs that are scored
_PLAIN_SAMPLING = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, None),
    "min_p": (0, None),
    "repetition_penalty": (1,),
}
#: what each of these options is for; elsewhere it would be ignored
_BELONGS = {
    "moments": ("target", "distributional"),
    "moment_samples": ("target", "distributional"),
    "moment_samples_per_prompt": ("target", "distributional"),
    "beta": ("target", "reward"),
    "reward_weights": ("target", "reward"),
    "baseline_window": ("baseline", "window"),
    "proposal_update_interval": ("proposal", "offline"),
}
_SMALL_IS_GOOD = frozenset({"js", "tv", "kl_p_pi", "kl_pi_p", "kl_pi_base", "kl_to_reference"})
_HARMLESS_KEYS = frozenset({"cache_implementation", "max_new_tokens", "use_cache"})


@dataclass
class FDPGConfig(SampledConfig):
    """f-DPG (arXiv 2302.08215): the policy is led to the target p = P/Z by the gradient of any f-divergence.

    `reward_funcs` measure each completion: for `pointwise` their answers, 0 or 1, are all to be 1; for `distributional`
    each is a feature whose mean under p is its entry of `moments`; for `reward` their weighted sum is r. Raises
    UserError for a divergence that the target makes infinite, and for every way of sampling other than the model's
    own distribution, since the log-probs that are compared would not be those of what was drawn.
    """

    divergence: str = field(default="js", metadata={"help": ", ".join(DIVERGENCES)})
    target: str = field(
        default="pointwise", metadata={"help": "pointwise: P = a b; distributional: P = a exp(lambda phi); reward."}
    )
    moments: list[float] | None = field(
        default=None, metadata={"help": "distributional: wanted mean of each of reward_funcs under the target."}
    )
    moment_samples: int = field(
        default=4096, metadata={"help": "distributional: completions of the base that lambda is solved on, at least."}
    )
    moment_samples_per_prompt: int = field(
        default=512, metadata={"help": "distributional: how many of them each prompt has, at least."}
    )
    constraint_floor: float | None = field(
        default=None, metadata={"help": "b of a completion that fails a constraint, instead of 0; 1e-6, say."}
    )
    beta: float = field(default=0.1, metadata={"help": "reward: P = a exp(r / beta); of no use to the others."})
    partition: str = field(
        default="per_prompt", metadata={"help": "per_prompt: a partition function for each; shared: one for all."}
    )
    max_z: float | None = field(
        default=None, metadata={"help": "Cut a rollout's largest P/q until their mean is at most this; biases Z."}
    )
    baseline: str = field(
        default="auto", metadata={"help": "auto (one for forward_kl, else leave_one_out), window, one or none."}
    )
    baseline_window: int = field(default=1024, metadata={"help": "window: pseudo-rewards that it is the mean of."})
    proposal: str = field(
        default="online", metadata={"help": "online: sample from the policy; offline: from a frozen copy."}
    )
    proposal_update_interval: int = field(
        default=20, metadata={"help": "offline: steps between looks whether the policy is nearer to the target."}
    )
    learning_rate: float = field(default=1.41e-5, metadata={"help": "Peak learning rate."})
    _best = ("js", False)

    def __post_init__(self) -> None:
        picks = (self.metric_for_best_model or "").removeprefix("eval_")
        if picks in _SMALL_IS_GOOD and self.greater_is_better is None:
            self.greater_is_better = False
        super().__post_init__()
        _known(self, "divergence", tuple(DIVERGENCES))
        _known(self, "target", TARGETS)
        _known(self, "partition", PARTITIONS)
        _known(self, "baseline", BASELINES)
        _known(self, "proposal", PROPOSALS)
        counts = ("moment_samples", "moment_samples_per_prompt", "baseline_window", "proposal_update_interval")
        positive(self, *counts)
        if self.max_z is not None:
            positive(self, "max_z")
        self._check_target()
        if self.baseline == "one" and self.divergence != "forward_kl":
            raise UserError("baseline: one is E[p/pi], the mean pseudo-reward of forward_kl alone; use leave_one_out")
        if self.baseline == "auto":
            self.baseline = "one" if self.divergence == "forward_kl" else "leave_one_out"

    def build_target(self) -> Target:
        """The target that is asked for. Raises UserError for values that make none."""
        if self.target == "reward":
            return RewardTarget(self.beta)
        if self.target == "pointwise":
            return PointwiseTarget(self.constraint_floor)
        if self.moments is None:
            raise UserError("target: distributional needs moments, the wanted mean of each of reward_funcs")
        return DistributionalTarget(self.moments, self.constraint_floor)

    def _check_target(self) -> None:
        refuse_foreign(self, _BELONGS)
        if self.moments is not None:
            numbers = isinstance(self.moments, list) and all(type(moment) in (int, float) for moment in self.moments)
            require(numbers, "moments", self.moments, "a list of numbers, one for each of reward_funcs")
        if self.target == "reward" and self.constraint_floor is not None:
            raise UserError("constraint_floor belongs to constraints, and a reward target has none; leave it out")
        fixed = {0, 1} & set(self.moments or ())
        if self.target == "distributional" and self.constraint_floor is not None and not fixed:
            raise UserError("constraint_floor belongs to constraints, and no moment here is 0 or 1; leave it out")
        steep = DIVERGENCES[self.divergence].slope_at_infinity == float("inf")
        if self.build_target().may_be_zero and steep:
            raise UserError(
                f"{self.divergence} is infinite on this target, which gives completions that fail a constraint "
                "probability 0 while the policy draws them: set constraint_floor (1e-6, say), or use forward_kl, tv, "
                "js or chi2_forward"
            )

    def _check_sampling(self) -> None:
        super()._check_sampling()
        for name, values in _PLAIN_SAMPLING.items():
            value = getattr(self, name)
            if value not in values:
                raise UserError(
                    f"{name} must be {values[0]}, got {value!r}: the log-probs in the loss are those of the "
                    "model's own distribution, so that is what completions must be drawn from"
                )
        given = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        for name in sorted(set(given) - _HARMLESS_KEYS):
            raise UserError(
                f"generation_kwargs {name} is refused: it may change the distribution that completions are drawn from; "
                f"allowed are {', '.join(sorted(_HARMLESS_KEYS))}"
            )
        if self.vllm_structured_outputs_regex is not None:
            raise UserError(
                "vllm_structured_outputs_regex constrains what is drawn, and the log-probs in the loss are those of "
                "the model without it; make the form a constraint (target: pointwise)"
            )
        if self.proposal == "offline" and self.use_vllm:
            raise UserError("proposal: offline cannot use vLLM, which samples from the policy; use proposal: online")

    def _unused(self) -> dict[str, str]:
        return {"mask_truncated_completions": "a completion that is cut is one of those that the target weighs"}


def _known(args: FDPGConfig, name: str, values: tuple[str, ...]) -> None:
    require(getattr(args, name) in values, name, getattr(args, name), f"one of {', '.join(values)}")
