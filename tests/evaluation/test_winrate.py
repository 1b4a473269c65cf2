"""Win rates against numbers worked out by hand and against their promised coverage."""

import math

import numpy as np
import pytest

from llmalign.evaluation import bootstrap_mean, length_matched, paired_difference, win_rate


def test_wilson_interval_by_hand() -> None:
    # 60 of 100: centre (.6 + z^2/200)/(1 + z^2/100) = .596301, half width .094298 with z^2 = 3.841459
    found = win_rate([1.0] * 60 + [0.0] * 40)
    assert found.rate == 0.6
    assert (found.low, found.high) == (pytest.approx(0.502003, abs=1e-6), pytest.approx(0.690599, abs=1e-6))
    assert (found.n, found.wins, found.losses, found.ties) == (100, 60, 40, 0)


def test_ten_of_ten_is_not_certain() -> None:
    # Wilson's lower end at rate 1 is n/(n + z^2) = 10/13.841459
    found = win_rate([1] * 10)
    assert (found.low, found.high) == (pytest.approx(0.722467, abs=1e-6), pytest.approx(1))


def test_a_tie_counts_one_half() -> None:
    found = win_rate([1, 0.5, 0.5, 0])
    assert (found.rate, found.wins, found.losses, found.ties) == (0.5, 1, 1, 2)
    graded = win_rate([0.9, 0.2, 0.5])
    assert (graded.rate, graded.wins, graded.losses, graded.ties) == (pytest.approx(1.6 / 3), 1, 1, 1)


def test_repeating_each_comparison_adds_no_certainty_when_clustered() -> None:
    outcomes = [1.0] * 30 + [0.0] * 20
    prompts = list(range(50))
    once = win_rate(outcomes, prompts)
    repeated = win_rate(outcomes * 4, prompts * 4)
    assert repeated.rate == once.rate == 0.6
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), abs=1e-12)
    # One prompt's standard error is sqrt(.24/50) = .0693
    assert once.high - once.low == pytest.approx(2 * 1.96 * 0.0693, rel=0.08)
    taken_as_independent = win_rate(outcomes * 4)
    assert repeated.high - repeated.low > 1.8 * (taken_as_independent.high - taken_as_independent.low)


def test_clusters_of_different_size_weigh_by_their_comparisons() -> None:
    assert win_rate([1, 1, 1, 0], ["a", "a", "a", "b"]).rate == 0.75


def test_unanimous_prompts_fall_back_to_wilson_over_prompts() -> None:
    found = win_rate([1.0] * 20, [prompt for prompt in range(10) for _ in range(2)])
    assert (found.low, found.high) == (pytest.approx(10 / 13.841459, abs=1e-6), pytest.approx(1))


def test_the_interval_covers_what_it_promises() -> None:
    """400 experiments of 80 prompts x 3 comparisons whose chances differ by prompt (beta(2, 1), mean 2/3)."""
    generator = np.random.default_rng(1)
    clustered, independent = 0, 0
    prompts = [prompt for prompt in range(80) for _ in range(3)]
    for trial in range(400):
        chances = generator.beta(0.8, 0.4, size=80).repeat(3)
        outcomes = (generator.random(240) < chances).astype(float).tolist()
        found = win_rate(outcomes, prompts, seed=trial, resamples=600)
        clustered += found.low <= 2 / 3 <= found.high
        plain = win_rate(outcomes)
        independent += plain.low <= 2 / 3 <= plain.high
    assert 0.92 < clustered / 400 < 0.98
    assert independent / 400 < 0.90


def test_wilson_covers_what_it_promises() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for wins in generator.binomial(60, 0.7, size=1000):
        found = win_rate([1.0] * wins + [0.0] * (60 - wins))
        hits += found.low <= 0.7 <= found.high
    assert 0.93 < hits / 1000 < 0.97


def test_length_matching_keeps_outputs_within_the_tolerance_of_the_longer() -> None:
    # |20-23| = 3 <= .15*23 kept; |20-24| = 4 > 3.6 out; |30-20| out; equal kept; two empty outputs kept
    found = length_matched([1, 0, 1, 0, 1], [20, 20, 30, 7, 0], [23, 24, 20, 7, 0])
    assert (found.n, found.wins, found.losses) == (3, 2, 1)
    strict = length_matched([1, 0, 1, 0, 1], [20, 20, 30, 7, 0], [23, 24, 20, 7, 0], tolerance=0.0)
    assert strict.n == 2


def test_length_matching_takes_away_a_win_by_length() -> None:
    generator = np.random.default_rng(0)
    own, other = generator.integers(15, 40, size=4000), generator.integers(10, 30, size=4000)
    outcomes = np.where(own == other, 0.5, own > other).tolist()
    near = length_matched(outcomes, own.tolist(), other.tolist(), tolerance=0.1)
    assert win_rate(outcomes).rate > 0.75
    assert abs(near.rate - 0.5) < 0.08


def test_nothing_to_compare_is_said() -> None:
    found = length_matched([1, 1], [10, 10], [20, 30], ["a", "b"])
    assert (found.n, found.low, found.high) == (0, 0.0, 1.0)
    assert math.isnan(found.rate)
    assert found.text() == "nothing to compare"


def test_intervals_are_written_plainly() -> None:
    assert win_rate([1.0] * 60 + [0.0] * 40).text(scale=100, digits=1) == "60.0 [50.2, 69.1]"
    assert bootstrap_mean([2.0, 2.0]).text() == "2.00 [2.00, 2.00]"


def test_paired_difference_cancels_what_prompts_share() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(size=200) * 3
    first, second = hard + 0.5 + generator.normal(size=200) * 0.1, hard + generator.normal(size=200) * 0.1
    found = paired_difference(first.tolist(), second.tolist())
    # The gap's standard error is .1*sqrt(2)/sqrt(200) = .01
    assert found.mean == pytest.approx(float((first - second).mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01, rel=0.2)
    assert found.low < 0.5 < found.high


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(4).normal(5, 2, size=400)
    found = bootstrap_mean(values.tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.06)
    doubled = bootstrap_mean(np.repeat(values, 2).tolist(), [i // 2 for i in range(800)])
    assert doubled.high - doubled.low == pytest.approx(found.high - found.low, rel=1e-9)


def test_the_seed_fixes_the_bootstrap() -> None:
    values = [0.1, 0.4, 0.9, 0.3, 0.7]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: win_rate([]), "at least one value"),
        (lambda: win_rate([0.5, 1.5]), r"\[0, 1\]"),
        (lambda: win_rate([1.0, float("nan")]), "value 1 is not finite"),
        (lambda: win_rate([1.0, 0.0], ["a"]), "as many clusters"),
        (lambda: length_matched([1.0], [1, 2], [1]), "as many lengths"),
        (lambda: length_matched([1.0], [1], [1], tolerance=1.0), "tolerance"),
        (lambda: paired_difference([1.0], []), "equally many"),
    ],
)
def test_wrong_input_is_refused(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
