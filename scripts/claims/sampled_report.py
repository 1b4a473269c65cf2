"""How the claims on sampled completions are reported: the columns of their tables, their curves."""

from collections.abc import Sequence
from typing import Any

from claims.cells import Result
from claims.report import Axes, Interval, draw_bands, interval, values

COLUMNS = ["reward", "on the way", "KL to the start", "reward - beta KL", "entropy", "distinct-2", "CPU-s"]


def objective(records: Sequence[Result], method: str) -> list[float]:
    """Reward less beta KL at the end, of each seed: what all methods maximise, and what their rates were tuned by."""
    beta = next(r["cell"]["setting"]["beta"] for r in records if r["cell"]["method"] == method)
    pairs = zip(*(values(records, f"last_{key}", method=method) for key in ("reward", "kl")), strict=True)
    return [reward - beta * kl for reward, kl in pairs]


def lead(records: Sequence[Result], own: str, rival: str) -> Interval:
    """How far a method ends above another in reward less beta KL, paired by seed."""
    return interval([a - b for a, b in zip(objective(records, own), objective(records, rival), strict=True)])


def row(records: Sequence[Result], method: str) -> list[str]:
    """What COLUMNS name, of one method: means over seeds with intervals."""
    found = [(values(records, key, method=method), digits) for key, digits in (("last_reward", 2), ("mean_reward", 2))]
    found += [(values(records, "last_kl", method=method), 2), (objective(records, method), 2)]
    found += [
        (values(records, f"last_{key}", method=method), digits) for key, digits in (("entropy", 1), ("distinct", 3))
    ]
    seconds = interval(values(records, "training_cpu_seconds", method=method)).mean
    return [*(interval(own).text(digits) for own, digits in found), f"{seconds:.0f}"]


def numbers(records: Sequence[Result], methods: Sequence[str]) -> dict[str, Any]:
    """Curves of each method, one a seed."""
    keys = ("samples", "reward", "kl", "entropy", "distinct", "words", "training_cpu_seconds")
    return {key: {m: values(records, key, method=m) for m in methods} for key in keys}


def draw(axes: Axes, records: Sequence[Result], labels: dict[str, str], key: str) -> None:
    """Mean and interval of `key` over the completions sampled, a line a method."""
    for number, (method, label) in enumerate(labels.items()):
        runs = values(records, key, method=method)
        if runs:
            draw_bands(axes, values(records, "samples", method=method)[0], runs, label, f"C{number}")
