"""One measurement of a sampling trainer: ours or TRL's GRPOTrainer on the same prompts, lengths and reward."""

from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from benching import cases
from benching.contenders import BETA, LEARNING_RATE, WARM_UP, Clock, Memory, Outcome, StepClock
from llmalign.trainers import METHODS

#: what a method needs beside what all share
OPTIONS: dict[str, dict[str, Any]] = {
    "copg_online": {},
    "mdpo": {"num_iterations": 2},  # one is refused: it would be plain policy gradient
    "fdpg": {"target": "reward"},
    "pf_ppo": {"critic": "head"},
}


def even(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of even tokens: any reward that costs nothing would do."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def sample(job: cases.Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Train for the job's steps; a step is a rollout of PROMPTS prompts and all optimizer steps that it serves.

    Both trainers get the same fields: so many completions of exactly so many tokens, a reference, as many passes.
    """
    case = job.get_case()
    assert case.method is not None
    options = OPTIONS[case.method]
    passes = options.get("num_iterations", 1)
    rollouts = WARM_UP + job.steps
    groups = [cases.Group(case.prompt, ()) for _ in range(rollouts * cases.PROMPTS)]
    rows = Dataset.from_list([{"prompt": prompt} for prompt, _ in cases.texts(groups, case.shape.vocabulary)])
    clock, memory = Clock(job.device), Memory(job.device)
    common = {
        "output_dir": f"{job.folder}/{job.case}/{job.contender}",
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": job.dtype},
        "beta": BETA,
        "num_generations": case.completions,
        "per_device_train_batch_size": cases.PROMPTS * case.completions,
        "max_completion_length": case.completion,
        "generation_kwargs": {"min_new_tokens": case.completion},
        "num_iterations": passes,
        "max_steps": rollouts * passes,
        "shuffle_dataset": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    torch.manual_seed(0)
    if job.contender == "trl":
        trainer: Any = GRPOTrainer(
            job.model, even, GRPOConfig(**common), train_dataset=rows, processing_class=tokenizer
        )
    else:
        method = METHODS[case.method]
        if case.method == "fdpg":  # which refuses every way of sampling but the model's own
            del common["generation_kwargs"]
        trainer = method.trainer(
            job.model, even, method.config(**(common | options)), train_dataset=rows, processing_class=tokenizer
        )
    trainer.generation_config.min_new_tokens = case.completion
    trainer.add_callback(StepClock(clock))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    layout = "padded" if job.contender == "trl" else trainer.scorer.kind
    steps = clock.seconds()
    # The first rollout is the warm-up; a clock's own warm-up is a single step of it.
    steps = steps[(passes - 1) * WARM_UP :]
    seconds = [sum(steps[start : start + passes]) for start in range(0, len(steps), passes)]
    return Outcome(seconds, losses[WARM_UP * passes :], memory.megabytes(), layout, clock.setup_seconds)
