"""PF-PPO's rank filters: recorded weights, exact selection, resampling, masks and ties."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmalign.losses import STRATEGIES, rank_weights, resample, select
from tests.losses.loss_helpers import DTYPES, tensor

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())["pfppo"]
SHORT = {"none": "none", "bon": "best_of_n", "br": "best_random", "bw": "best_worst"}
NAN = math.nan
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def named(short: str) -> dict:
    """The recorded name of a strategy as arguments; pow3 is power with the exponent 3."""
    return {"strategy": SHORT[short]} if short in SHORT else {"strategy": "power", "power": float(short[3:])}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RECORDED["weights"], ids=lambda case: case["strategy"])
def test_weights_against_the_recorded_numbers(case, dtype):
    found = rank_weights(tensor([case["rewards"]], dtype), **named(case["strategy"]))
    torch.testing.assert_close(
        found, tensor([case["weights"]], dtype), rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0
    )


@pytest.mark.parametrize("short", RECORDED["r2"]["weights"])
def test_weights_of_twelve_prompts_against_the_recorded_numbers(short):
    found = rank_weights(tensor(RECORDED["r2"]["rewards"]), **named(short))
    torch.testing.assert_close(found, tensor(RECORDED["r2"]["weights"][short]), rtol=1e-9, atol=1e-15)


def test_the_papers_code_has_the_same_weights_but_for_their_sum_and_for_ties():
    recorded = RECORDED["official_reweight_weights_unnormalised"]
    for key, strategy in (
        ("select_min_max (BW)", "bw"),
        ("select_max_random (BR, hard coded for N=5)", "br"),
        ("put_weight pow 2", "pow2"),
    ):
        theirs = tensor([recorded[key]])
        found = rank_weights(tensor([recorded["rewards"]]), **named(strategy))
        torch.testing.assert_close(found, theirs / theirs.sum(), rtol=1e-9, atol=0)
    # Theirs sorts upwards and takes the ends: the last of the best, the first of the worst.
    ties = tensor([recorded["ties"]])
    assert recorded["ties select_min_max"] == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert select(ties, "best_worst").tolist() == [[True, False, False, True, False]]


@every_strategy
def test_weights_sum_to_one_over_what_is_present(strategy):
    rewards = torch.randn(20, 6, generator=seeded(), dtype=torch.float64)
    mask = torch.rand(20, 6, generator=seeded(1)) < 0.5
    mask[0] = False
    found = rank_weights(rewards.masked_fill(~mask, NAN), strategy, 2.0, mask)
    assert found[~mask].abs().max() == 0
    torch.testing.assert_close(found.sum(1), mask.any(1).double(), rtol=1e-12, atol=1e-12)
    for row in range(20):  # as if the masked ones had never been there
        if mask[row].any():
            alone = rank_weights(rewards[row : row + 1, mask[row]], strategy, 2.0)
            torch.testing.assert_close(found[row : row + 1, mask[row]], alone, rtol=1e-12, atol=0)


@every_strategy
def test_one_completion_has_weight_one(strategy):
    assert rank_weights(tensor([[0.7]]), strategy).tolist() == [[1.0]]


def test_constant_rows_still_have_weights():
    assert rank_weights(tensor([[2.0, 2.0, 2.0]]), "best_worst").tolist() == [[0.5, 0.0, 0.5]]
    assert rank_weights(tensor([[2.0, 2.0, 2.0]]), "best_random").tolist() == [[0.5, 0.25, 0.25]]
    assert rank_weights(tensor([[0.0, 0.0]]), "power", 2.0).tolist() == [[0.5, 0.5]]


def test_powers_do_not_overflow():
    found = rank_weights(torch.tensor([[1e30, 1e30, 1e-30]]), "power", 3.0)
    assert found.tolist() == [[0.5, 0.5, 0.0]]


# Exact selection. Rewards: a clear order; ties at both ends; all equal; one present; none present.

ROWS = [[0.0, 3.0, -1.0, 2.0], [5.0, 1.0, 5.0, 1.0], [1.0, 1.0, 1.0, 1.0], [NAN, 4.0, NAN, NAN], [NAN, NAN, NAN, NAN]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("none", MASK),
        ("best_of_n", [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
        ("best_worst", [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_what_is_selected(strategy, expected):
    found = select(tensor(ROWS), strategy, mask=torch.tensor(MASK))
    assert found.dtype == torch.bool
    assert found.int().tolist() == expected


def test_best_random_keeps_the_best_and_each_other_equally_often():
    counts, generator = torch.zeros(4), seeded()
    for _ in range(3000):
        found = select(tensor(ROWS), "best_random", generator, mask=torch.tensor(MASK))
        assert found.sum(1).tolist() == [2, 2, 0, 0, 0]
        assert found[0, 1] and found[1, 0]
        counts += found[0]
    # 3 others, 1000 each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26.
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 4 * 26


def test_power_draws_two_in_proportion_to_what_is_left():
    # |R| = 1, 2, 3 (and a masked one): P(first = i) = R_i / 6, second among the rest.
    # P({1, 2}) = 1/6*2/5 + 2/6*1/4 = .15; P({1, 3}) = 1/6*3/5 + 3/6*1/3 = .26667;
    # P({2, 3}) = 2/6*3/4 + 3/6*2/3 = .58333.
    rewards, mask = tensor([[1.0, -2.0, 3.0, NAN]] * 20000), torch.tensor([[1, 1, 1, 0]] * 20000)
    found = select(rewards, "power", seeded(), mask=mask)
    assert (found.sum(1) == 2).all() and not found[:, 3].any()
    shares = [(found[:, i] & found[:, j]).double().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert shares == pytest.approx([0.15, 4 / 15, 7 / 12], abs=4 * 0.0035)


def test_power_keeps_what_has_a_weight():
    assert select(tensor([[0.0, 2.0, 0.0]]), "power", seeded()).tolist() == [[False, True, False]]
    assert select(tensor([[0.0, 0.0, 0.0]]), "power", seeded()).sum() == 2


@every_strategy
def test_a_seed_gives_the_same_choice_again(strategy):
    rewards = torch.randn(30, 5, generator=seeded())
    assert torch.equal(select(rewards, strategy, seeded(3)), select(rewards, strategy, seeded(3)))
    assert torch.equal(resample(rewards, strategy, 4, seeded(3)), resample(rewards, strategy, 4, seeded(3)))


@every_strategy
def test_resampling_draws_with_the_weights(strategy):
    rewards = tensor([[0.7, -1.2, 2.4, 0.1, NAN]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    counts = resample(rewards, strategy, 20000, seeded(), power=2.0, mask=mask)
    assert counts.sum().item() == 20000 and counts[0, 4] == 0 and counts.dtype == torch.int64
    expected = rank_weights(rewards, strategy, 2.0, mask)
    torch.testing.assert_close(counts.double() / 20000, expected, rtol=0, atol=4 * 0.5 / 20000**0.5)


def test_a_row_with_nothing_left_is_not_resampled():
    found = resample(tensor(ROWS), "best_worst", 3, seeded(), mask=torch.tensor(MASK))
    assert found.sum(1).tolist() == [3, 3, 3, 3, 0]
    assert found[3].tolist() == [0, 3, 0, 0]


# Bad input.


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("call", [rank_weights, select])
def test_a_reward_that_is_no_number_is_named(call, value):
    with pytest.raises(ValueError, match=f"^The reward of prompt 1, completion 0 is {value}: mask it"):
        call(torch.tensor([[1.0, 2.0], [value, 2.0]]), "best_worst")


def test_what_is_refused():
    with pytest.raises(ValueError, match="^strategy must be one of none, best_of_n, .*, got 'worst'"):
        rank_weights(torch.zeros(1, 2), "worst")
    with pytest.raises(ValueError, match="^power must be a finite number of at least 0, got -1"):
        rank_weights(torch.ones(1, 2), "power", -1)
    with pytest.raises(ValueError, match=r"^mask must have the shape of rewards, \(1, 2\), got \(1, 3\)"):
        select(torch.zeros(1, 2), "none", mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"^rewards must have shape \(P, N\), got \(2,\)"):
        select(torch.zeros(2), "none")
    with pytest.raises(ValueError, match="^k must be at least 1, got 0"):
        resample(torch.zeros(1, 2), "none", 0)
