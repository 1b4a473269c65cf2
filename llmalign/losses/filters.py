"""Rank filters of PF-PPO, which of a prompt's completions are trained on: https://arxiv.org/abs/2409.06957, Section 4.

Rewards are (P, N), N completions of each of P prompts; ``mask`` (P, N), bool or 0/1, is true where a completion can be
used, and what stands elsewhere is never read. Among equal rewards the first in generation order is the best, and the
last the worst. Random numbers come from ``generator``, or torch's own; they are drawn where the generator lives, so one
on the CPU gives the same choice on every device.
"""

import torch
from torch import Tensor

from llmalign.losses import _checks

STRATEGIES = ("none", "best_of_n", "best_random", "best_worst", "power")
KEPT_BY_POWER = 2  # as many as best_random and best_worst keep


def rank_weights(rewards: Tensor, strategy: str, power: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The probability with which a strategy draws each completion, (P, N); a row sums to 1, or to 0 if nothing is left.

    With n completions present: ``none`` 1/n; ``best_of_n`` 1 for the best; ``best_random`` 1/2 for the best and
    1/(2(n - 1)) for each other; ``best_worst`` 1/2 for the best and for the worst; ``power`` in proportion to
    ``|reward|^power``, ``power`` >= 0, uniform where all are 0. One completion alone has weight 1. ValueError for an
    unknown strategy and for a reward that is not finite and not masked.
    """
    rewards, present = _checked(rewards, strategy, mask)
    count = present.sum(dim=1, keepdim=True)
    uniform = present / count.clamp(min=1).to(rewards)
    best, worst = _best(rewards, present), _worst(rewards, present)
    if strategy == "none":
        return uniform
    if strategy == "best_of_n":
        return best.to(rewards)
    if strategy == "best_worst":
        return (best.to(rewards) + worst.to(rewards)) / 2
    if strategy == "best_random":
        others = (present & ~best) / (2 * (count - 1).clamp(min=1)).to(rewards)
        return torch.where(count > 1, best / 2 + others, best.to(rewards))
    size = torch.where(present, rewards.abs(), torch.zeros_like(rewards))
    largest = size.amax(dim=1, keepdim=True)
    raised = torch.where(present, (size / largest).pow(_checks.not_negative("power", power)), torch.zeros_like(size))
    return torch.where(largest > 0, raised / raised.sum(dim=1, keepdim=True), uniform)


def select(
    rewards: Tensor,
    strategy: str,
    generator: torch.Generator | None = None,
    *,
    power: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The completions that a strategy keeps, each once, (P, N) bool.

    ``none`` keeps all; ``best_of_n`` the best; ``best_random`` the best and one other, uniformly; ``best_worst`` the
    best and the worst; ``power`` two different ones, drawn in proportion to ``|reward|^power``. Under ``best_random``
    and ``best_worst`` a row of equal rewards keeps nothing: it has no signal. Errors are those of ``rank_weights``.
    """
    rewards, present = _checked(rewards, strategy, mask)
    best = _best(rewards, present)
    if strategy == "none":
        return present
    if strategy == "best_of_n":
        return best
    if strategy == "power":
        return _draw_distinct(rank_weights(rewards, strategy, power, present), KEPT_BY_POWER, generator)
    worst = _worst(rewards, present)
    differ = (rewards.masked_fill(~best, 0).sum(dim=1) > rewards.masked_fill(~worst, 0).sum(dim=1)).unsqueeze(1)
    if strategy == "best_worst":
        return (best | worst) & differ
    return (best | _draw_distinct((present & ~best).to(rewards), 1, generator)) & differ


def resample(
    rewards: Tensor,
    strategy: str,
    k: int,
    generator: torch.Generator | None = None,
    *,
    power: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """How often each completion is drawn in k draws with replacement from ``rank_weights``, (P, N) int64.

    What the paper's code does, where one completion may count several times; a row sums to k, or to 0 if nothing is
    left in it. Its ``best_random`` weights are fixed at those of N = 5, ours are the paper's for every N. Errors are
    those of ``rank_weights``, and ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    weights = rank_weights(rewards, strategy, power, mask)
    some = weights.sum(dim=1) > 0
    place = generator.device if generator is not None else weights.device
    # A row with nothing left draws from its places uniformly, and is cleared.
    chances = torch.where(some.unsqueeze(1), weights, torch.ones_like(weights)).to(place)
    drawn = torch.multinomial(chances, k, replacement=True, generator=generator).to(weights.device)
    counts = torch.zeros_like(weights, dtype=torch.int64).scatter_add(1, drawn, torch.ones_like(drawn))
    return counts * some.unsqueeze(1)


def _checked(rewards: Tensor, strategy: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards with 0 where masked, and the mask as bool."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    _checks.one_form({"rewards": rewards}, 2, "(P, N)")
    present = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    _checks.same_shape("mask", present, "rewards", rewards)
    wrong = present & ~rewards.isfinite()
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        value = rewards[row, place].item()
        raise ValueError(f"The reward of prompt {row}, completion {place} is {value}: mask it, or give it a number.")
    return torch.where(present, rewards, torch.zeros_like(rewards)).detach(), present


def _best(rewards: Tensor, present: Tensor) -> Tensor:
    """The first of the highest, (P, N) bool."""
    # argmax gives the first of equal maxima.
    return _at(torch.where(present, rewards, torch.full_like(rewards, -torch.inf)).argmax(dim=1), present)


def _worst(rewards: Tensor, present: Tensor) -> Tensor:
    """The last of the lowest, (P, N) bool."""
    backwards = torch.where(present, rewards, torch.full_like(rewards, torch.inf)).flip(1)
    return _at(rewards.shape[1] - 1 - backwards.argmin(dim=1), present)


def _at(places: Tensor, present: Tensor) -> Tensor:
    return torch.zeros_like(present).scatter(1, places.unsqueeze(1), True) & present


def _draw_distinct(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Up to ``count`` places of each row, drawn one after the other in proportion to what is left, (P, N) bool."""
    place = generator.device if generator is not None else weights.device
    uniform = torch.rand(weights.shape, generator=generator, device=place, dtype=torch.float64).to(weights.device)
    # The smallest of E_i / w_i with exponential E_i is i with probability w_i / sum w, and so on among the rest.
    times = torch.where(weights > 0, -torch.log1p(-uniform) / weights, torch.inf)
    firsts = times.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(weights, dtype=torch.bool).scatter(1, firsts, True) & (weights > 0)
