"""The ranges of the numbers that every config inherits from transformers, which checks few of them or none."""

import math
from dataclasses import fields
from typing import Any

from llmalign.errors import UserError

_LARGEST_NUMBER = 3.4e38  # float32's, in which weights and losses are at most kept

_LARGEST_SEED = 2**32 - 1  # numpy's
_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "max_length", "dataset_num_proc", "dataloader_prefetch_factor",
    "torch_empty_cache_steps", "save_total_limit", "max_prompt_length", "max_completion_length",
    "steps_per_generation", "num_iterations", "generation_batch_size",
)  # fmt: skip
_ZERO_OR_MORE = (
    "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "neftune_noise_alpha",
    "dataloader_num_workers", "adam_epsilon",
)  # fmt: skip
_POSITIVE = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_BELOW_ONE = ("adam_beta1", "adam_beta2")
_SEEDS = ("seed", "data_seed")


def check_ranges(args: Any) -> None:
    """Raise UserError naming the first inherited field whose value is out of range, its value and the rule.

    Numbers that float32 cannot hold are out of range for any field, also for those that a method's own config adds, of
    which no more is covered. Nor is `max_steps`, where -1 stands for "by epochs".
    """
    rules = (
        (_AT_LEAST_ONE, lambda value: value >= 1 and value == int(value), "a whole number of at least 1"),
        (_ZERO_OR_MORE, lambda value: value >= 0, "zero or a positive finite number"),
        (_POSITIVE, lambda value: value > 0, "a positive finite number"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)"),
        (_SEEDS, lambda value: 0 <= value <= _LARGEST_SEED, f"from 0 to {_LARGEST_SEED}"),
    )
    known = {entry.name for entry in fields(args)}
    for name in sorted(known):
        value = getattr(args, name)
        if isinstance(value, (int, float)) and _LARGEST_NUMBER < abs(value) < math.inf:
            raise UserError(f"{name} must be at most {_LARGEST_NUMBER:g}, the largest number of float32, got {value!r}")
    if "model_init_kwargs" in known and not isinstance(args.model_init_kwargs, (dict, type(None))):
        raise UserError(f"model_init_kwargs must be a mapping, got {args.model_init_kwargs!r}")
    for names, holds, rule in rules:
        for name in names:
            value = getattr(args, name) if name in known else None
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and holds(value)):
                raise UserError(f"{name} must be {rule}, got {value!r}")
