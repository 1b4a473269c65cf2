"""PF-PPO against PPO: a small model that writes small programs, under rewards that were learnt from a few judged pairs.

Whether a strategy is worth training with is said beforehand, by how well its completions' rewards explain the share of
unit tests that they pass.
"""

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from claims import programs_models, programs_report, programs_tasks, start, world
from claims.cells import Cell, Result, Store, code_version, package_files
from claims.programs_models import Judge, build_tokenizer, write_programs, writer_from
from claims.programs_tasks import Task, drawn, split
from claims.report import Claim
from llmalign.rewards.model import ModelReward, load_reward_model
from llmalign.rewards.reliability import as_dict, reliability
from llmalign.scores.text import sequence_logps
from llmalign.trainers.pf_ppo import PFPPOTrainer
from llmalign.trainers.pf_ppo_config import PFPPOConfig

WRITER = {"steps": 150, "batch": 32, "lr": 5e-3, "layers": 2, "faulty": 0.3, "misread": 0.6}
REWARDS = {"tasks": 2000, "group": 3, "epochs": 3, "batch": 16, "lr": 1e-3}
#: a rollout is `prompts` tasks with `group` programs each, learnt from `passes` times in steps of `batch` programs
SHAPE = {
    "rollouts": 16, "prompts": 24, "group": 5, "batch": 60, "passes": 2, "lr": 3e-4, "critic_lr": 3e-4, "beta": 0.02,
    "every": 4, "judged": 120, "sampled": 1, "sampled_last": 4,
}  # fmt: skip
SMOKE = {"rollouts": 2, "prompts": 4, "batch": 10, "passes": 1, "every": 1, "judged": 4, "sampled_last": 1}
METHODS: dict[str, dict[str, Any]] = {
    "ppo_s": {"strategy": "none", "prompts": 120, "group": 1},  # the paper's: one program to each of as many tasks
    "ppo_m": {"strategy": "none"},
    "best_of_n": {"strategy": "best_of_n"},
    "best_random": {"strategy": "best_random"},
    "best_worst": {"strategy": "best_worst"},
}
BEFOREHAND = {"tasks": 150, "group": 5}
SOURCES = (
    *(Path(module.__file__) for module in (programs_tasks, programs_models, start)),
    *package_files("llmalign.rewards"),
    *package_files("llmalign.rewards.sandbox"),
    *package_files("llmalign.losses"),
    *package_files("llmalign.scores"),
)


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        # Enough lessons, all of them right, for some programs to pass: no pair can be made of none.
        writer = {**WRITER, "steps": 60, "faulty": 0.0, "misread": 0.0}
        small = {"writer": writer, "rewards": {**REWARDS, "tasks": 16, "epochs": 1, "batch": 4}}
        looks = Cell("programs", "beforehand", 0, {**small, "tasks": 4, "group": 5})
        return [looks, Cell("programs", "best_worst", 0, {**SHAPE, **METHODS["best_worst"], **SMOKE, **small})]
    models = {"writer": WRITER, "rewards": REWARDS}
    return [
        cell
        for seed in (1, 2, 3)
        for cell in (
            Cell("programs", "beforehand", seed, {**BEFOREHAND, **models}),
            *(Cell("programs", m, seed, {**SHAPE, **own, **models}) for m, own in METHODS.items()),
        )
    ]


@cache
def _judge() -> Judge:
    """One for all cells of a process: small models repeat themselves."""
    return Judge()


def _models(cell: Cell, store: Store) -> tuple[Path, Path]:
    """The folders of the writer, the same for all seeds, and of the seed's reward model, made where none is kept."""
    code = code_version(SOURCES)
    taught = Cell("programs", "writer", 0, cell.setting["writer"])
    writer = store.model(taught, code, lambda folder: programs_models.teach(folder, taught))
    learnt = Cell("programs", "rewards", cell.seed, {**cell.setting["rewards"], "writer": taught.setting})
    rewards = store.model(learnt, code, lambda folder: programs_models.learn_rewards(folder, writer, learnt, _judge()))
    return writer, rewards


def experiment(cell: Cell, store: Store) -> Result:
    writer, folder = _models(cell, store)
    rewards = load_reward_model(str(folder))
    if cell.method == "beforehand":
        return _beforehand(cell, writer_from(writer), rewards)
    return _train(cell, writer, rewards)


def _beforehand(cell: Cell, writer: PreTrainedModel, rewards: ModelReward) -> Result:
    """Reliability of the rewards by strategy, on the writer's own programs to training tasks."""
    s = cell.setting
    tasks = drawn(split()[0], s["tasks"], random.Random(f"beforehand {cell.seed}"))
    repeated = [task for task in tasks for _ in range(s["group"])]
    programs = write_programs(writer, build_tokenizer(), repeated, temperature=1.0, seed=1000 + cell.seed)
    flat = rewards([task.prompt for task in repeated], programs)
    shares = _judge()(repeated, programs)
    groups = [slice(first, first + s["group"]) for first in range(0, len(repeated), s["group"])]
    strategies = ("none", "best_of_n", "best_random", "best_worst")
    found = reliability([flat[g] for g in groups], [shares[g] for g in groups], strategies=strategies)
    return as_dict(found) | {
        "passed": sum(share == 1 for share in shares) / len(shares),
        "best_passed": sum(shares[g][flat[g].index(max(flat[g]))] == 1 for g in groups) / len(groups),
        "some_passed": sum(max(shares[g]) == 1 for g in groups) / len(groups),
    }


def _train(cell: Cell, writer: Path, rewards: ModelReward) -> Result:
    s = cell.setting
    tokenizer = build_tokenizer()
    model, frozen = writer_from(writer), writer_from(writer)
    held_out = drawn(split()[1], s["judged"], random.Random(f"held out {cell.seed}"))
    steps_a_rollout = _steps_a_rollout(cell)
    curve: dict[str, list[float]] = {}

    def look(policy: Any, step: int) -> None:
        rollouts = step // steps_a_rollout
        times = s["sampled_last" if rollouts == s["rollouts"] else "sampled"]
        measured = _measures(policy, frozen, rewards, held_out, times, cell.seed)
        for key, value in ({"programs": rollouts * s["prompts"] * s["group"]} | measured).items():
            curve.setdefault(key, []).append(value)

    look(model, 0)
    tasks = drawn(split()[0], s["rollouts"] * s["prompts"], random.Random(f"tasks {cell.seed}"))
    with TemporaryDirectory() as scratch:
        trainer = PFPPOTrainer(
            model,
            rewards,
            _arguments(cell, scratch),
            train_dataset=Dataset.from_list([{"prompt": task.prompt} for task in tasks]),
            processing_class=tokenizer,
            callbacks=[world.Watch(s["every"] * steps_a_rollout, look)],
        )
        start.train(trainer)
    logged = [entry for entry in trainer.state.log_history if "critic/explained_variance" in entry]
    explained = [entry["critic/explained_variance"] for entry in logged]
    last = {f"last_{key}": value[-1] for key, value in curve.items()}
    return {**curve, **last, "explained": explained, "last_explained": sum(explained[-4:]) / len(explained[-4:])}


def _steps_a_rollout(cell: Cell) -> int:
    s = cell.setting
    return s["passes"] * s["prompts"] * s["group"] // s["batch"]


def _arguments(cell: Cell, folder: str) -> PFPPOConfig:
    s, steps_a_rollout = cell.setting, _steps_a_rollout(cell)
    shared = start.arguments(
        folder, steps=s["rollouts"] * steps_a_rollout, batch=s["batch"], lr=s["lr"], seed=cell.seed, warmup=0
    )
    shared |= {"logging_strategy": "steps", "logging_steps": steps_a_rollout, "warmup_steps": steps_a_rollout}
    return PFPPOConfig(
        **shared,
        num_generations=s["group"],
        steps_per_generation=s["prompts"] * s["group"] // s["batch"],
        num_iterations=s["passes"],
        max_completion_length=programs_models.ANSWER,
        beta=s["beta"],
        strategy=s["strategy"],
        critic="model",
        critic_learning_rate=s["critic_lr"],
    )


def _measures(
    policy: PreTrainedModel, frozen: PreTrainedModel, rewards: ModelReward, tasks: list[Task], times: int, seed: int
) -> dict[str, float]:
    """Of programs to held-out tasks: the share that passes all tests, greedy and sampled (`times` a task).

    Of the sampled also the mean share of tests passed, the mean reward, and the KL to the start in nats a program, the
    mean log-ratio.
    """
    tokenizer = build_tokenizer()
    greedy = _judge()(tasks, write_programs(policy, tokenizer, tasks, temperature=0.0, seed=0))
    repeated = [task for task in tasks for _ in range(times)]
    programs = write_programs(policy, tokenizer, repeated, temperature=1.0, seed=seed)
    shares = _judge()(repeated, programs)
    asked = [tokenizer(task.prompt)["input_ids"] for task in repeated]
    ends = [tokenizer.eos_token_id]
    pairs = [(ids, tokenizer(text)["input_ids"] + ends) for ids, text in zip(asked, programs, strict=True)]
    own, first = (
        sequence_logps(model, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=64) for model in (policy, frozen)
    )
    return {
        "greedy": sum(share == 1 for share in greedy) / len(greedy),
        "passed": sum(share == 1 for share in shares) / len(shares),
        "share": sum(shares) / len(shares),
        "reward": sum(rewards([task.prompt for task in repeated], programs)) / len(repeated),
        "kl": float((own - first).mean()),
    }


LEARNT = ("_trl", "configs", "critic", "pf_ppo", "pf_ppo_config", "rollouts", "sampled_configs", "text_scores")
CLAIM = Claim(
    name="programs",
    statement=programs_report.STATEMENT,
    cells=cells,
    experiment=experiment,
    judge=programs_report.judge,
    sources=(
        Path(__file__),
        *SOURCES,
        *(path for path in package_files("llmalign.trainers") if path.stem in LEARNT),
    ),
)
