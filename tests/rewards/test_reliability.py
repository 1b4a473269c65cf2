"""R^2 and rank correlation by strategy: recorded numbers, plain recomputation, and what is recommended."""

import json
import math
import random

import numpy as np
import pytest

from llmalign.errors import UserError
from llmalign.losses import STRATEGIES
from llmalign.rewards.reliability import Interval, Strategy, _recommend, as_dict, reliability
from llmalign.rewards.reliability_report import plot_reliability


@pytest.fixture(scope="module")
def recorded(repository):
    return json.loads((repository / "tests" / "data" / "reliability.json").read_text())


def by_name(result):
    return {strategy.name: strategy for strategy in result.strategies}


def world(prompts=40, completions=5, noise=1.0, seed=0, flip=1.0):
    rng = random.Random(seed)
    scores = [[float(rng.randint(0, 4)) for _ in range(completions)] for _ in range(prompts)]
    return [[flip * value + rng.gauss(0, noise) for value in row] for row in scores], scores


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_against_the_recorded_numbers(recorded, strategy):
    case = recorded["by_strategy"][strategy]
    result = reliability(
        recorded["rewards"], recorded["scores"], strategies=[strategy], n_groups=recorded["n_groups"],
        power=case["power"], resamples=10,
    )  # fmt: skip
    found = by_name(result)[strategy]
    exactly = {"rel": 1e-9, "abs": 1e-12}
    assert found.r2.value == pytest.approx(case["r2_per_response_weighted"], **exactly)
    assert found.grouped_r2.value == pytest.approx(case["r2_grouped_8_equal_width_bins"], **exactly)
    assert found.group_rewards == pytest.approx(case["group_mean_reward"], **exactly)
    assert found.group_scores == pytest.approx(case["group_mean_score"], **exactly)
    if "slope" in case:
        assert (found.slope, found.intercept) == pytest.approx((case["slope"], case["intercept"]), **exactly)
    assert sum(found.group_weights) == pytest.approx(1) and found.prompts == 12


def test_the_fit_is_least_squares_over_what_is_kept():
    """best_worst keeps two of each prompt at equal weight: the fit is numpy's over these."""
    rewards, scores = world()
    found = by_name(reliability(rewards, scores, resamples=10))["best_worst"]
    kept = [(row.index(pick(row)), r) for r, row in enumerate(rewards) for pick in (max, min)]
    x, y = (np.array([rows[r][i] for i, r in kept]) for rows in (rewards, scores))
    slope, intercept = np.polyfit(x, y, 1)
    left = y - slope * x - intercept
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    assert found.r2.value == pytest.approx(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum())


def midranks(values):
    return np.array([sum(other < value for other in values) + sum(other == value for other in values) / 2
                     for value in values])  # fmt: skip


def test_the_rank_correlation_is_spearman_s():
    rewards, scores = world(20)
    found = by_name(reliability(rewards, scores, resamples=10))
    x, y = (np.concatenate(rows) for rows in (rewards, scores))
    assert found["none"].spearman.value == pytest.approx(np.corrcoef(midranks(x), midranks(y))[0, 1])
    # best_random weighs the best of five four times as much as each other: so often it counts.
    repeat = [(row[i], true[i]) for row, true in zip(rewards, scores, strict=True) for i in range(5)
              for _ in range(4 if row[i] == max(row) else 1)]  # fmt: skip
    x, y = map(np.array, zip(*repeat, strict=True))
    assert found["best_random"].spearman.value == pytest.approx(np.corrcoef(midranks(x), midranks(y))[0, 1])


def test_a_monotone_change_of_the_reward_keeps_ranks_and_an_affine_one_keeps_all():
    rewards, scores = world(20)
    plain, affine, bent = (
        by_name(reliability([[change(value) for value in row] for row in rewards], scores, resamples=20,
                            strategies=["none", "best_worst"]))
        for change in (lambda v: v, lambda v: 3 * v - 1e4, math.exp)
    )  # fmt: skip
    for name in plain:
        assert bent[name].spearman == plain[name].spearman and bent[name].r2.value != plain[name].r2.value
        for field in ("r2", "grouped_r2", "spearman", "gain"):
            assert list(vars(getattr(affine[name], field)).values()) == pytest.approx(
                list(vars(getattr(plain[name], field)).values()), rel=1e-6
            )


def test_prompts_may_have_any_number_of_completions():
    """Each prompt weighs as one, so that doubling its completions changes nothing."""
    rewards, scores = world(30, 4)
    twice = [row * 2 if i % 2 else row for i, row in enumerate(rewards)]
    true = [row * 2 if i % 2 else row for i, row in enumerate(scores)]
    plain, mixed = (by_name(reliability(*rows, resamples=10)) for rows in ((rewards, scores), (twice, true)))
    for name in ("none", "best_of_n", "power"):
        assert mixed[name].r2.value == pytest.approx(plain[name].r2.value)
        assert mixed[name].spearman.value == pytest.approx(plain[name].spearman.value)


def test_prompts_without_signal_count_only_where_training_keeps_them():
    rewards, scores = world(10)
    rewards[3] = [1.0] * 5
    found = by_name(reliability(rewards, scores, resamples=10))
    assert {name: one.prompts for name, one in found.items()} == {
        "none": 10, "best_of_n": 10, "best_random": 9, "best_worst": 9, "power": 10
    }  # fmt: skip


def test_intervals_cover_a_slope_s_share_and_depend_on_the_seed_alone():
    """Over 60 worlds of one distribution about 95 % of the intervals hold the value of a very large world."""
    truth = by_name(reliability(*world(20000, 3, seed=999), strategies=["none"], resamples=2))["none"]
    held = {"r2": 0, "spearman": 0}
    for seed in range(60):
        one = by_name(reliability(*world(40, 3, seed=seed), strategies=["none"], resamples=200))["none"]
        for name in held:
            interval = getattr(one, name)
            assert interval.low < interval.value < interval.high
            held[name] += interval.low <= getattr(truth, name).value <= interval.high
    assert all(51 <= count <= 60 for count in held.values()), held
    data = world(20)
    first, second, other = (reliability(*data, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert as_dict(first) == as_dict(second) != as_dict(other)


def test_a_filter_is_recommended_where_it_is_clearly_better():
    """Rewards are noise but for the best and the worst of a prompt."""
    rng = random.Random(0)
    rewards, scores = [], []
    for _ in range(80):
        middle = [rng.uniform(-2, 2) for _ in range(4)]
        rewards.append([*middle, 3 + rng.random(), -3 - rng.random()])
        scores.append([*(float(rng.random() < 0.5) for _ in middle), 1.0, 0.0])
    result = reliability(rewards, scores, resamples=200)
    assert result.recommended == "best_worst" and result.reason.startswith("best_worst: its rewards say most")
    assert by_name(result)["best_worst"].gain.low > 0


def test_a_filter_that_is_clearly_better_goes_before_one_that_may_be_so_by_chance():
    """Of 1,200 random worlds 40 had such a pair; in this one the highest R^2 is not clearly above that of all."""

    def of(name, r2, *gain):
        known = Interval(r2, r2, r2)
        return Strategy(name, known, known, known, Interval(*gain), 1.0, 0.0, [], [], [], 10)

    keep, clear = of("none", 0.40, 0.0, 0.0, 0.0), of("best_random", 0.52, 0.12, 0.04, 0.19)
    unsure = of("power", 0.56, 0.16, -0.03, 0.36)
    assert _recommend([keep, clear, unsure])[0] == "best_random"
    assert _recommend([keep, unsure])[0] == "none"


def test_one_prompt_says_nothing_of_others():
    with pytest.raises(UserError, match="score two or more"):
        reliability([[1.0, 2.0, 3.0]], [[0.0, 1.0, 1.0]])


def test_no_filter_is_recommended_where_it_may_be_chance_or_the_reward_is_wrong():
    few = reliability(*world(6, noise=3.0), resamples=200)
    assert few.recommended == "none" and "may be chance" in few.reason
    wrong = reliability(*world(40, flip=-1.0), resamples=50)
    assert wrong.recommended == "none" and "put the reward right" in wrong.reason
    assert by_name(wrong)["none"].r2.value > 0.3  # R^2 alone would not tell
    equal = reliability([[1.0, 2.0], [0.0, 3.0]] * 2, [[0.0, 1.0]] * 4, strategies=["best_of_n"], resamples=50)
    assert equal.recommended == "none" and "nothing can be said of it" in equal.reason
    alone = reliability(*world(40), strategies=["none"], resamples=50)
    assert alone.recommended == "none" and "no filter has a higher R^2" in alone.reason


def test_what_is_undefined_is_not_a_number():
    """All kept scores are equal, or fewer than three groups hold anything."""
    rewards = [[0.0, 1.0], [0.25, 1.0], [0.5, 1.0]]
    result = reliability(rewards, [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]], strategies=["best_of_n", "none"], resamples=20)
    found = by_name(result)
    assert math.isnan(found["best_of_n"].r2.value) and math.isnan(found["best_of_n"].grouped_r2.value)
    assert math.isnan(found["best_of_n"].spearman.value) and math.isfinite(found["none"].r2.value)
    written = json.loads(json.dumps(as_dict(result), allow_nan=False))
    assert written["strategies"][0]["r2"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("rewards", "scores", "options", "words"),
    [
        ([], [], {}, "got 0 and 0 lists"),
        ([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], {}, "got 1 and 2 lists"),
        ([[1.0, 2.0], [1.0, 2.0, 3.0]], [[1.0, 2.0]] * 2, {}, "Prompt 1 has 3 rewards and 2 scores"),
        ([[1.0, 2.0], [1.0]], [[1.0, 2.0], [1.0]], {}, "Prompt 1 has fewer than two completions"),
        ([[1.0, 2.0]], [[1.0, math.nan]], {}, "Prompt 0 has a reward or score that is not finite"),
        ([[1.0, 1.0]] * 2, [[1.0, 2.0]] * 2, {}, "All rewards are 1"),
        ([[1.0, 2.0]] * 2, [[0.0, 0.0]] * 2, {}, "All scores are 0"),
        ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, {"strategies": ["bon"]}, "'bon' is no strategy; known are: none"),
        ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, {"strategies": []}, "no strategy is named"),
        ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, {"n_groups": 2}, "n_groups must be at least 3"),
        ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, {"power": -1.0}, "power must be zero or a positive"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(rewards, scores, options, words):
    with pytest.raises(UserError, match=words):
        reliability(rewards, scores, **options)


def test_the_plot_is_a_picture_with_a_panel_a_strategy(tmp_path):
    path = plot_reliability(reliability(*world(), resamples=10), tmp_path / "new" / "reliability.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000
    one = plot_reliability(reliability(*world(), strategies=["none"], resamples=10), tmp_path / "one.png")
    assert one.stat().st_size < path.stat().st_size
