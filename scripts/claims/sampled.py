"""What the claims on sampled completions share: short on-policy runs on the embedded world, and looks at the policy.

Every method has the same prompts, reward (the world's ground truth of an answer), sampling and number of completions.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claims import start, world
from claims.cells import Cell, Result, Store, code_version, package_files
from llmalign.embedded.grammar import Prompt, split
from llmalign.embedded.rewards import worth
from llmalign.embedded.tiny import STEPS, build_tiny
from llmalign.evaluation.diversity import distinct_n
from llmalign.scores.text import sequence_logps

#: `prompts` with `group` completions each are a rollout, which is learnt from `passes` times
SHAPE = {
    "rollouts": 24, "prompts": 16, "group": 4, "tokens": 48, "passes": 1, "warmup": 0.05, "beta": 0.1,
    "every": 8, "held_out": 216, "judged": 1, "judged_last": 4,
}  # fmt: skip
SMOKE = {
    "rollouts": 2,
    "prompts": 2,
    "group": 2,
    "tokens": 8,
    "every": 1,
    "held_out": 4,
    "judged_last": 1,
    "smoke": True,
}
LEARNT = ("_trl", "configs", "copg", "mdpo", "replay", "rollouts", "sampled_configs", "text_scores")
SOURCES = (
    Path(__file__),
    *world.SOURCES,
    *(path for path in package_files("llmalign.embedded") if path.stem in ("rewards", "tiny")),
    *(path for path in package_files("llmalign.evaluation") if path.stem == "diversity"),
    *(path for path in package_files("llmalign.trainers") if path.stem in LEARNT),
)


def taught(store: Store, smoke: bool) -> Path:
    """The folder of what `embedded:tiny` stands for, built here so that the code it depends on is part of its name."""
    cell = Cell("start", "tiny", 0, {"steps": 2 if smoke else STEPS})
    code = code_version([path for path in SOURCES if path in package_files("llmalign.embedded")])
    return store.model(cell, code, lambda folder: _teach(folder, cell))


def _teach(folder: Path, cell: Cell) -> None:
    build_tiny(folder, seed=cell.seed, steps=cell.setting["steps"])


def arguments(cell: Cell, folder: str) -> dict[str, Any]:
    """Arguments that TRL's configs and this project's take alike."""
    s = cell.setting
    steps = s["rollouts"] * s["passes"]
    shared = start.arguments(
        folder, steps=steps, batch=s["prompts"] * s["group"], lr=s["lr"], seed=cell.seed, warmup=s["warmup"]
    )
    return shared | {
        "num_generations": s["group"],
        "max_completion_length": s["tokens"],
        "num_iterations": s["passes"],
        "beta": s["beta"],
    }


def train_prompts(cell: Cell) -> list[Prompt]:
    """As many different prompts as the run's rollouts hold."""
    return random.Random(cell.seed).sample(split()[0], cell.setting["rollouts"] * cell.setting["prompts"])


def experiment(cell: Cell, store: Store, build: Callable[..., Any]) -> Result:
    """Train what `build(cell, folder, model=, train_dataset=, ...)` returns and look at the policy as it goes."""
    s = cell.setting
    folder = taught(store, s.get("smoke", False))
    (model, tokenizer), (frozen, _) = world.load(folder), world.load(folder)
    held_out = random.Random(cell.seed).sample(split()[1], s["held_out"])
    curve: dict[str, list[float]] = {}
    away = 0.0

    def look(policy: Any, step: int) -> None:
        nonlocal away
        before = time.process_time()
        seen = {"samples": step // s["passes"] * s["prompts"] * s["group"]}
        judged = s["judged_last" if step == s["rollouts"] * s["passes"] else "judged"]
        for key, value in (seen | measures(policy, frozen, tokenizer, held_out * judged, cell)).items():
            curve.setdefault(key, []).append(value)
        away += time.process_time() - before

    look(model, 0)
    away = 0.0
    with TemporaryDirectory() as scratch:
        trainer = build(
            cell,
            scratch,
            model=model,
            reward_funcs=worth,
            train_dataset=Dataset.from_list([{"prompt": prompt.text} for prompt in train_prompts(cell)]),
            processing_class=tokenizer,
            callbacks=[world.Watch(s["every"] * s["passes"], look)],
        )
        begun = time.process_time()
        start.train(trainer)
    spent = time.process_time() - begun - away
    last = {f"last_{key}": value[-1] for key, value in curve.items()}
    way = curve["reward"][1:]
    return {**curve, **last, "mean_reward": sum(way) / len(way), "training_cpu_seconds": round(spent, 2)}


def measures(
    policy: PreTrainedModel,
    frozen: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cell: Cell,
) -> dict[str, float]:
    """Sampled answers (temperature 1): mean reward, KL to the start and entropy in nats an answer, distinct-2, words.

    KL and entropy are means of log-ratios and of negative log-probs of the answers.
    """
    drawn = world.answers(policy, tokenizer, prompts, tokens=cell.setting["tokens"], seed=cell.seed)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    asked = [tokenizer(prompt.text, add_special_tokens=False)["input_ids"] for prompt in prompts]
    pairs = list(zip(asked, drawn, strict=True))
    own, first = (_scored(model, pairs) for model in (policy, frozen))
    rewards = worth([prompt.text for prompt in prompts], texts)
    return {
        "reward": sum(rewards) / len(rewards),
        "kl": float((own - first).mean()),
        "entropy": float(-own.mean()),
        "distinct": distinct_n(drawn, 2),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


def _scored(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    return sequence_logps(model, pairs, pad_token_id=model.config.pad_token_id, batch_size=64)


class Recorded:
    """Completions drawn once from a model: `group` of each prompt, handed out in the order they were drawn."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> None:
        s = cell.setting
        prompts = train_prompts(cell)
        repeated = [prompt for prompt in prompts for _ in range(s["group"])]
        drawn = world.answers(model, tokenizer, repeated, tokens=s["tokens"], seed=1000 + cell.seed)
        groups = [drawn[first : first + s["group"]] for first in range(0, len(drawn), s["group"])]
        asked = tokenizer([prompt.text for prompt in prompts])["input_ids"]
        self.groups = {tuple(ids): group for ids, group in zip(asked, groups, strict=True)}

    def __call__(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        taken: Counter[tuple[int, ...]] = Counter()
        completions = []
        for key in map(tuple, prompt_ids):
            completions.append(self.groups[key][taken[key] % len(self.groups[key])])
            taken[key] += 1
        return completions
