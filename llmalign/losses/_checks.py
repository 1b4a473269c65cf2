"""What every loss checks before it computes: the form of its scores and the range of its hyper-parameters."""

import math

import torch
from torch import Tensor

from llmalign.types import GroupScores, PairScores


def positive(name: str, value: float) -> float:
    """Return ``value``; ValueError that names it unless it is a finite number above 0."""
    if not _is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """Return ``value``; ValueError that names it unless it is a finite number of at least 0."""
    if not _is_finite_number(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
    return float(value)


def flip_rate(value: float | Tensor, like: Tensor, *, soft: bool = False) -> float | Tensor:
    """Return a flip rate, one number or a tensor of the shape, dtype and device of ``like``.

    ValueError outside of [0, 0.5), or with ``soft`` outside of [0, 1].
    """
    allowed = "[0, 1]" if soft else "[0, 0.5)"
    if not isinstance(value, Tensor):
        if not _is_finite_number(value) or not _is_rate(value, soft):
            raise ValueError(f"flip_rate must lie in {allowed}, got {value!r}.")
        return float(value)
    if value.shape != like.shape:
        raise ValueError(
            f"flip_rate must be one number or a tensor of shape {tuple(like.shape)}, got shape {tuple(value.shape)}."
        )
    rates = value.to(like)
    for row, rate in enumerate(rates.tolist()):
        if not _is_rate(rate, soft):
            raise ValueError(f"flip_rate must lie in {allowed} for every pair, but pair {row} has {rate!r}.")
    return rates


def pair_scores(scores: PairScores) -> None:
    """ValueError unless every log-probability is (B,) and of one dtype, float32 or float64, and every length (B,)."""
    given = {name: value for name, value in vars(scores).items() if value is not None}
    lengths = {name: given.pop(name) for name in ("chosen_lengths", "rejected_lengths") if name in given}
    one_form(given, 1, "(B,)")
    for name, value in lengths.items():
        same_shape(name, value, "chosen", scores.chosen)


def group_scores(scores: GroupScores) -> None:
    """ValueError unless policy, reference and rewards are (P, K) of one dtype, as pairs are, and the mask (P, K)."""
    one_form({"policy": scores.policy, "reference": scores.reference, "rewards": scores.rewards}, 2, "(P, K)")
    if scores.mask is not None:
        same_shape("mask", scores.mask, "policy", scores.policy)


def one_form(tensors: dict[str, Tensor], dimensions: int, shape: str) -> None:
    """ValueError unless every tensor has as many dimensions, one shape and one dtype, float32 or float64."""
    first, anchor = next(iter(tensors.items()))
    if anchor.dim() != dimensions:
        raise ValueError(f"{first} must have shape {shape}, got {tuple(anchor.shape)}.")
    if anchor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{first} must be float32 or float64, got {anchor.dtype}: sum log-probabilities in float32.")
    for name, value in tensors.items():
        same_shape(name, value, first, anchor)
        if value.dtype != anchor.dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {anchor.dtype}, got {value.dtype}.")


def same_shape(name: str, value: Tensor, anchor_name: str, anchor: Tensor) -> None:
    """ValueError that names both unless a tensor has the shape of another."""
    if value.shape != anchor.shape:
        raise ValueError(
            f"{name} must have the shape of {anchor_name}, {tuple(anchor.shape)}, got {tuple(value.shape)}."
        )


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: float, soft: bool) -> bool:
    return 0 <= value <= 1 if soft else 0 <= value < 0.5
