"""What configs share where they are made: checks that name the field, and what the hardware decides."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from llmalign.errors import UserError
from llmalign.trainers.ranges import check_ranges
from llmalign.trainers.sharding import let_the_cpu_shard, refuse_other_offloaded_optimizers

CHECKPOINTING = "Recompute activations; left open: on CUDA only."
STOP, SKIP = "stop", "skip"
NON_FINITE = "A step whose loss or gradient is NaN or infinite: stop before it, or skip it, counted."
NAN_FILTER = "Hide NaN losses from the log; TRL's default is True."


def choose_hardware(args: Any) -> str:
    """Fill in what the user left open (`use_cpu`, `bf16`, activation checkpointing) and return the choice in words."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # accelerate would run plain data parallelism on weights that are sharded while they are loaded
        raise UserError("ACCELERATE_USE_CPU switches DeepSpeed off: unset it and set DS_ACCELERATOR=cpu")
    check_ranges(args)
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    on_mps = torch.backends.mps.is_available() and not args.use_cpu
    if not (on_cuda or on_mps):
        args.use_cpu = True
    if args.bf16 is None:
        args.bf16 = bool(on_cuda and torch.cuda.is_bf16_supported() and not args.fp16)
    if args.gradient_checkpointing is None and args.activation_checkpointing is None:
        args.activation_checkpointing = bool(on_cuda)
    checkpointing = args.activation_checkpointing or args.gradient_checkpointing
    device = "CUDA" if on_cuda else "MPS" if on_mps else "CPU"
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return f"{device}, {precision}, {'with' if checkpointing else 'without'} gradient checkpointing"


def refuse_inherited(args: Any, names: dict[str, str]) -> None:
    """Raise UserError where an inherited field that would be ignored has another value than its default."""
    for entry in fields(args):
        if entry.name not in names:
            continue
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value = getattr(args, entry.name)
        if value != default:
            raise UserError(
                f"{entry.name}={value!r} is not honoured by {type(args).__name__}: {names[entry.name]}; "
                f"leave it at {default!r}"
            )


def refuse_foreign(args: Any, belongs: dict[str, tuple[str, Any]]) -> None:
    """Raise UserError where a field that only another choice reads (`field: (option, value)`) is not at its default."""
    for name, (option, value) in belongs.items():
        own = getattr(args, option)
        if own != value:
            refuse_inherited(args, {name: f"it belongs to {option}: {value}, and this run's is {own}"})


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raise UserError naming the field, its value and the rule, unless the condition holds."""
    if not condition:
        raise UserError(f"{name} must be {rule}, got {value!r}")


def best_by_accuracy(args: Any, loss: str) -> None:
    """Let accuracy pick the best checkpoint of a loss without a lower bound; refuse a choice by that loss."""
    if not args.load_best_model_at_end and args.save_strategy != "best":
        return
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = "rewards/accuracies", True
    if args.metric_for_best_model.split("_")[-1] == "loss":
        raise UserError(
            f"the {loss} loss has no lower bound, so it cannot pick the best checkpoint; "
            "set metric_for_best_model: rewards/accuracies"
        )


def positive(args: Any, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and value > 0 and math.isfinite(value), name, value, "a positive finite number")


def check_flip_rate(args: Any, upper: float = 0.5, *, closed: bool = False) -> None:
    value = args.flip_rate
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and (0 <= value <= upper if closed else 0 <= value < upper)
    hint = "" if closed else " (at 0.5 the labels carry no information and the correction divides by zero)"
    require(inside, "flip_rate", value, f"in [0, {upper:g}{']' if closed else ')'}{hint}")


_NEVER = {
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint, whole or not at all, without it",
    "save_on_each_node": "all machines have to see one output_dir, into which the first one writes",
}


@dataclass
class ChosenHardware:
    """Precision, device and checkpointing chosen from the hardware; the choice in words is `choices`."""

    non_finite: str = field(default=STOP, metadata={"help": NON_FINITE})

    def __post_init__(self) -> None:
        require(self.non_finite in (STOP, SKIP), "non_finite", self.non_finite, f"{STOP} or {SKIP}")
        refuse_inherited(self, _NEVER)
        self.choices = choose_hardware(self)
        super().__post_init__()  # type: ignore[misc]
        let_the_cpu_shard()
        refuse_other_offloaded_optimizers(self)
