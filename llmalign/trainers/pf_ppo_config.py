"""Config of PF-PPO: which completions are trained on, what estimates their advantages, and PPO's own values."""

from dataclasses import dataclass, field

from llmalign.errors import UserError
from llmalign.losses.filters import STRATEGIES
from llmalign.trainers.sampled_configs import SampledConfig
from llmalign.trainers.validation import positive, refuse_foreign, require

HEAD, MODEL = "head", "model"
GAE, GROUP = "gae", "group"
EXACT, RESAMPLE = "exact", "resample"
AFTER, BEFORE = "after", "before"
_CHOICES = {
    "strategy": STRATEGIES,
    "selection": (EXACT, RESAMPLE),
    "advantage": (GAE, GROUP),
    "critic": (HEAD, MODEL),
    "whitening": (AFTER, BEFORE),
}
_BELONGS = {
    "power": ("strategy", "power"),
    "draws": ("selection", RESAMPLE),
    **{name: ("advantage", GAE) for name in ("gamma", "gae_lambda", "value_clip")},
}
_OF_THE_CRITIC = ("critic_model_name_or_path", "critic_learning_rate", "value_coef")


@dataclass
class PFPPOConfig(SampledConfig):
    """PF-PPO (arXiv 2409.06957): PPO on the completions whose reward can be trusted, by their rank in their prompt.

    Values are the paper's, for a 6.7B model on code. `beta` is the weight of the divergence from the reference in the
    reward of each token. Raises UserError for options of a critic where `advantage: group` has none, and for a critic
    of its own (`critic: model`) under ZeRO.
    """

    strategy: str = field(
        default="best_random", metadata={"help": "none, best_of_n, best_random, best_worst or power (`power`)."}
    )
    power: float = field(default=3.0, metadata={"help": "k of strategy power, which draws by |reward|^k."})
    selection: str = field(
        default=EXACT, metadata={"help": "exact (each kept completion once), or resample (drawn with replacement)."}
    )
    draws: int | None = field(
        default=None, metadata={"help": "Draws a prompt under selection: resample; open: num_generations."}
    )
    advantage: str = field(
        default=GAE, metadata={"help": "gae (a critic), or group (against the prompt's other completions; no critic)."}
    )
    whitening: str = field(default=AFTER, metadata={"help": "Advantages are whitened after the filter, or before it."})
    critic: str = field(
        default=HEAD, metadata={"help": "head (a linear one on the policy's trunk), or model (a network of its own)."}
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model that critic: model starts from; open: the one that rewards."}
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic; open: 9e-6 for a model, 1e-4 for a head."}
    )
    value_coef: float | None = field(
        default=None, metadata={"help": "Weight of the value loss; open: 1 for a model, 0.1 for a head."}
    )
    beta: float = field(default=0.01, metadata={"help": "Weight of the log-ratio to the reference, token by token."})
    reward_clip: float | None = field(default=10.0, metadata={"help": "Rewards are cut at plus and minus this."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    clip: float = field(default=0.2, metadata={"help": "The policy's ratio is clipped to 1 plus and minus this."})
    value_clip: float = field(default=0.2, metadata={"help": "Values are clipped this far from the sampler's."})
    num_iterations: int = field(default=3, metadata={"help": "Passes over a rollout."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of the policy."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _CHOICES.items():
            require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        positive(self, "clip", "value_clip", "num_iterations", "power")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        if self.reward_clip is not None:
            positive(self, "reward_clip")
        refuse_foreign(self, _BELONGS)
        if self.draws is not None:
            positive(self, "draws")
        self._check_critic()

    def _check_group(self) -> None:
        """With a critic one completion a prompt is enough: plain PPO."""
        if self.num_generations != 1 or self.advantage == GROUP:
            super()._check_group()
        elif self.strategy != "none":
            raise UserError("num_generations 1 leaves nothing to choose from: set strategy: none, which is plain PPO")

    def _check_critic(self) -> None:
        given = [name for name in _OF_THE_CRITIC if getattr(self, name) is not None]
        if self.advantage == GROUP:
            given += ["critic"] * (self.critic != HEAD)
            if given:
                raise UserError(
                    f"{given[0]} is set, but advantage: group has no critic; drop it, or set advantage: gae"
                )
            return
        if self.critic == HEAD and self.critic_model_name_or_path is not None:
            raise UserError(
                "critic_model_name_or_path is set, but critic: head stands on the policy's trunk; drop it, or set "
                "critic: model"
            )
        own = self.critic == MODEL
        if self.critic_learning_rate is None:
            self.critic_learning_rate = 9e-6 if own else 1e-4
        if self.value_coef is None:
            self.value_coef = 1.0 if own else 0.1
        positive(self, "critic_learning_rate", "value_coef")
        if own and self.deepspeed_plugin is not None:
            raise UserError(
                "critic: model is a second network, and ZeRO's engine trains one: set critic: head or advantage: "
                "group, or train without DeepSpeed"
            )

    def _unused(self) -> dict[str, str]:
        return {"epsilon": "set clip", "epsilon_high": "set clip, which holds for both sides"}
