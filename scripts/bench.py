"""Time of one optimizer step beside TRL's DPOTrainer: same pairs, same small Llama, float32 on the CPU.

Every repetition runs each trainer once, in turn, and divides its time by TRL's of the same repetition: the ratios hold
on a machine that is busy with other things, the seconds do not; where it is very busy, trust the CPU time. A step is
everything between two optimizer steps: batch, policy, reference on the fly, backward, update, metrics, log. Not
measured: start-up, evaluation, saving, GPUs, adapters.
"""

import argparse
import copy
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from llmalign import PairConfig, PairTrainer, RPOConfig, RPOTrainer

SHAPES = ["64/64", "256/64"]  # prompt and completion tokens
VOCABULARY, BETA, LEARNING_RATE = 8192, 0.1, 1e-4
BASELINE, SAME_LOSS = "TRL dpo", "llmalign dpo"
CONTENDERS: dict[str, tuple[type, Callable[..., Any]]] = {
    BASELINE: (trl.DPOTrainer, lambda **common: trl.DPOConfig(beta=BETA, **common)),
    SAME_LOSS: (PairTrainer, lambda **common: PairConfig(loss="dpo", beta=BETA, **common)),
    "llmalign rpo": (RPOTrainer, lambda **common: RPOConfig(beta=BETA, eta=0.005, **common)),
}


@dataclass(frozen=True)
class Ratio:
    """A trainer's time over TRL's in the same repetition: over all repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """What one trainer needed on one shape: median seconds a step, and the ratios of wall and CPU time to TRL's."""

    trainer: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cpu_seconds: float
    wall_ratio: Ratio
    cpu_ratio: Ratio


class StepClock(TrainerCallback):
    """Wall and CPU time at the start of every step and at the end of the run."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    on_train_end = on_step_begin

    def mean_step(self) -> tuple[float, float]:
        """Wall and CPU seconds of a step, the first of the run left out."""
        _, first, *_, last = self.marks
        steps = len(self.marks) - 2
        self.marks = []
        return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: texts of an exact length are easy to write."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def random_pairs(count: int, prompt_tokens: int, completion_tokens: int) -> Dataset:
    """Pairs of random words with exactly these lengths once the end-of-text token is added."""
    words = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{words.randrange(VOCABULARY - 3)}" for _ in range(length))

    return Dataset.from_list(
        [
            {
                "prompt": text(prompt_tokens),
                "chosen": f" {text(completion_tokens - 1)} <eos>",
                "rejected": f" {text(completion_tokens - 1)} <eos>",
            }
            for _ in range(count)
        ]
    )


def build_trainer(name: str, rows: Dataset, batch: int, steps: int, folder: str) -> tuple[Any, StepClock]:
    trainer_class, config = CONTENDERS[name]
    clock = StepClock()
    model = build_model()
    trainer = trainer_class(
        model=model,
        ref_model=copy.deepcopy(model),
        args=config(
            output_dir=f"{folder}/{name}",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=1024,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=build_tokenizer(),
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, clock


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure(shape: tuple[int, int], batch: int, steps: int, repetitions: int, folder: str) -> list[Timing]:
    """Time every trainer on one shape; raises RuntimeError where the two DPO trainers do not train alike."""
    rows = random_pairs(batch * (steps + 1), *shape)
    trainers = {name: build_trainer(name, rows, batch, steps + 1, folder) for name in CONTENDERS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for repetition in track(range(repetitions + 1), description=f"{shape[0]}/{shape[1]} tokens"):
        names = list(CONTENDERS)
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            trainer, clock = trainers[name]
            trainer.train()
            times[name].append(clock.mean_step())
        if repetition == 0:
            theirs, ours = losses_of(trainers[BASELINE][0]), losses_of(trainers[SAME_LOSS][0])
            if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3):
                raise RuntimeError(f"the two DPO trainers do not train alike: TRL's losses {theirs}, ours {ours}.")
    return [summary(name, shape, times[name][1:], times[BASELINE][1:]) for name in CONTENDERS]


def summary(
    name: str, shape: tuple[int, int], own: list[tuple[float, float]], base: list[tuple[float, float]]
) -> Timing:
    seconds, cpu_seconds = (statistics.median(times) for times in zip(*own, strict=True))
    wall_ratio, cpu_ratio = (
        Ratio(statistics.median(ratios), min(ratios), max(ratios))
        for ratios in zip(
            *((mine[0] / its[0], mine[1] / its[1]) for mine, its in zip(own, base, strict=True)), strict=True
        )
    )
    return Timing(name, *shape, seconds, cpu_seconds, wall_ratio, cpu_ratio)


def show(timings: list[Timing], console: Console) -> None:
    table = Table(title="One optimizer step; below 1 is faster than TRL: median (lowest-highest)")
    for heading in ("tokens", "trainer", "s a step", "wall time ratio", "CPU time ratio"):
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    for timing in timings:
        table.add_row(
            f"{timing.prompt_tokens}/{timing.completion_tokens}",
            timing.trainer,
            f"{timing.seconds:.3f}",
            str(timing.wall_ratio),
            str(timing.cpu_ratio),
            end_section=timing.trainer == list(CONTENDERS)[-1],
        )
    console.print(table)


def quieten() -> None:
    """Leave the terminal to the bench: for this process alone, so not part of `main`."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="prompt/completion tokens, such as 64/64")
    parser.add_argument("--repetitions", type=int, default=8, help="counted after one that warms up")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each trainer in a repetition")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args(argv)
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes:
            prompt, completion = map(int, shape.split("/"))
            timings += measure((prompt, completion), arguments.pairs, arguments.steps, arguments.repetitions, folder)
    show(timings, Console())
    if arguments.out is not None:
        machine = {"threads": torch.get_num_threads(), "cpus": os.cpu_count()}
        versions = {library.__name__: library.__version__ for library in (torch, transformers, trl)}
        settings = {"pairs": arguments.pairs, "steps": arguments.steps, "repetitions": arguments.repetitions}
        report = {"settings": settings | machine | versions, "timings": [asdict(timing) for timing in timings]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    quieten()
    main()
