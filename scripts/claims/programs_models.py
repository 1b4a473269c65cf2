"""The models of the programming claim: one that writes programs, imperfectly, and rewards learnt from judged pairs."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from claims import start
from claims.cells import Cell
from claims.programs_tasks import Task, drawn, lessons, split
from llmalign import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from llmalign.embedded.model import END, PAD, build_model
from llmalign.rewards.code import CodeReward
from llmalign.rewards.model import ModelReward
from llmalign.scores.sampling import sample_completions

VOCABULARY = 384
LONGEST = 192
ANSWER = 64
ATTEMPTS = 3


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = lessons(2000, -1, faulty=0.0, misread=0.0)
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    return tokenizer.to_str()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, trained on the tasks' own text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token=END,
        pad_token=PAD,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def teach(folder: Path, cell: Cell) -> None:
    """Write a model into `folder` that imitates programs of which a share is faulty."""
    s = cell.setting
    tokenizer = build_tokenizer()
    rows = Dataset.from_list(lessons(s["steps"] * s["batch"], cell.seed, faulty=s["faulty"], misread=s["misread"]))
    with TemporaryDirectory() as scratch:
        shared = start.arguments(scratch, steps=s["steps"], batch=s["batch"], lr=s["lr"], seed=cell.seed, warmup=30)
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
        config = SFTConfig(**(shared | schedule | {"adam_beta2": 0.98}))
        model = build_model(tokenizer, seed=cell.seed, config=_config(tokenizer, s["layers"]))
        start.train(SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Judge:
    """Shares of unit tests passed, run in the sandbox; a program that was judged before is not run again."""

    def __init__(self) -> None:
        self._reward = CodeReward()
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, tasks: Sequence[Task], programs: Sequence[str]) -> list[float]:
        """One share for each program; RuntimeError where its sandbox did not start in several attempts."""
        cases = [(program, task.tests) for task, program in zip(tasks, programs, strict=True)]
        for _ in range(ATTEMPTS):  # a sandbox that did not start says nothing of the program
            new = [case for case in dict.fromkeys(cases) if case not in self._known]
            if not new:
                return [self._known[case] for case in cases]
            texts, tests = map(list, zip(*new, strict=True))
            found = self._reward([""] * len(new), texts, tests=tests, entry_point=["f"] * len(new))
            self._known.update((case, share) for case, share in zip(new, found, strict=True) if share is not None)
        missing = sum(case not in self._known for case in cases)
        if missing:
            raise RuntimeError(f"The sandbox did not start for {missing} programs in {ATTEMPTS} attempts.")
        return [self._known[case] for case in cases]


def writer_from(folder: Path) -> PreTrainedModel:
    """A fresh float32 copy of the model in `folder`."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_programs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task], *, temperature: float, seed: int
) -> list[str]:
    """One program to each task, of at most ANSWER tokens."""
    ids = [tokenizer(task.prompt)["input_ids"] for task in tasks]
    drawn_ids = sample_completions(
        model, tokenizer, ids, max_new_tokens=ANSWER, temperature=temperature, seed=seed, batch_size=256
    )
    return [tokenizer.decode(own, skip_special_tokens=True) for own in drawn_ids]


def judged_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, judge: Judge, *, tasks: int, group: int, seed: int
) -> list[dict[str, str]]:
    """Pairs of programs to training tasks, chosen is what passes most tests of `group`, rejected what passes fewest."""
    asked = drawn(split()[0], tasks, random.Random(f"pairs {seed}"))
    repeated = [task for task in asked for _ in range(group)]
    programs = write_programs(model, tokenizer, repeated, temperature=1.0, seed=seed)
    shares = judge(repeated, programs)
    rows = []
    for place, task in enumerate(asked):
        part = slice(place * group, (place + 1) * group)
        own = sorted(zip(shares[part], programs[part], strict=True))
        if own[0][0] < own[-1][0]:
            rows.append({"prompt": task.prompt, "chosen": own[-1][1], "rejected": own[0][1]})
    return rows


def learn_rewards(folder: Path, writer: Path, cell: Cell, judge: Judge) -> None:
    """Write a reward model into `folder`, started from the writer and trained on pairs of its programs."""
    s = cell.setting
    tokenizer = build_tokenizer()
    pairs = judged_pairs(writer_from(writer), tokenizer, judge, tasks=s["tasks"], group=s["group"], seed=cell.seed)
    steps = s["epochs"] * len(pairs) // s["batch"]
    with TemporaryDirectory() as scratch:
        shared = start.arguments(scratch, steps=steps, batch=s["batch"], lr=s["lr"], seed=cell.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)  # for the new head
            model = AutoModelForSequenceClassification.from_pretrained(writer, num_labels=1, dtype=torch.float32)
        config = RewardConfig(**shared, max_length=LONGEST)
        rows = Dataset.from_list(pairs)
        start.train(RewardTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Rewards have mean 0 and deviation 1 over the pairs, as the critic's values do.
    twice = [row["prompt"] for row in pairs for _ in range(2)]
    both = [row[side] for row in pairs for side in ("chosen", "rejected")]
    ModelReward(model.eval(), tokenizer).fit(twice, both, folder)
