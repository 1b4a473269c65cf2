"""Running estimates of f-DPG over all processes: the partition function of each context, and a windowed baseline."""

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llmalign.errors import UserError
from llmalign.processes import from_all_processes, raise_first

_ONLY = ""  # the key of the one partition function where contexts share it


class PartitionFunction:
    """Z(c) = E_q[P/q] of every context c, the mean of all ratios seen so far, kept as log of their sum and count.

    With ``per_context=False`` one Z serves all contexts and keys are not read. Each proposal's ratios are unbiased, so
    all of them count alike, old ones too. The sum runs over all processes: a mean of their means would weigh a process
    with few samples as much as one with many. ``max_z``, if given, cuts the largest ratios of every batch down to the
    level at which their mean is ``max_z``, which bounds Z and biases it.
    """

    def __init__(self, *, per_context: bool, max_z: float | None = None) -> None:
        if max_z is not None and not (math.isfinite(max_z) and max_z > 0):
            raise UserError(f"max_z must be a finite number above 0, got {max_z!r}.")
        self.per_context = per_context
        self.max_z = max_z
        self._log_sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, keys: Sequence[str] | None, log_ratios: Tensor, fault: str | None = None) -> None:
        """Take in ``log P - log q`` (N,) of samples from q, -inf allowed, with the key of each one's context.

        All processes call this together, also one without samples or with a ``fault`` in place of them, and before
        ``log_z`` is read for the same samples. Raises UserError on all of them where one has a fault, or a ratio that
        is NaN or +inf.
        """
        own: dict[str, list[float]] = {}
        for key, ratio in zip(self._names(keys, len(log_ratios)), log_ratios.double().tolist(), strict=True):
            if math.isnan(ratio) or ratio == math.inf:
                place = f" of context {key!r}" if key else ""
                fault = fault or f"a log ratio of target to proposal{place} is {ratio}"
            own.setdefault(key, []).append(ratio)
        everyone, faults = zip(*from_all_processes((own, fault)), strict=True)
        raise_first(list(faults))
        for key in dict.fromkeys(chain.from_iterable(everyone)):
            ratios = torch.tensor([ratio for one in everyone for ratio in one.get(key, [])], dtype=torch.float64)
            if self.max_z is not None:
                ratios = cut_to_mean(ratios, self.max_z)
            before = torch.tensor([self._log_sums.get(key, -math.inf)], dtype=torch.float64)
            # logsumexp subtracts the largest of all processes, and gives -inf for nothing but -inf.
            self._log_sums[key] = float(torch.cat([before, ratios]).logsumexp(dim=0))
            self._counts[key] = self._counts.get(key, 0) + len(ratios)

    def log_z(self, keys: Sequence[str] | None, count: int | None = None) -> Tensor:
        """log Z (N,) float64 on the CPU of the contexts of N keys, -inf where no sample so far had P > 0.

        Without contexts ``keys`` may be None, and ``count`` (1 if None) says how often the one Z is wanted. Raises
        UserError, with the key, for a context that no sample was seen of.
        """
        names = self._names(keys, (1 if count is None else count) if keys is None else len(keys))
        unseen = [name for name in names if name not in self._counts]
        if unseen:
            where = f" of context {unseen[0]!r}" if unseen[0] else ""
            raise UserError(f"the partition function{where} has seen no sample: update it before it is read.")
        return torch.tensor(
            [self._log_sums[name] - math.log(self._counts[name]) for name in names], dtype=torch.float64
        )

    def count(self, key: str = _ONLY) -> int:
        """Samples seen of a context, over all processes."""
        return self._counts.get(key, 0)

    def state_dict(self) -> dict[str, Any]:
        """Keys, counts and log sums, None for the sum 0, as JSON can hold them; the same on every process."""
        sums = [None if value == -math.inf else value for value in self._log_sums.values()]
        state = {"keys": list(self._log_sums), "log_sums": sums, "counts": list(self._counts.values())}
        return {"per_context": self.per_context, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back; UserError if it was kept with contexts and this one is without, or the reverse."""
        if state["per_context"] != self.per_context:
            kinds = [
                "one for each context" if kept else "one for all" for kept in (state["per_context"], self.per_context)
            ]
            raise UserError(f"the saved partition function is {kinds[0]}, this run asks for {kinds[1]}.")
        sums = [-math.inf if value is None else float(value) for value in state["log_sums"]]
        self._log_sums = dict(zip(state["keys"], sums, strict=True))
        self._counts = dict(zip(state["keys"], state["counts"], strict=True))

    def _names(self, keys: Sequence[str] | None, count: int) -> Sequence[str]:
        if not self.per_context:
            return [_ONLY] * count
        if keys is None or len(keys) != count:
            raise ValueError(f"{count} samples need as many context keys, got {'none' if keys is None else len(keys)}.")
        return keys


class BaselineWindow:
    """The mean of the last pseudo-rewards of all processes, seen before the batch at hand: f-DPG's windowed baseline.

    ``size``: how many are kept. Read ``mean`` first, then ``update`` with the batch.
    """

    def __init__(self, size: int = 1024) -> None:
        if size < 1:
            raise UserError(f"the window of the baseline must hold at least 1 pseudo-reward, got {size}.")
        self._kept: deque[float] = deque(maxlen=size)

    def mean(self) -> float:
        """0 before the first update."""
        return math.fsum(self._kept) / len(self._kept) if self._kept else 0.0

    def update(self, pseudo_rewards: Tensor) -> None:
        """Take in the pseudo-rewards (N,) of a batch; all processes call this together, also one without samples."""
        for rewards in from_all_processes(pseudo_rewards.double().tolist()):
            self._kept.extend(rewards)

    def state_dict(self) -> dict[str, Any]:
        """The pseudo-rewards that are kept, oldest first."""
        return {"kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back; of a longer window the newest stay."""
        self._kept.clear()
        self._kept.extend(state["kept"])


def cut_to_mean(log_ratios: Tensor, limit: float) -> Tensor:
    """The logs (N,) with the largest cut to one level, so that the mean of their exponentials is at most ``limit``."""
    count = len(log_ratios)
    if count == 0 or float(log_ratios.logsumexp(dim=0)) <= math.log(limit) + math.log(count):
        return log_ratios
    ratios = (log_ratios - math.log(limit)).exp()  # their mean shall be 1
    ascending = ratios.sort().values
    before = torch.cat([ascending.new_zeros(1), ascending.cumsum(dim=0)[:-1]])
    # With the i smallest untouched, the others share what is left of N equally.
    levels = (count - before) / torch.arange(count, 0, -1, dtype=ratios.dtype)
    level = levels[int((levels <= ascending).nonzero()[0])]
    return log_ratios.clamp(max=float(level.log()) + math.log(limit))
