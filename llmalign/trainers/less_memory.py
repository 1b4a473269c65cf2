"""Which keys of a recipe to change where memory runs out, from their values and from what the run was doing."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from accelerate.utils import DistributedType

# Functions that were running, and so what did not fit.
EVALUATING = ("evaluation_loop", "prediction_step")
SAMPLING = ("_generate_single_turn", "_draw_pairs")
ENCODING = ("_encoded", "_in_parts")
LOADING = ("from_pretrained", "create_model_from_path")


@dataclass(frozen=True)
class Advice:
    """`same`: a resumed run may have them, for its steps stay what they are. `other`: they make it another run."""

    same: list[str]
    other: list[str]


def advice(args: Any, *, peft: bool, running: Collection[str] = (), any_split: bool = True) -> Advice:
    """What would need less memory, the likeliest first; `peft` says whether an adapter alone is trained.

    `running` are names of the functions that were; `any_split` says that a resumed run may split its steps otherwise.
    """
    names = {entry.name for entry in fields(args)}
    same: list[str] = []
    other: list[str] = []
    if not set(LOADING).isdisjoint(running):
        other += ["dtype: bfloat16", *_sharded(args)]
        return Advice(same, other)
    if not set(EVALUATING).isdisjoint(running) and args.per_device_eval_batch_size > 1:
        unit = (args.num_generations_eval or args.num_generations) if "num_generations" in names else 1
        if args.per_device_eval_batch_size > unit:
            lower = max(args.per_device_eval_batch_size // unit // 2, 1) * unit
            same.append(f"per_device_eval_batch_size: {lower}")
    if not set(ENCODING).isdisjoint(running) and "encode_batch_size" in names and args.encode_batch_size > 1:
        same.append(f"encode_batch_size: {args.encode_batch_size // 2}")
    if not set(SAMPLING).isdisjoint(running) and "sampling_batch_size" in names:
        drawn = args.sampling_batch_size or args.per_device_train_batch_size
        if drawn > 1:
            other.append(f"sampling_batch_size: {drawn // 2}")
    if not (args.activation_checkpointing or args.gradient_checkpointing):
        same.append("activation_checkpointing: true")
    split = _smaller_batch(args, names)
    if split is not None:
        (same if any_split else other).append(split)
    if "tokens_per_batch" in names and args.tokens_per_batch is not None:
        other.append(f"tokens_per_batch: {max(args.tokens_per_batch // 2, 1)}")
    if not peft:
        other.append("use_peft: true")
        if "precompute_ref_log_probs" in names and not args.precompute_ref_log_probs:
            other.append("precompute_ref_log_probs: true (no second model beside the policy)")
    other += _shorter(args, names) + _sharded(args)
    return Advice(same, other)


def _smaller_batch(args: Any, names: set[str]) -> str | None:
    """The same rows a step in smaller micro-batches; None where a micro-batch is as small as it can be."""
    unit = args.num_generations if "num_generations" in names else 1
    parts = args.per_device_train_batch_size // unit
    if parts < 2 or ("tokens_per_batch" in names and args.tokens_per_batch is not None):
        return None
    factor = next(number for number in range(2, parts + 1) if parts % number == 0)
    words = (
        f"per_device_train_batch_size: {args.per_device_train_batch_size // factor} with gradient_accumulation_steps: "
        f"{args.gradient_accumulation_steps * factor}"
    )
    if "steps_per_generation" in names and args.steps_per_generation != args.gradient_accumulation_steps:
        words += f" and steps_per_generation: {args.steps_per_generation * factor}"
    return words


def _shorter(args: Any, names: set[str]) -> list[str]:
    """Shorter rows, fewer completions, smaller pictures."""
    found = []
    if "num_generations" in names:
        if args.num_generations > 2:
            found.append(f"num_generations: {max(args.num_generations // 2, 2)}")
        found.append(f"max_completion_length: {args.max_completion_length // 2}")
    elif "max_length" in names and args.max_length is not None:
        found.append(f"max_length: {args.max_length // 2}")
    if "resolution" in names:
        half = "a smaller one" if args.resolution is None else str(args.resolution // 2)
        found.append(f"resolution: {half}")
    return found


def _sharded(args: Any) -> list[str]:
    """Weights, gradients and optimizer state shared out over GPUs, where they are not yet."""
    kind = args.distributed_state.distributed_type if args.distributed_state is not None else None
    if kind == DistributedType.FSDP or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3):
        return []
    return ["--accelerate zero3 on several GPUs"]
