"""The keys of a recipe that say how `llmalign iterate` samples, judges, pairs and evaluates."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from llmalign.errors import UserError
from llmalign.rewards.tournament import PLANS, comparisons_of

ORACLES = ("preference_function", "preference_model", "judge", "reward")
LABELS = ("likelier", "sampled")
ANSWERS = ("logprobs", "text")
COUNTS = ("rounds", "eval_samples", "max_new_tokens", "sampling_batch_size", "shard_prompts")

#: keys that may change while a run is under way: none of them reaches a byte of a result
HARMLESS = frozenset(
    """
    rounds keep_rounds keep_checkpoints max_failed judge_url vllm_server vllm_timeout judge_concurrency judge_timeout
    judge_patience judge_max_requests judge_max_tokens judge_api_key_env judge_cache
    """.split()
)


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass(frozen=True)
class LoopConfig:
    """Everything about the rounds but the training itself, whose keys are those of the method.

    Raises UserError, naming the key, for values that are out of range or contradict each other.
    """

    rounds: int = field(default=3, metadata=_help("T: how often to sample, judge and train."))
    prompts_per_round: int | None = field(
        default=None, metadata=_help("Fresh prompts of a round; open: the prompts left after eval_prompts, in T parts.")
    )
    reuse_prompts: bool = field(default=False, metadata=_help("Begin again where the prompts run out, else refuse."))
    eval_prompts: int = field(default=64, metadata=_help("Prompts never trained on, to measure each round on."))
    eval_samples: int = field(default=1, metadata=_help("Completions of each of them."))
    samples_per_prompt: int = field(default=8, metadata=_help("K: completions of each prompt."))
    max_new_tokens: int = field(default=256, metadata=_help("Longest completion, in tokens."))
    temperature: float = field(default=1.0, metadata=_help("Of sampling; 0 is greedy and refused."))
    top_p: float = field(default=1.0, metadata=_help("Share of the probability to sample from."))
    sampling_batch_size: int = field(default=64, metadata=_help("Completions sampled at a time."))
    shard_prompts: int = field(default=64, metadata=_help("Prompts between two points that a run can go on from."))
    vllm_server: str | None = field(default=None, metadata=_help("URL of a vLLM server; open: sample here."))
    vllm_timeout: float = field(default=240.0, metadata=_help("Seconds to wait for that server."))

    oracle: str | None = field(default=None, metadata=_help("preference_function, preference_model, judge or reward."))
    preference_function: str | None = field(
        default=None, metadata=_help("package.module:function or file.py:function.")
    )
    preference_model: str | None = field(default=None, metadata=_help("Folder or Hub name (method: preference)."))
    reward_funcs: list[str] | None = field(default=None, metadata=_help("oracle: reward. Functions; all are summed."))
    reward_models: list[str] | None = field(default=None, metadata=_help("oracle: reward. Folders or Hub names."))
    oracle_columns: list[str] | None = field(
        default=None, metadata=_help("Columns of the prompts functions are given.")
    )
    select: str = field(default="best_worst", metadata=_help("best_worst, best_random, all_pairs or independent."))
    labels: str = field(default="likelier", metadata=_help("likelier: P > .5 wins; sampled: wins with probability P."))
    margin: float = field(default=0.0, metadata=_help("oracle: reward. Least difference of the rewards of a pair."))
    both_orders: bool = field(default=False, metadata=_help("Ask judge or function in both orders, take the mean."))
    reference: str = field(default="start", metadata=_help("start: one for all rounds; previous: the round before's."))
    truncated: str = field(default="keep", metadata=_help("keep or drop completions that max_new_tokens cut."))

    max_failed: float = field(default=0.1, metadata=_help("Share of comparisons that may fail before a round stops."))

    judge_url: str | None = field(default=None, metadata=_help("Of an OpenAI-compatible endpoint, with /v1."))
    judge_model: str | None = field(default=None, metadata=_help("The model's name there."))
    judge_api_key_env: str | None = field(
        default="OPENAI_API_KEY", metadata=_help("Environment variable with the key; null for a server without keys.")
    )
    judge_answers: str = field(default="logprobs", metadata=_help("logprobs or text: how its answer is read."))
    judge_template: str | None = field(default=None, metadata=_help("File with {prompt}, {first} and {second}."))
    judge_letters: list[str] = field(
        default_factory=lambda: ["A", "B"], metadata=_help("What the template calls the first and the second answer.")
    )
    judge_top_logprobs: int = field(default=5, metadata=_help("Among how many first tokens the letters are sought."))
    judge_cache: str | None = field(default=None, metadata=_help("SQLite file of its answers; open: in the run."))
    judge_concurrency: int = field(default=8, metadata=_help("Requests at a time."))
    judge_timeout: float = field(default=60.0, metadata=_help("Seconds a request may take."))
    judge_patience: float = field(default=300.0, metadata=_help("Seconds to go on trying while it is away."))
    judge_max_requests: int | None = field(default=None, metadata=_help("Budget of the run, in requests."))
    judge_max_tokens: int | None = field(default=None, metadata=_help("Budget of the run, in tokens."))

    keep_rounds: int | None = field(default=None, metadata=_help("Models of so many last rounds are kept; open: all."))
    keep_checkpoints: bool = field(default=False, metadata=_help("Keep the checkpoints of rounds that are finished."))

    def __post_init__(self) -> None:
        for name in (*COUNTS, "judge_concurrency"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("vllm_timeout", "judge_timeout"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        for name in ("judge_max_requests", "judge_max_tokens"):
            self._require((getattr(self, name) or 0) >= 0, name, "zero or more, or left open")
        self._require(self.judge_patience >= 0, "judge_patience", "zero or a positive number")
        self._require(self.judge_top_logprobs >= 2, "judge_top_logprobs", "at least 2")
        self._require(self.prompts_per_round is None or self.prompts_per_round >= 1, "prompts_per_round", "at least 1")
        self._require(self.eval_prompts >= 0, "eval_prompts", "zero or more")
        self._require(len(self.judge_letters) == 2, "judge_letters", "two letters, such as [A, B]")
        self._require(self.keep_rounds is None or self.keep_rounds >= 1, "keep_rounds", "at least 1, or left open")
        self._require(math.isfinite(self.temperature) and self.temperature > 0, "temperature", "a positive number")
        self._require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        self._require(0 <= self.max_failed <= 1, "max_failed", "in [0, 1]")
        self._require(math.isfinite(self.margin) and self.margin >= 0, "margin", "zero or a positive number")
        for name, choices in (
            ("select", tuple(PLANS)), ("labels", LABELS), ("truncated", ("keep", "drop")), ("judge_answers", ANSWERS),
            ("reference", ("start", "previous")),
        ):  # fmt: skip
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        comparisons_of(self.select, self.samples_per_prompt)
        self._check_oracle()

    def _check_oracle(self) -> None:
        if self.oracle is None:
            raise UserError(f"the recipe names no oracle: set oracle to one of {', '.join(ORACLES)}")
        self._require(self.oracle in ORACLES, "oracle", f"one of {', '.join(ORACLES)}")
        needs = {
            "preference_function": ("preference_function",), "preference_model": ("preference_model",),
            "judge": ("judge_url", "judge_model"), "reward": (),
        }  # fmt: skip
        for name in needs[self.oracle]:
            if getattr(self, name) is None:
                raise UserError(f"oracle: {self.oracle} needs {name}")
        if self.oracle == "reward" and not (self.reward_funcs or self.reward_models):
            raise UserError("oracle: reward needs reward_funcs or reward_models")
        defaults = {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
            for entry in fields(self)
        }
        belongs = {
            "preference_function": ("preference_function",), "preference_model": ("preference_model",),
            "reward_funcs": ("reward",), "reward_models": ("reward",), "margin": ("reward",),
            "oracle_columns": ("preference_function", "reward"), "both_orders": ("preference_function", "judge"),
            **{name: ("judge",) for name in defaults if name.startswith("judge_")},
        }  # fmt: skip
        for name, owners in belongs.items():
            if self.oracle not in owners and getattr(self, name) != defaults[name]:
                raise UserError(f"{name} belongs to oracle: {' or '.join(owners)}, and this run's is {self.oracle}")
        if self.oracle == "reward" and self.labels == "sampled":
            raise UserError("labels: sampled needs an oracle that gives probabilities; rewards are compared")

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise UserError(f"{name} must be {rule}, got {getattr(self, name)!r}")
