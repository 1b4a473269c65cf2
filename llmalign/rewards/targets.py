"""What f-DPG aims at: a model p = P/Z, the base distribution a times a factor of what was measured on each response.

- ``PointwiseTarget``: P = a b, every response satisfies a yes-or-no constraint b;
- ``DistributionalTarget``: P = a exp(sum_k lambda_k phi_k), features have given means under p;
- ``RewardTarget``: P = a exp(r / beta), the optimum of KL-regularised reward.

All have one interface, ``Target``. The first two are those of https://arxiv.org/abs/2012.11635.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmalign.errors import UserError

TOLERANCE = 1e-9
ITERATIONS = 100


class Target(Protocol):
    """An unnormalised distribution over responses."""

    @property
    def may_be_zero(self) -> bool:
        """Whether log P can be -inf, where reverse_kl and chi2_reverse are infinite."""

    def log_target(self, base_logps: Tensor, features: Tensor) -> Tensor:
        """log P (N,) in nats, -inf allowed, of base log-probs (N,) and what was measured, (N,) or (N, K)."""

    def state_dict(self) -> dict[str, Any]:
        """What was fitted, as numbers and lists that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the ``state_dict`` of a target of the same kind back."""


class PointwiseTarget:
    """``log P = log a + log b``, b = 1 where all of a response's K features are 1, else 0 or ``floor``.

    ``floor`` in (0, 1), if given, is b of a response that fails: it keeps every divergence finite. Raises UserError
    for a floor outside of that and, with the row, for a feature that is neither 0 nor 1.
    """

    def __init__(self, floor: float | None = None) -> None:
        self.floor = _floor(floor)

    @property
    def may_be_zero(self) -> bool:
        """True without a floor."""
        return self.floor is None

    def log_target(self, base_logps: Tensor, features: Tensor) -> Tensor:
        """log P (N,), of base log-probs (N,) and yes-or-no features (N,) or (N, K)."""
        columns = _columns(base_logps, features)
        _require_binary(columns)
        return base_logps + _log_constraint((columns == 1).all(dim=1), self.floor, base_logps)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is fitted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is fitted."""


class RewardTarget:
    """``log P = log a + r / beta``; ``beta`` > 0, on the scale of the rewards. Raises UserError, with the row,
    for a reward that is not finite."""

    may_be_zero = False

    def __init__(self, beta: float) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise UserError(f"beta must be a finite number above 0, got {beta!r}.")
        self.beta = beta

    def log_target(self, base_logps: Tensor, features: Tensor) -> Tensor:
        """log P (N,), of base log-probs (N,) and rewards (N,) or (N, 1)."""
        columns = _columns(base_logps, features)
        if columns.shape[1] != 1:
            raise UserError(f"a reward target takes one reward a response, got {columns.shape[1]}.")
        return base_logps + columns[:, 0].to(base_logps) / self.beta

    def state_dict(self) -> dict[str, Any]:
        """Nothing is fitted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is fitted."""


@dataclass(frozen=True)
class MomentReport:
    """How well the moments were reached: one entry per feature in ``wanted``, ``reached`` and ``lambdas``.

    ``reached`` are the means of the features under p, estimated on the samples, each of ``contexts`` prompts counting
    alike; ``gradient_norm`` is the largest gap to ``wanted``. ``halved`` are the same means, at the same lambda, on
    halves of each prompt's samples: as far as they differ, ``reached`` is from what p has, on the other side.
    ``effective`` of ``samples`` is ``1 / sum w~^2`` of p's normalised weights: with a few, lambda is a guess. A lambda
    of +-inf stands for a feature that p fixes at 1 or 0.
    """

    iterations: int
    wanted: tuple[float, ...]
    reached: tuple[float, ...]
    halved: tuple[float, ...]
    lambdas: tuple[float, ...]
    gradient_norm: float
    effective: float
    samples: int
    contexts: int

    def text(self) -> str:
        """One line to log."""
        pairs = zip(self.wanted, self.reached, self.lambdas, strict=True)
        features = ", ".join(f"{wanted:g} (reached {reached:.4f}, lambda {lam:.4f})" for wanted, reached, lam in pairs)
        return (
            f"moments {features} after {self.iterations} Newton steps, largest gap {self.gradient_norm:.1e}, "
            f"effective sample size {self.effective:.0f} of {self.samples}"
            + (f", {self.contexts} prompts" if self.contexts > 1 else "")
        )

    @property
    def biased(self) -> float:
        """How far the moments of p may be from ``reached``: the largest gap between it and ``halved``."""
        return max((abs(one - other) for one, other in zip(self.reached, self.halved, strict=True)), default=0.0)


class DistributionalTarget:
    """``P = a exp(sum_k lambda_k phi_k)``, where lambda makes the mean of each feature under p a given moment.

    ``moments``: K numbers. A moment of exactly 1 or 0 on a yes-or-no feature fixes that feature: lambda would be
    infinite, so P is 0 where a response differs (``floor`` instead of 0, if given), and moments 1 alone make a
    pointwise target. ``fit`` before ``log_target``. Raises UserError for no or infinite moments and a bad floor.
    """

    def __init__(self, moments: Sequence[float], floor: float | None = None) -> None:
        if not moments or not all(math.isfinite(moment) for moment in moments):
            raise UserError(f"moments must be one finite number for each feature, got {list(moments)}.")
        self.moments = [float(moment) for moment in moments]
        self.floor = _floor(floor)
        self._lambdas: list[float] | None = None

    @property
    def lambdas(self) -> list[float]:
        """One number a feature, +-inf for a feature that is fixed at 1 or 0; UserError before ``fit``."""
        if self._lambdas is None:
            raise UserError("the distributional target has no lambda yet: fit it on samples of the base first.")
        return self._lambdas

    @property
    def may_be_zero(self) -> bool:
        """True where a moment of 0 or 1 fixes a feature and there is no floor; before ``fit``, where it could."""
        if self.floor is not None:
            return False
        if self._lambdas is None:
            return any(moment in (0.0, 1.0) for moment in self.moments)
        return any(math.isinf(lam) for lam in self._lambdas)

    def fit(self, features: Tensor, log_weights: Tensor | None = None, contexts: Tensor | None = None) -> MomentReport:
        """Solve lambda by Newton's method on samples, and say how it went.

        ``features`` (N, K), or (N,) for one; ``log_weights`` (N,) are log a - log q of samples of another
        distribution q, None for samples of a; ``contexts`` (N,) whole numbers say which prompt each is of, None for
        one. Under p every prompt has a partition function of its own, so its moments are self-normalised means
        by themselves, and lambda brings their mean over the prompts to the given moments. Float64; steps are halved
        until the convex dual falls, since a full first step can lead to a singular matrix. A prompt of which no sample
        is possible is left out. Raises UserError where the samples cannot show the moments, one by one or together.
        """
        columns = _columns(features if log_weights is None else log_weights, features).double()
        if columns.shape[1] != len(self.moments):
            raise UserError(f"{len(self.moments)} moments need as many features, got {columns.shape[1]}.")
        weights = torch.zeros_like(columns[:, 0]) if log_weights is None else log_weights.double()
        fixed = self._fixed(columns)
        kept = weights > -math.inf
        for place, value in fixed.items():
            kept &= columns[:, place] == value
        if not bool(kept.any()):
            named = ", ".join(f"feature {place} = {value}" for place, value in fixed.items())
            raise UserError(f"no sample of {len(kept)} has {named or 'a weight above 0'}: the target would be empty.")
        free = [place for place in range(len(self.moments)) if place not in fixed]
        samples = Samples(columns[kept][:, free], weights[kept], None if contexts is None else contexts[kept])
        _require_reachable(samples, self.moments, free)
        wanted = torch.tensor([self.moments[place] for place in free], dtype=torch.float64, device=columns.device)
        solution, iterations = _newton(samples, wanted)
        reached, _, effective = samples.tilted(solution)
        gap = float((reached - wanted).abs().max()) if free else 0.0
        if not gap <= TOLERANCE * (1 + float(columns.abs().max())):
            raise UserError(
                f"moments {[self.moments[place] for place in free]} cannot be reached together: the closest that "
                f"{int(kept.sum())} samples come is {[round(value, 4) for value in reached.tolist()]}. "
                "Ask for less, or fit on samples that show the features together."
            )
        halved = torch.stack([half.tilted(solution)[0] for half in samples.halves()]).mean(dim=0)
        lambdas = [math.copysign(math.inf, fixed.get(place, 0) - 0.5) for place in range(len(self.moments))]
        moments = [[float(fixed.get(place, 0))] * 2 for place in range(len(self.moments))]
        for place, lam, *means in zip(free, solution.tolist(), reached.tolist(), halved.tolist(), strict=True):
            lambdas[place], moments[place] = lam, means
        self._lambdas = lambdas
        return MomentReport(
            iterations=iterations,
            wanted=tuple(self.moments),
            reached=tuple(mean for mean, _ in moments),
            halved=tuple(mean for _, mean in moments),
            lambdas=tuple(lambdas),
            gradient_norm=gap,
            effective=effective,
            samples=len(kept),
            contexts=samples.count,
        )

    def log_target(self, base_logps: Tensor, features: Tensor) -> Tensor:
        """log P (N,), of base log-probs (N,) and features (N, K), or (N,) for one."""
        columns = _columns(base_logps, features)
        if columns.shape[1] != len(self.lambdas):
            raise UserError(f"{len(self.lambdas)} moments need as many features, got {columns.shape[1]}.")
        result = base_logps
        for place, lam in enumerate(self.lambdas):
            column = columns[:, place]
            if math.isinf(lam):
                result = result + _log_constraint(column == (1.0 if lam > 0 else 0.0), self.floor, base_logps)
            else:
                result = result + lam * column.to(base_logps)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Moments and lambdas, infinite ones as the strings "inf" and "-inf", which JSON can hold."""
        lambdas = None if self._lambdas is None else [str(lam) if math.isinf(lam) else lam for lam in self._lambdas]
        return {"moments": self.moments, "lambdas": lambdas}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back; UserError if it was fitted for other moments."""
        if state["moments"] != self.moments:
            raise UserError(f"the saved target has moments {state['moments']}, this run asks for {self.moments}.")
        self._lambdas = None if state["lambdas"] is None else [float(lam) for lam in state["lambdas"]]

    def _fixed(self, columns: Tensor) -> dict[int, int]:
        """Features that a moment of 0 or 1 fixes, with their value."""
        return {
            place: int(moment)
            for place, moment in enumerate(self.moments)
            if moment in (0.0, 1.0) and bool(((columns[:, place] == 0) | (columns[:, place] == 1)).all())
        }


class Samples:
    """Features (N, K) and log weights (N,), finite, of samples of one or more contexts, (N,) whole numbers or None."""

    def __init__(self, features: Tensor, log_weights: Tensor, contexts: Tensor | None = None) -> None:
        self.features, self.log_weights = features, log_weights
        own = torch.zeros(len(features), dtype=torch.long) if contexts is None else contexts.cpu()
        self.owners = own.unique(return_inverse=True)[1].to(features.device)
        self.count = int(self.owners.max()) + 1

    def halves(self) -> list["Samples"]:
        """Every second sample of each context, and the others; a context with one sample is in one of them alone."""
        order = self.owners.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        odd = (place - torch.searchsorted(self.owners[order], self.owners)) % 2 == 1
        parts = [part for part in (~odd, odd) if bool(part.any())]
        return [Samples(self.features[part], self.log_weights[part], self.owners[part]) for part in parts]

    def tilted(self, lambdas: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean (K,) and covariance (K, K) under exp(log_weights + features lambda), each a mean over the contexts.

        Each context is normalised by itself. The third is the effective sample size, 1 over the sum of squared weights.
        """
        tilt = self.log_weights + self.features @ lambdas
        weights = (tilt - self._log_sums(tilt)[self.owners]).exp() / self.count
        own_means = torch.zeros(self.count, self.features.shape[1], dtype=tilt.dtype, device=tilt.device)
        own_means = own_means.index_add(0, self.owners, weights.unsqueeze(1) * self.features) * self.count
        centred = self.features - own_means[self.owners]
        covariance = (centred * weights.unsqueeze(1)).T @ centred
        return own_means.mean(dim=0), covariance, float(1 / weights.detach().square().sum())

    def dual(self, lambdas: Tensor, wanted: Tensor) -> Tensor:
        """The mean over contexts of log sum w exp(features lambda), less lambda wanted; lambda is where it is least."""
        return self._log_sums(self.log_weights + self.features @ lambdas).mean() - lambdas @ wanted

    def reach(self) -> tuple[Tensor, Tensor]:
        """The least and the largest mean (K,) of each feature that weights above 0 can give."""
        places = self.owners.unsqueeze(1).expand_as(self.features)
        empty = torch.zeros(self.count, self.features.shape[1], dtype=self.features.dtype, device=self.features.device)
        low, high = (
            empty.scatter_reduce(0, places, self.features, kind, include_self=False).mean(dim=0)
            for kind in ("amin", "amax")
        )
        return low, high

    def _log_sums(self, tilt: Tensor) -> Tensor:
        """logsumexp of each context, (count,)."""
        largest = tilt.new_zeros(self.count).scatter_reduce(0, self.owners, tilt, "amax", include_self=False)
        return largest + tilt.new_zeros(self.count).index_add(0, self.owners, (tilt - largest[self.owners]).exp()).log()


def _newton(samples: Samples, wanted: Tensor) -> tuple[Tensor, int]:
    """Minimise the dual over lambda, (K,); the best found and the steps taken."""
    lambdas = torch.zeros_like(wanted)
    if len(wanted) == 0:
        return lambdas, 0
    for iteration in range(ITERATIONS):
        means, covariance, _ = samples.tilted(lambdas)
        gradient = means - wanted
        if float(gradient.abs().max()) <= TOLERANCE:
            return lambdas, iteration
        # The pseudo-inverse leaves out directions in which the features do not vary, where lambda changes nothing.
        step = torch.linalg.pinv(covariance, hermitian=True) @ gradient
        slope, here, scale = gradient @ step, samples.dual(lambdas, wanted), 1.0
        rounding = 1e-13 * (1 + here.abs())  # near the minimum the last steps change the dual by less
        while not samples.dual(lambdas - scale * step, wanted) <= here - 1e-4 * scale * slope + rounding:
            scale /= 2
            if scale < 1e-10:
                return lambdas, iteration
        lambdas = lambdas - scale * step
    return lambdas, ITERATIONS


def _require_reachable(samples: Samples, moments: list[float], free: list[int]) -> None:
    """UserError that names the first moment outside of what the samples show."""
    for place, low, high in zip(free, *(bound.tolist() for bound in samples.reach()), strict=True):
        inside = low < moments[place] < high or low == moments[place] == high
        if not inside:
            of_prompts = f" of {samples.count} prompts" if samples.count > 1 else ""
            raise UserError(
                f"moment {moments[place]:g} of feature {place} cannot be reached: on {len(samples.features)} samples"
                f"{of_prompts} its mean can lie in [{low:g}, {high:g}] and must lie inside. Sample more of each "
                "prompt, or from a model that shows it."
            )


def _columns(like: Tensor, features: Tensor) -> Tensor:
    """Features as (N, K), checked to have a row for each of N and no NaN or infinity."""
    columns = features.unsqueeze(1) if features.dim() == 1 else features
    if columns.dim() != 2 or columns.shape[0] != like.shape[0]:
        raise UserError(
            f"features must have one row for each of {like.shape[0]} responses, got shape {tuple(features.shape)}."
        )
    wrong = ~columns.isfinite()
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise UserError(f"feature {place} of response {row} is {columns[row, place].item()}; it must be a number.")
    return columns


def _require_binary(columns: Tensor) -> None:
    wrong = (columns != 0) & (columns != 1)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise UserError(
            f"feature {place} of response {row} is {columns[row, place].item():g}; a constraint is 0 or 1, numbers are "
            "for the targets reward and distributional."
        )


def _log_constraint(satisfied: Tensor, floor: float | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).masked_fill(~satisfied, -math.inf if floor is None else math.log(floor))


def _floor(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise UserError(f"floor must lie between 0 and 1, got {value!r}.")
    return value
