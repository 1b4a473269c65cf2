"""How long a step takes: from operations, bandwidth and stated assumptions, or from steps that were run.

A multiply-add counts as two operations. T tokens are read, S are scored, A query-key pairs are seen; B numbers stand in
the layers' matrices, H in the head's, D is heads times head size over all layers:

    forward   F = 2 (T B + S H) + 4 A D
    training  3 F;   an adapter: 2 F and 4 A D, for frozen weights need no gradient of their own
    again     F where activations are checkpointed, F for the reference, F for a previous iterate
"""

from dataclasses import dataclass

import numpy as np

from llmalign.plan.rows import Lengths
from llmalign.scores.scoring import PADDED, SHARED_PROMPT


@dataclass(frozen=True)
class Machine:
    """One kind of device in hosts of several: operations a second, bytes a second to others in the host and beyond."""

    name: str
    operations: float
    inside: float
    between: float
    per_host: int = 8
    utilisation: float = 0.35


#: bfloat16 dense; NVLink and 400 Gb/s a device as they are reached, not as they are sold: see SCALING.md
H100 = Machine("H100 SXM", operations=989e12, inside=370e9, between=40e9)


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model."""

    tokens: float
    scored: float
    pairs: float

    def __mul__(self, factor: float) -> "Work":
        return Work(self.tokens * factor, self.scored * factor, self.pairs * factor)


def work_of(lengths: Lengths, kind: str, fed: float) -> Work:
    """Of all rows under one kind of scoring; `fed` tokens are read, padding included."""
    prompts = np.repeat(lengths.prompts, lengths.counts).astype(float)
    completions = lengths.completions.astype(float)
    if kind == SHARED_PROMPT:
        own = lengths.prompts.astype(float)
        pairs = (own * (own + 1) / 2).sum() + (completions * prompts + completions * (completions + 1) / 2).sum()
    else:
        whole = prompts + completions
        pairs = (whole * (whole + 1) / 2).sum()
        if kind == PADDED and whole.sum():
            pairs *= fed / whole.sum()  # what is padded is looked at as well, about as long
    return Work(fed, float(completions.sum()), float(pairs))


def forward(work: Work, *, body: float, head: float, width: float) -> float:
    """F of the module's docstring; `width` is heads times head size over all layers."""
    return 2 * (work.tokens * body + work.scored * head) + 4 * work.pairs * width


def operations(
    work: Work, *, body: float, head: float, width: float, adapter: bool, checkpointing: bool, frozen: int
) -> float:
    """Of one training pass over a batch, with `frozen` models scored beside it."""
    once = forward(work, body=body, head=head, width=width)
    trained = 2 * once + 4 * work.pairs * width if adapter else 3 * once
    return trained + once * checkpointing + once * frozen


def communication(config: str, devices: int, count: float, trained: float, size: int, frozen: float) -> float:
    """Bytes that a device sends in one micro-batch's pass and, under ZeRO-1 and DDP, in one step.

    `count` numbers are held and `trained` of them trained, each of `size` bytes on the way; `frozen` numbers of sharded
    models are gathered once. Rings: N-1 of N shares go to others.
    """
    share = (devices - 1) / devices
    if config == "single" or devices == 1:
        return 0.0
    if config in ("zero3", "fsdp2"):  # gathered for the forward and again for the backward pass, gradients scattered
        return (2 * count + trained + frozen) * size * share
    if config == "ddp":
        return 2 * trained * 4 * share
    return 2 * trained * size * share  # scattered, and the new weights gathered


def step_seconds(compute: float, sent: float, machine: Machine, devices: int) -> tuple[float, float]:
    """Seconds of a pass, where sending hides behind computing altogether, and where it does not at all."""
    computing = compute / (machine.operations * machine.utilisation)
    sending = sent / (machine.inside if devices <= machine.per_host else machine.between)
    return max(computing, sending), computing + sending


def readable(seconds: float) -> str:
    """A time in words that fit its size."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
