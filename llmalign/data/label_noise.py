"""Flipped preference labels: put into a data set on purpose, or estimated from an independent scorer's margins."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

SWAPPED = (
    ("chosen", "rejected"),
    ("ref_chosen_logps", "ref_rejected_logps"),
    ("last_chosen_logps", "last_rejected_logps"),
)
CHI_SQUARE_95 = 3.841458820694124  # 95 % quantile for one degree of freedom
BOUNDARY = 0.5


def flip(
    dataset: Dataset | IterableDataset, rate: float, seed: int, *, margins: Sequence[str] = ()
) -> Dataset | IterableDataset:
    """Pairs with each label flipped independently with probability `rate` in [0, 1]; adds the bool column `flipped`.

    A flipped row has chosen and rejected exchanged, with their log-prob columns, and the columns named in `margins`
    negated. Whether a row is flipped depends on (seed, row_id) alone: not on the epoch, the other rows or their order,
    and the rows flipped at a lower rate are among those flipped at a higher one. Raises UserError for a rate outside
    [0, 1], rows without `row_id`, rows flipped before, and rows already tokenized.
    """
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"The share of labels to flip must be in [0, 1], got {rate}.")
    columns = set(next(iter(dataset)))
    if "row_id" not in columns:
        raise UserError(
            "Labels are flipped by row_id, and these rows have none; read them with llmalign.data.formats.load."
        )
    if "flipped" in columns:
        raise UserError("These rows have a `flipped` column already; flipping twice would undo labels.")
    if "chosen_ids" in columns:
        raise UserError("These rows are tokenized already; flip labels before they are prepared.")
    options = {"rate": rate, "seed": seed, "margins": tuple(margins)}
    return dataset.map(_flip_row, fn_kwargs=options)


def _flip_row(row: dict[str, Any], rate: float, seed: int, margins: tuple[str, ...]) -> dict[str, Any]:
    draw = hashlib.blake2b(f"{seed}:{row['row_id']}".encode(), digest_size=8).digest()
    flipped = int.from_bytes(draw, "big") < rate * 2**64
    if flipped:
        for left, right in SWAPPED:
            if left in row:
                row[left], row[right] = row[right], row[left]
        for name in margins:
            row[name] = -row[name]
    return {**row, "flipped": flipped}


@dataclass(frozen=True)
class FlipEstimate:
    """An estimated flip rate, its 95 % interval, and the mean negative log-likelihood (nats) there."""

    rate: float
    low: float
    high: float
    nll: float
    n: int

    def __str__(self) -> str:
        return f"flip rate {self.rate:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, {self.n} pairs)"


def estimate_flip_rate(margins: Sequence[float]) -> FlipEstimate:
    """The flip rate e in [0, .5) that minimises -mean log((1-e) sigma(s) + e sigma(-s)) over a scorer's margins s.

    margins: (N,), the scorer's beta * (reward of chosen - reward of rejected) under the labels as they stand, in nats.
    The interval is the profile likelihood's: every e with 2 N (nll(e) - nll(rate)) <= 3.841. It takes the scorer's
    margins for calibrated log-odds and the pairs for independent; a scorer that is too sure of itself makes the rate
    too large. Raises UserError for no margins, margins that are not finite, or a minimum at .5, where the labels say
    nothing that this scorer agrees with.
    """
    s = np.asarray(margins, dtype=np.float64)
    if s.ndim != 1 or not s.size:
        raise UserError("A flip rate is estimated from a list of margins, one for each pair; got none.")
    if not np.isfinite(s).all():
        bad = int(np.flatnonzero(~np.isfinite(s))[0])
        raise UserError(f"The scorer's margin of pair {bad} is {s[bad]}; all margins must be finite.")
    rate = _root(lambda e: _slope(s, e), 0.0, BOUNDARY)
    if rate >= BOUNDARY - 1e-6:
        raise UserError(
            f"The flip rate cannot be estimated from these {s.size} margins: the best fit is .5, as if the labels were "
            "drawn by lot or the scorer disagreed with most of them; use another scorer, or set flip_rate to a number."
        )
    best = _nll(s, rate)
    allowed = best + CHI_SQUARE_95 / (2 * s.size)
    low = 0.0 if _nll(s, 0.0) <= allowed else _root(lambda e: allowed - _nll(s, e), 0.0, rate)
    high = BOUNDARY if _nll(s, BOUNDARY) <= allowed else _root(lambda e: _nll(s, e) - allowed, rate, BOUNDARY)
    estimate = FlipEstimate(rate, low, high, best, int(s.size))
    if high >= BOUNDARY:
        logger.warning("The estimate is loose, %s: the interval reaches .5, so more pairs are needed.", estimate)
    return estimate


def _nll(s: np.ndarray, e: float) -> float:
    with np.errstate(divide="ignore"):
        kept, flipped = np.log1p(-e) - np.logaddexp(0.0, -s), np.log(e) - np.logaddexp(0.0, s)
    return float(-np.mean(np.logaddexp(kept, flipped)))


def _slope(s: np.ndarray, e: float) -> float:
    """Derivative of `_nll` in e: mean of (sigma(s) - sigma(-s)) / ((1-e) sigma(s) + e sigma(-s)), which never falls."""
    with np.errstate(over="ignore", divide="ignore"):
        kept, flipped = 1.0 / (1.0 + np.exp(-s)), 1.0 / (1.0 + np.exp(s))
        return float(np.mean((kept - flipped) / ((1.0 - e) * kept + e * flipped)))


def _root(function: Any, low: float, high: float) -> float:
    """Where a function that never falls crosses 0 in [low, high], by bisection; the end it stays on otherwise."""
    if function(low) >= 0.0:
        return low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) >= 0.0 else (middle, high)
    return high
