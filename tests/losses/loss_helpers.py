"""Scores for the tests of the losses: from the recorded vectors, at random, and with their labels swapped."""

import json
from pathlib import Path

import torch
from torch import Tensor

from llmalign.types import PairScores

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "language-losses.json").read_text())
STRESS_ROWS = slice(6, 8)  # margins of +-900 nats: finite is all that float32 owes there
DTYPES = [torch.float64, torch.float32]


def tensor(values: object, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def recorded_pairs(method: str, dtype: torch.dtype) -> PairScores:
    given = VECTORS[method]["inputs"]
    last = {
        name: tensor(given[f"policy_t_{side}_logps"], dtype)
        for name, side in (("last_chosen", "chosen"), ("last_rejected", "rejected"))
        if f"policy_t_{side}_logps" in given
    }
    return PairScores(
        chosen=tensor(given["policy_chosen_logps"], dtype, grad=True),
        rejected=tensor(given["policy_rejected_logps"], dtype, grad=True),
        ref_chosen=tensor(given["ref_chosen_logps"], dtype),
        ref_rejected=tensor(given["ref_rejected_logps"], dtype),
        chosen_lengths=torch.tensor(given["chosen_lens"]),
        rejected_lengths=torch.tensor(given["rejected_lens"]),
        **last,
    )


def random_pairs(count: int = 6, seed: int = 0, spread: float = 3.0) -> PairScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(grad: bool = False) -> Tensor:
        values = -20 + spread * torch.randn(count, generator=generator, dtype=torch.float64)
        return values.requires_grad_(grad)

    lengths = torch.arange(1, count + 1)
    return PairScores(draw(True), draw(True), draw(), draw(), draw(), draw(), draw(True), lengths, lengths + 1)


def margin_pairs(margins: list[float]) -> PairScores:
    """Pairs whose margins are ``margins``, under a reference that gives every response the same."""
    zeros = torch.zeros(len(margins), dtype=torch.float64)
    return PairScores(tensor(margins, grad=True), zeros.clone().requires_grad_(), zeros, zeros)


def swapped(scores: PairScores) -> PairScores:
    """The same pairs with every label flipped."""
    return PairScores(
        scores.rejected,
        scores.chosen,
        scores.ref_rejected,
        scores.ref_chosen,
        scores.last_rejected,
        scores.last_chosen,
        scores.base,
        scores.rejected_lengths,
        scores.chosen_lengths,
    )


def gradients(losses: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of the sum of per-row losses: row by row, because no row reads another."""
    return list(torch.autograd.grad(losses.sum(), leaves))


def assert_recorded(actual: Tensor, expected: list[float], dtype: torch.dtype) -> None:
    """Equal to the recorded numbers: 1e-9 in float64 on all rows, 1e-5 in float32 on all but the stress rows."""
    assert actual.dtype == dtype
    assert torch.isfinite(actual).all()
    if dtype == torch.float64:
        torch.testing.assert_close(actual, tensor(expected), rtol=1e-9, atol=1e-14)
    else:
        kept = slice(0, STRESS_ROWS.start)
        torch.testing.assert_close(actual[kept], tensor(expected, dtype)[kept], rtol=1e-5, atol=1e-7)
