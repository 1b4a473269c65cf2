"""The memory of a forward and a backward pass, byte by byte, without weights and without computing anything.

The model is made of fake tensors, which have shapes and storages and no numbers, and the trainer's own code runs on
them. A ledger sees every operation: a storage that appears is added, one that nobody holds any more is taken off. What
the backward pass keeps, what is computed a second time and what lives for a moment are then all in the peak. On a CPU
the sum equals that of the real pass to the byte (tests/plan). Not covered: what an allocator keeps back or loses to
fragments, and inputs whose values decide what is computed (mixtures of experts).
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, LOGITS, GRADIENTS, COPIES = KINDS = ("activations", "logits", "gradients", "weight copies")


@dataclass(frozen=True)
class Peak:
    """Bytes by kind at one moment; they add up, and scale, kind by kind."""

    activations: float = 0
    logits: float = 0
    gradients: float = 0
    copies: float = 0

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.activations + self.logits + self.gradients + self.copies

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> "Peak":
        return Peak(*(factor * value for value in vars(self).values()))


class Ledger(TorchDispatchMode):
    """Sees every operation inside it and keeps the peak of each phase; weights made before it are not counted."""

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._held: dict[int, tuple[int, str, Any]] = {}
        self._now = dict.fromkeys(KINDS, 0)
        self._weights: set[int] = set()
        self._shapes: set[tuple[int, ...]] = set()
        self._hooks: list[Any] = []
        self.phase = "forward"
        self.peaks: dict[str, Peak] = {}

    def know(self, model: nn.Module) -> None:
        """Take a model's weights for granted, and count their gradients as such."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._weights.add(tensor.untyped_storage()._cdata)
            self._shapes.add(tuple(tensor.shape))
        self._hooks += [
            parameter.register_post_accumulate_grad_hook(self.take_for_gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def let_go(self) -> None:
        """Follow no weights any more."""
        for hook in self._hooks:
            hook.remove()

    def take_for_gradient(self, parameter: nn.Parameter) -> None:
        """Count a weight's gradient as one."""
        assert parameter.grad is not None
        self._retag(parameter.grad.untyped_storage()._cdata, GRADIENTS)

    def _retag(self, key: int, kind: str) -> None:
        if key in self._held:
            size, before, reference = self._held[key]
            self._held[key] = (size, kind, reference)
            self._now[before] -= size
            self._now[kind] += size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor, function, args)
        return output

    def _see(self, tensor: Tensor, function: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._weights:
            return
        kind = ACTIVATIONS
        if tensor.ndim and tensor.shape[-1] == self._vocabulary and tuple(tensor.shape) not in self._shapes:
            kind = LOGITS
        elif function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            kind = COPIES
        size = storage.nbytes()
        self._held[key] = (size, kind, weakref.ref(storage, lambda _: self._free(key)))
        self._now[kind] += size
        if sum(self._now.values()) > self.peak_of(self.phase).total:
            self.peaks[self.phase] = Peak(*(self._now[kind] for kind in KINDS))

    def peak_of(self, phase: str) -> Peak:
        """The peak of a phase that has begun, nothing else."""
        return self.peaks.get(phase, Peak())

    def _free(self, key: int) -> None:
        size, kind, _ = self._held.pop(key)
        self._now[kind] -= size

    @property
    def now(self) -> Peak:
        """What is held at this moment."""
        return Peak(*(self._now[kind] for kind in KINDS))

    def enter(self, phase: str) -> None:
        """Begin a phase; what is held now belongs to its peak."""
        self.phase = phase
        self.peaks.setdefault(phase, self.now)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Everything that is made inside has a shape and no numbers, whatever it is made from."""
    library = logging.getLogger(FakeTensorMode.__module__)  # which logs what it raises besides
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        library.setLevel(level)


def weightless(model: nn.Module) -> nn.Module:
    """A model that was made on the meta device, its weights there and without numbers; inside `without_numbers`."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fresh)  # the first is kept, or its id would serve another
                held[name] = made[id(tensor)][1]
    return model


#: phases of a pass: forward and what follows it until the head has gone back, the frozen models' part of that, then the
#: backward pass in the top layer, between, in the lowest layer and the embeddings
HEAD, REFERENCE, LOSS, TOP, MIDDLE, BOTTOM = PHASES = ("head", "reference", "loss", "top", "middle", "bottom")


def traced(
    model: nn.Module,
    step: Callable[[Ledger], None],
    *,
    layers: nn.ModuleList | None = None,
    vocabulary: int | None = None,
    gradients: bool = False,
) -> dict[str, Peak]:
    """Peaks of `step` by phase; inside `without_numbers`. `gradients`: there are some from an earlier backward pass.

    Phases follow the gradients of `layers` as they arrive, so that each one's peak is linear in their number; without
    layers there is one.
    """
    ledger = Ledger(vocabulary)
    ledger.know(model)
    handles = [] if layers is None else _follow(ledger, layers)
    with ledger:
        if gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    ledger.take_for_gradient(parameter)
            ledger.peaks.clear()
        ledger.enter(HEAD)
        step(ledger)
    ledger.let_go()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return ledger.peaks


def _follow(ledger: Ledger, layers: nn.ModuleList) -> list[Any]:
    """Move the ledger's phase on as gradients of the layers' weights arrive, from the last layer to the first."""
    last = len(layers) - 1
    handles = []
    for index, layer in enumerate(layers):
        phase = BOTTOM if index == 0 else TOP if index == last else MIDDLE
        for parameter in layer.parameters():
            if parameter.requires_grad:

                def arrived(_: nn.Parameter, phase: str = phase) -> None:
                    if PHASES.index(phase) > PHASES.index(ledger.phase):
                        ledger.enter(phase)

                handles.append(parameter.register_post_accumulate_grad_hook(arrived))
    return handles


def extended(few: dict[str, Peak], more: dict[str, Peak], counts: tuple[int, int], layers: int) -> Peak:
    """The peak with `layers` layers, from the peaks with two smaller numbers of them, `counts`.

    Every phase but the middle one is linear in their number, and the middle lies between its neighbours.
    """
    factor = (layers - counts[0]) / (counts[1] - counts[0])
    found = [few[phase] + (more[phase] + few[phase] * -1) * factor for phase in few if phase != MIDDLE]
    return largest(found)


def largest(peaks: list[Peak]) -> Peak:
    """The one with most bytes; nothing where there is none."""
    return max(peaks, key=lambda peak: peak.total, default=Peak())
