"""How well a reward predicts the true score among the completions that each PF-PPO strategy would train on.

R^2 of a linear fit score ~ reward, https://arxiv.org/abs/2409.06957, Section 4: 1 - SSE / SST. The paper takes its
points from groups of responses with similar rewards without saying how wide they are, and the number depends on that,
so two are given: over responses, weighted by `rank_weights`, and over groups of equal width, with their number said.
R^2 rises with the spread of the rewards that are kept, which is part of why it favours extremes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmalign.errors import UserError
from llmalign.losses import STRATEGIES, rank_weights

Array = NDArray[np.float64]

N_GROUPS = 20
RESAMPLES = 1000
LEAST_GROUPS = 3  # a line through two points is no evidence
WITHOUT_SIGNAL = ("best_random", "best_worst")  # training leaves out prompts whose rewards are all equal
KEEPS_ALL = "none"


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval over prompts; NaN where it is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Strategy:
    """What one strategy's completions show.

    `r2`: weighted, over responses. `grouped_r2`: over groups of equal width, each one point. `spearman`: weighted rank
    correlation. `gain`: r2 less that of `none`. `slope`, `intercept`: of the weighted fit, in score
    and score per reward. `group_rewards`, `group_scores`, `group_weights`: weighted means and shares of the groups that
    hold anything. `prompts`: how many count.
    """

    name: str
    r2: Interval
    grouped_r2: Interval
    spearman: Interval
    gain: Interval
    slope: float
    intercept: float
    group_rewards: list[float]
    group_scores: list[float]
    group_weights: list[float]
    prompts: int


@dataclass(frozen=True)
class Reliability:
    """All strategies, the one that is recommended, and why in a sentence."""

    strategies: list[Strategy]
    recommended: str
    reason: str
    prompts: int
    responses: int
    n_groups: int
    power: float


def reliability(
    rewards: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    *,
    strategies: Sequence[str] = STRATEGIES,
    n_groups: int = N_GROUPS,
    power: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Reliability:
    """Compare strategies on P prompts, each with its completions' rewards and true scores (two or more of each).

    Groups are `n_groups` intervals of equal width from the lowest to the highest of all rewards, the same for every
    strategy and resample. Intervals are percentiles over prompts drawn with replacement. Under best_random and
    best_worst a prompt of equal rewards has no weight, as in training. Raises UserError for unknown strategies, lists
    of unequal length, fewer than two completions, numbers that are not finite, and rewards or scores that are all
    equal.
    Not covered: how the completions were sampled; take them from the model that training starts from.
    """
    data = _Data.of(rewards, scores, n_groups)
    names = list(dict.fromkeys(strategies))
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or not names:
        what = f"{unknown[0]!r} is no strategy" if unknown else "no strategy is named"
        raise UserError(f"{what}; known are: {', '.join(STRATEGIES)}.")
    if power < 0 or not np.isfinite(power):
        raise UserError(f"power must be zero or a positive finite number, got {power}.")
    counts = _draws(data.prompts, resamples, seed)
    base = _Fit(data, _weights(data, KEEPS_ALL, power), counts)
    fits = {name: base if name == KEEPS_ALL else _Fit(data, _weights(data, name, power), counts) for name in names}
    found = [_describe(name, fit, base) for name, fit in fits.items()]
    recommended, reason = _recommend(found)
    return Reliability(found, recommended, reason, data.prompts, len(data.reward), n_groups, power)


@dataclass(frozen=True)
class _Data:
    """All responses in one row: their prompt, reward, score, group, and rewards as (P, N) with a mask."""

    prompt: NDArray[np.int64]
    reward: Array
    score: Array
    group: NDArray[np.int64]
    n_groups: int
    padded: torch.Tensor
    mask: torch.Tensor

    @property
    def prompts(self) -> int:
        return len(self.padded)

    @classmethod
    def of(cls, rewards: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], n_groups: int) -> "_Data":
        if n_groups < LEAST_GROUPS:
            raise UserError(f"n_groups must be at least {LEAST_GROUPS}, got {n_groups}.")
        if not len(rewards) or len(rewards) != len(scores):
            raise UserError(f"Every prompt needs rewards and scores; got {len(rewards)} and {len(scores)} lists.")
        for row, (own, true) in enumerate(zip(rewards, scores, strict=True)):
            if len(own) != len(true):
                raise UserError(f"Prompt {row} has {len(own)} rewards and {len(true)} scores.")
            if len(own) < 2:
                raise UserError(f"Prompt {row} has fewer than two completions, so there is nothing to choose from.")
            if not np.isfinite([*own, *true]).all():
                raise UserError(f"Prompt {row} has a reward or score that is not finite; leave the row out.")
        if len(rewards) < 2:
            raise UserError("One prompt says nothing of others, and intervals are over prompts: score two or more.")
        lengths = [len(own) for own in rewards]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.float64)
        padded[mask] = torch.tensor([value for own in rewards for value in own], dtype=torch.float64)
        reward = padded[mask].numpy()
        score = np.array([value for true in scores for value in true], dtype=np.float64)
        for name, values in (("rewards", reward), ("scores", score)):
            if values.min() == values.max():
                raise UserError(f"All {name} are {values[0]:g}, so nothing can be said about how the two go together.")
        low, high = reward.min(), reward.max()
        group = np.clip(((reward - low) / (high - low) * n_groups).astype(np.int64), 0, n_groups - 1)
        prompt = np.repeat(np.arange(len(lengths)), lengths)
        return cls(prompt, reward, score, group, n_groups, padded, mask)


def _weights(data: _Data, strategy: str, power: float) -> Array:
    weights = rank_weights(data.padded, strategy, power, data.mask)
    if strategy in WITHOUT_SIGNAL:
        low = data.padded.masked_fill(~data.mask, torch.inf).amin(dim=1)
        high = data.padded.masked_fill(~data.mask, -torch.inf).amax(dim=1)
        weights = weights * (low < high)[:, None]
    return weights[data.mask].numpy()


def _draws(prompts: int, resamples: int, seed: int) -> Array:
    """How often each prompt is drawn in each resample (B, P); the first row is the data themselves."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.concatenate([np.ones((1, prompts)), drawn.astype(np.float64)])


class _Fit:
    """The statistics of one weighting on all resamples: arrays (B + 1,), the data themselves first."""

    def __init__(self, data: _Data, weights: Array, counts: Array) -> None:
        self.data, self.weights = data, weights
        # Centred, so that sums of squares keep their digits.
        self.centre = (np.average(data.reward), np.average(data.score))
        x, y = data.reward - self.centre[0], data.score - self.centre[1]
        moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1) * weights[:, None]
        sums = np.zeros((data.prompts, 6))
        np.add.at(sums, data.prompt, moments)
        self.r2, self.slope, self.intercept = _line(*(counts @ sums).T)
        cells = np.zeros((data.prompts, data.n_groups, 3))
        np.add.at(cells, (data.prompt, data.group), moments[:, :3])
        totals = (counts @ cells.reshape(data.prompts, -1)).reshape(len(counts), data.n_groups, 3)
        self.grouped_r2 = _grouped(totals)
        self.groups = totals[0]
        self.spearman = _spearman(data, weights, counts)

    @property
    def prompts(self) -> int:
        return len(np.unique(self.data.prompt[self.weights > 0]))


def _line(n: Array, x: Array, y: Array, xx: Array, yy: Array, xy: Array) -> tuple[Array, Array, Array]:
    """R^2, slope and intercept of y ~ x from weighted sums; NaN where x or y does not vary."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sxx, syy, sxy = xx - x * x / n, yy - y * y / n, xy - x * y / n
        # What is left of a constant after rounding is no variance.
        varies = (sxx > 1e-12 * xx) & (syy > 1e-12 * yy)
        slope = np.where(varies, sxy / sxx, np.nan)
        r2 = np.where(varies, sxy * sxy / (sxx * syy), np.nan)  # 1 - SSE / SST of the least-squares line
        return r2, slope, (y - slope * x) / n


def _grouped(totals: Array) -> Array:
    """R^2 over groups (B, G, 3: weight, reward, score); every group that holds anything is one point."""
    present = totals[:, :, 0] > 0
    weight = np.where(present, totals[:, :, 0], 1.0)
    x, y = totals[:, :, 1] / weight, totals[:, :, 2] / weight
    one = present.astype(np.float64)
    sums = [(one * values).sum(axis=1) for values in (np.ones_like(x), x, y, x * x, y * y, x * y)]
    r2 = _line(*sums)[0]
    return np.where(present.sum(axis=1) >= LEAST_GROUPS, r2, np.nan)


def _spearman(data: _Data, weights: Array, counts: Array) -> Array:
    """Weighted rank correlation: Pearson's of mid-ranks, where a response counts as often as its weight says."""
    places = [np.unique(values, return_inverse=True)[1] for values in (data.reward, data.score)]
    results = np.full(len(counts), np.nan)
    for draw, count in enumerate(counts):
        own = weights * count[data.prompt]
        total = own.sum()
        if total == 0:
            continue
        x, y = (_centred_ranks(place, own, total) for place in places)
        xx, yy, xy = (float((own * product).sum()) for product in (x * x, y * y, x * y))
        if min(xx, yy) > 1e-12 * total:
            results[draw] = xy / np.sqrt(xx * yy)
    return results


def _centred_ranks(place: NDArray[np.int64], weights: Array, total: float) -> Array:
    """Mid-ranks in [0, 1], the weighted share below plus half of the share that is equal, less their mean of 1/2."""
    mass = np.bincount(place, weights=weights)
    return ((np.cumsum(mass) - mass / 2) / total)[place] - 0.5


def _interval(values: Array) -> Interval:
    """The data's own value and the 2.5 and 97.5 % quantiles of the resamples in which it is defined."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(drawn) < 2:
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def _describe(name: str, fit: _Fit, base: _Fit) -> Strategy:
    held = fit.groups[fit.groups[:, 0] > 0]
    mean_reward, mean_score = fit.centre
    slope = float(fit.slope[0])
    return Strategy(
        name=name,
        r2=_interval(fit.r2),
        grouped_r2=_interval(fit.grouped_r2),
        spearman=_interval(fit.spearman),
        gain=_interval(fit.r2 - base.r2),
        slope=slope,
        intercept=float(fit.intercept[0]) + mean_score - slope * mean_reward,
        group_rewards=(held[:, 1] / held[:, 0] + mean_reward).tolist(),
        group_scores=(held[:, 2] / held[:, 0] + mean_score).tolist(),
        group_weights=(held[:, 0] / held[:, 0].sum()).tolist(),
        prompts=fit.prompts,
    )


def _recommend(found: list[Strategy]) -> tuple[str, str]:
    """Of the filters clearly better than keeping everything that of the highest R^2; `none` where there is none."""
    known = [one for one in found if np.isfinite(one.r2.value)]
    if not known:
        return KEEPS_ALL, (
            "none: under no strategy do both the reward and the score differ between completions, so nothing can be "
            "said of it; score completions that are better and worse."
        )
    good = [one for one in known if one.slope > 0]
    if not good:
        return KEEPS_ALL, (
            "none: under no strategy does the score rise with the reward, so a filter has nothing to go by; put the "
            "reward right before training on it."
        )
    clearly = [one for one in good if one.gain.low > 0]
    best = max(clearly or good, key=lambda one: one.r2.value)
    if best.name == KEEPS_ALL:
        return KEEPS_ALL, f"none: no filter has a higher R^2 than keeping everything ({best.r2})."
    gain = f"R^2 {best.r2}, {best.gain} above that of keeping everything"
    if not clearly:
        return KEEPS_ALL, (
            f"none: {best.name} is the best filter ({gain}), but that may be chance, and a filter throws completions "
            "away; score more prompts to tell."
        )
    return best.name, f"{best.name}: its rewards say most about the score ({gain})."


def as_dict(result: Reliability) -> dict[str, Any]:
    """The result for a JSON file; what is undefined is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, (Reliability, Strategy, Interval)):
            return {key: plain(entry) for key, entry in vars(value).items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return plain(result)
