"""Which config fits, with which batch: the least change to a recipe with which a step fits into a device's memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmalign.plan.sharding import DDP, FSDP2, OFFLOAD, SINGLE, ZERO1, ZERO2, ZERO3, Device

RESERVE = 0.05  # of a device's memory, for what its allocator loses between blocks
#: in the order in which they cost more sending
ORDER = (SINGLE, DDP, ZERO1, ZERO2, FSDP2, ZERO3, OFFLOAD)

Measure = Callable[[str, int, int, bool], tuple[Device, str]]  # config, size, accumulation, checkpointing


@dataclass(frozen=True)
class Choice:
    """A way to run: `size` rows a device at a time, so many times a step."""

    config: str
    size: int
    accumulation: int
    checkpointing: bool
    device: Device
    moment: str


def usable(memory: float) -> float:
    """Of a device's memory, what a plan may fill."""
    return memory * (1 - RESERVE)


def accumulation_for(total: int, size: int, devices: int) -> int:
    """Micro-batches of `size` on each device for `total` rows a step, or the next larger number of rows."""
    return max(-(-total // (size * devices)), 1)


def sizes(size: int, total: int, devices: int, unit: int = 1) -> list[int]:
    """Rows at a time to try, largest first: the recipe's, and what halving leaves of it, in whole `unit`s."""
    largest = max(min(size, -(-total // devices)) // unit, 1)
    found = []
    while True:
        found.append(largest * unit)
        if largest == 1:
            return found
        largest //= 2


def choose(
    configs: Iterable[str],
    measure: Measure,
    *,
    memory: float,
    size: int,
    total: int,
    devices: int,
    checkpointing: bool,
    unit: int = 1,
    floor: Callable[[str], float] = lambda config: 0.0,
) -> Choice | None:
    """The first config in which a step fits, with the fewest changes: fewer rows at a time, then checkpointing.

    `floor`: bytes that a config holds without any pass, which spares looking at passes.
    """
    for config in sorted(configs, key=ORDER.index):
        if floor(config) > usable(memory):
            continue
        for again in dict.fromkeys((checkpointing, True)):
            tried = sizes(size, total, devices, unit)
            least = _tried(config, measure, tried[-1], total, devices, again)
            if least.device.total > usable(memory):
                continue
            for each in tried[:-1]:
                found = _tried(config, measure, each, total, devices, again)
                if found.device.total <= usable(memory):
                    return found
            return least
    return None


def _tried(config: str, measure: Measure, size: int, total: int, devices: int, checkpointing: bool) -> Choice:
    accumulation = accumulation_for(total, size, devices)
    return Choice(config, size, accumulation, checkpointing, *measure(config, size, accumulation, checkpointing))


def command(recipe: str, choice: Choice, devices: int, given: Iterable[str] = ()) -> str:
    """The line that runs a choice; `given` are the overrides that the plan was made with."""
    words = ["llmalign train", recipe]
    if devices > 1 or choice.config != SINGLE:
        words.append(f"--accelerate {choice.config} --num_processes {devices}")
    words += [
        *given,
        f"--per_device_train_batch_size {choice.size}",
        f"--gradient_accumulation_steps {choice.accumulation}",
        f"--activation_checkpointing {str(choice.checkpointing).lower()}",
    ]
    return " ".join(words)
