"""What one run is, read from its recipe before anything is loaded: its model, its rows, its batches, what it holds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.training_args import OptimizerNames

from llmalign.errors import UserError
from llmalign.plan.memory import optimizer_state
from llmalign.plan.outline import TextOutline, Weights, text_outline
from llmalign.plan.rows import Lengths
from llmalign.prepare import PREPARATIONS, end_ids, prepare
from llmalign.recipe import Recipe
from llmalign.trainers.loading import ModelConfig, choose_dtype, load_tokenizer, set_eos_token

logger = logging.getLogger(__name__)

UNKNOWN_OPTIMIZER = "the optimizer {} is not known here: its state is not modelled"
PROMPTS, PAIRS, GROUPS, TEXT = "prompts", "pairs", "groups", "text"
COMPLETIONS_ASSUMED = 2  # of a row of groups, where the data are not read


@dataclass(frozen=True)
class Target:
    """Where a run is planned for. `memory` bytes a device; None: the machine that this runs on."""

    devices: int = 1
    memory: float | None = None
    cuda: bool = False


@dataclass
class Facts:
    """What every part of a plan reads. `notes`: what was assumed, and what is not modelled, in sentences."""

    recipe: Recipe
    config: Any
    target: Target
    bf16: bool
    checkpointing: bool
    outline: TextOutline
    weights: Weights
    state: float
    lengths: Lengths
    evaluated: bool
    reports: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.recipe.method.name

    @property
    def kind(self) -> str:
        """What the rows are."""
        return self.recipe.method.kind

    @property
    def group(self) -> int:
        """Completions of a prompt in a rollout."""
        return self.config.num_generations


def text_facts(recipe: Recipe, target: Target, path: str, rows: int | None) -> Facts:
    """Read a recipe of text; `rows` takes the place of reading its data. `path` is where its model's config lies."""
    config = recipe.training_config()
    bf16, checkpointing = precision(recipe, config, target)
    options = choose_dtype(recipe.model_config(), chosen="dtype" in recipe.model, bf16=bf16)
    notes: list[str] = []
    outline = text_outline(
        path,
        options,
        bf16=bf16,
        scorer=recipe.method.name in ("reward", "preference"),
        trust_remote_code=config.trust_remote_code,
    )
    lengths, evaluated, reports = _rows(recipe, config, path, options, rows, notes)
    weights = outline.weights()
    trained = [tuple(weight.shape) for weight in outline.build().parameters() if weight.requires_grad]
    optimizer = OptimizerNames(config.optim).value
    state = optimizer_state(optimizer, trained, momentum="momentum" in (config.optim_args or ""))
    if state is None:
        notes.append(UNKNOWN_OPTIMIZER.format(optimizer))
    return Facts(
        recipe=recipe,
        config=config,
        target=target,
        bf16=bf16,
        checkpointing=checkpointing,
        outline=outline,
        weights=weights,
        state=state or 0.0,
        lengths=lengths,
        evaluated=evaluated,
        reports=reports,
        notes=notes,
    )


def precision(recipe: Recipe, config: Any, target: Target) -> tuple[bool, bool]:
    """Whether a run computes in bfloat16 and checkpoints: as chosen here, or as a GPU would have it chosen."""
    checkpointing = bool(config.activation_checkpointing or config.gradient_checkpointing)
    if not target.cuda:
        return bool(config.bf16), checkpointing
    given = recipe.config
    bf16 = bool(config.bf16) if given.get("bf16") is not None else not config.fp16
    asked = {"activation_checkpointing", "gradient_checkpointing"} & {k for k, v in given.items() if v is not None}
    return bf16, checkpointing if asked else True


def _rows(
    recipe: Recipe, config: Any, path: str, options: ModelConfig, rows: int | None, notes: list[str]
) -> tuple[Lengths, bool, Mapping[str, Any]]:
    """Lengths of the training rows, whether there is an evaluation set, and the doctor's reports."""
    if recipe.data.streaming:
        raise UserError("the rows of a stream cannot be counted ahead: plan with `streaming: false`, or give --rows")
    if rows is None and not _has_tokenizer(path):
        notes.append(f"{path} holds no tokenizer, so the data were not read")
        rows = 1000
    if rows is not None:
        lengths = assumed_lengths(recipe, config, rows)
        notes.append(f"{rows:,} rows of {_shape(lengths)} were taken for the data, which were not read")
        return lengths, bool(recipe.data.eval_sources() or recipe.data.holdout_rows), {}
    tokenizer = load_tokenizer(path, revision=options.model_revision, trust_remote_code=config.trust_remote_code)
    set_eos_token(tokenizer, recipe.config.get("eos_token"))
    data = prepare(recipe, tokenizer, config, end_ids(tokenizer, path, options.model_revision))
    train = data.train
    assert isinstance(train, Dataset)
    template = {"chat_template_kwargs": config.chat_template_kwargs} if recipe.method.kind == PROMPTS else {}
    make: Any = PREPARATIONS[recipe.method.kind]  # of a trainer that tokenizes by itself; what was made is kept on disk
    ready = make(
        train, tokenizer, max_length=config.max_length, num_proc=config.dataset_num_proc, name="train", **template
    )
    lengths = Lengths.of(ready, config.max_length)
    return shaped(lengths, recipe.method.name, config), data.evaluation is not None, data.reports


def shaped(lengths: Lengths, method: str, config: Any) -> Lengths:
    """Rows as the method's model reads them: a preference model reads both answers at once, in both orders."""
    if method != "preference":
        return lengths
    whole = lengths.prompts + lengths.completions.reshape(-1, 2).sum(axis=1)
    whole = np.minimum(whole, config.max_length or whole.max(initial=1))
    return Lengths(np.zeros_like(whole), np.repeat(whole, 2), np.full(len(whole), 2))


def assumed_lengths(recipe: Recipe, config: Any, rows: int) -> Lengths:
    """Rows that fill `max_length`, their prompt half of it."""
    kind, length = recipe.method.kind, config.max_length or 1024
    if kind == TEXT or recipe.method.name == "preference":
        return Lengths.alike(rows, 0, [length] * (1 if kind == TEXT else 2))
    if kind == PROMPTS:
        return Lengths.alike(rows, config.max_prompt_length or 512, [])
    third = kind == PAIRS and recipe.config.get("base") in ("reference", "column")
    answers = [length - length // 2] * (COMPLETIONS_ASSUMED + third)
    return Lengths.alike(rows, length // 2, answers)


def _shape(lengths: Lengths) -> str:
    answers = lengths.completions[: int(lengths.counts[0])].tolist()
    prompt = int(lengths.prompts[0])
    words = [f"{prompt} prompt tokens"] if prompt else []
    if answers:
        words.append(f"completions of {' and '.join(map(str, answers))} tokens")
    return " with ".join(words)


def _has_tokenizer(path: str) -> bool:
    """A folder without any file of a tokenizer has none; of a Hub name only loading tells."""
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("*token*")) or (folder / "vocab.json").is_file()


def frozen_outline(facts: Facts, path: str | None, *, scorer: bool = False) -> TextOutline:
    """Another model that is scored beside the policy: of `path`, or the one that training starts from."""
    if path is None:
        return replace(facts.outline, adapter=None)
    options = ModelConfig(model_name_or_path=path, attn_implementation=facts.outline.config._attn_implementation)
    options.dtype = str(facts.outline.dtype).removeprefix("torch.") if not scorer else None
    trust = facts.outline.trust_remote_code
    return replace(text_outline(path, options, bf16=facts.bf16, scorer=scorer, trust_remote_code=trust), adapter=None)
