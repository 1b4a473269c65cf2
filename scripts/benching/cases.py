"""The cases: model shape, lengths of every batch, texts of exactly these lengths, and the ratios aimed at.

Everything follows from the case's name, so that each process builds the same model shape and the same rows by itself.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

PAIRS = 4  # a batch
PROMPTS = 16  # a rollout
MAX_LENGTH = 2048  # nothing is truncated: prompts and completions end at 1,024 tokens
SPECIAL = ("<pad>", "<eos>", "<unk>")  # the first ids of the vocabulary
MEAN, SIGMA, SHORTEST, LONGEST = 200, 0.7, 8, 1024  # tokens of a lognormal text; SIGMA is of the logarithm


@dataclass(frozen=True)
class Shape:
    """A decoder's measures; `family` is `llama` or `qwen2` (tied embeddings, biased q, k and v)."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Group:
    """Token counts of one prompt and of its completions, end-of-text included."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One line of the table. A batch is PAIRS pairs, or in a `forward_backward` case one prompt with `completions`.

    `time_target`: TRL's time over ours, at least. `memory_target`: our memory over TRL's, at most. `method`: a sampling
    method of ours beside TRL's GRPOTrainer, where a step draws `completions` of PROMPTS prompts and trains on them.
    """

    name: str
    time_target: float
    memory_target: float
    prompt: int = 512
    completion: int = 128
    completions: int = 2
    lora: bool = False
    cached: bool = False
    lognormal: bool = False
    forward_backward: bool = False
    method: str | None = None
    vocabulary: int | None = None
    shape: Shape = Shape("llama", 384, 6, 6, 6, 1024, 8192)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who takes turns; `ours` against `trl` makes the ratios."""
        return ("ours", "trl", "trl-precomputed") if self.cached else ("ours", "trl")

    def counted_steps(self, steps: int) -> int:
        """Steps of a process that count: lengths that are drawn need many batches."""
        return max(steps, 8) if self.lognormal else steps


PAIR_CASES = {
    case.name: case
    for case in (
        Case("512-128", 2.0, 0.62),
        Case("512-128-lora", 2.1, 0.62, lora=True),
        Case("512-128-vocab32k", 2.8, 0.45, vocabulary=32768),
        Case("256-256", 1.6, 0.72, prompt=256, completion=256),
        Case("64-256", 1.4, 0.80, prompt=64, completion=256),
        Case("lognormal", 3.5, 0.6, lognormal=True),
        Case("k8", 3.5, 0.42, completions=8, forward_backward=True),
        Case("cached", 2.8, 0.6, cached=True),
    )
}
SAMPLED_CASES = {
    f"{method}-{prompt}": Case(
        f"{method}-{prompt}", target, 1.0, prompt=prompt, completion=64, completions=4, method=method
    )
    for prompt, target in ((64, 1.0), (256, 1.3))
    for method in ("copg_online", "mdpo", "fdpg", "pf_ppo")
}
CASES = PAIR_CASES | SAMPLED_CASES
#: about half a billion parameters
QWEN = Shape("qwen2", 896, 24, 14, 2, 4864, 151936)
TINY, TINY_SHARE = Shape("llama", 32, 2, 2, 2, 64, 256), 16


def get_case(name: str, *, device: str = "cpu", quick: bool = False) -> Case:
    """The case of that name, with a GPU's model for `cuda`; `quick` shrinks the model and every length.

    Raises KeyError for an unknown name.
    """
    case = CASES[name]
    shape = TINY if quick else QWEN if device == "cuda" else case.shape
    if case.vocabulary is not None:
        shape = replace(shape, vocabulary=2 * TINY.vocabulary if quick else case.vocabulary)
    if quick:
        case = replace(case, prompt=case.prompt // TINY_SHARE, completion=case.completion // TINY_SHARE)
    return replace(case, shape=shape)


def lognormal_length(draws: random.Random) -> int:
    """Tokens of a text, lognormal around a mean of MEAN, clipped."""
    tokens = round(draws.lognormvariate(math.log(MEAN) - SIGMA**2 / 2, SIGMA))
    return min(max(tokens, SHORTEST), LONGEST)


def batches(case: Case, count: int, *, quick: bool = False) -> list[list[Group]]:
    """Lengths of the first `count` batches, the same at every call."""
    draws = random.Random(0)

    def length(fixed: int) -> int:
        if not case.lognormal:
            return fixed
        return max(lognormal_length(draws) // (TINY_SHARE if quick else 1), 2)

    def group() -> Group:
        prompt = length(case.prompt)
        return Group(prompt, tuple(length(case.completion) for _ in range(case.completions)))

    groups = PROMPTS if case.method else 1 if case.forward_backward else PAIRS
    return [[group() for _ in range(groups)] for _ in range(count)]


def texts(groups: list[Group], vocabulary: int) -> list[tuple[str, list[str]]]:
    """Random words for every prompt and its completions, one token a word; completions end in end-of-text."""
    words = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{words.randrange(vocabulary - len(SPECIAL))}" for _ in range(length))

    return [(text(group.prompt), [f" {text(length - 1)} <eos>" for length in group.completions]) for group in groups]


@dataclass(frozen=True)
class Job:
    """What one process measures. `contender`: ours, trl, trl-precomputed, or fill (ours, to fill the cache)."""

    case: str
    contender: str
    steps: int
    folder: str
    device: str = "cpu"
    dtype: str = "float32"
    quick: bool = False

    @property
    def model(self) -> str:
        """Folder of the model and its tokenizer, shared by all contenders."""
        return str(Path(self.folder) / "model")

    def get_case(self) -> Case:
        """The case as this job runs it."""
        return get_case(self.case, device=self.device, quick=self.quick)
