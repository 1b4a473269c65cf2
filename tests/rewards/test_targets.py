"""What f-DPG aims at: recorded lambdas and targets, moments that cannot be reached, and saved state."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch

from llmalign.errors import UserError
from llmalign.rewards.targets import DistributionalTarget, PointwiseTarget, RewardTarget, Samples, Target

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())["fdpg"]
SPACE, TARGETS = RECORDED["space"], RECORDED["targets"]
NAN, INF = math.nan, math.inf


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


BASE = tensor(SPACE["a"]).log()


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-9, atol=1e-14)


def test_a_pointwise_target_against_the_recorded_numbers():
    found = PointwiseTarget().log_target(BASE, tensor(SPACE["boolean_feature"]))
    close(found.exp(), TARGETS["pointwise"]["P"])
    assert found.isneginf().tolist() == [True, False, True, False, False, True]


def test_a_reward_target_against_the_recorded_numbers():
    found = RewardTarget(TARGETS["rlhf"]["beta"]).log_target(BASE, tensor(SPACE["reward"]))
    close(found.exp(), TARGETS["rlhf"]["P"])
    close(RewardTarget(TARGETS["rlhf"]["beta"]).log_target(BASE, tensor(SPACE["reward"])[:, None]), found.tolist())


def test_a_distributional_target_against_the_recorded_numbers():
    """Every element of the space once, weighted with the base: the expectations are exact."""
    target, features = DistributionalTarget(TARGETS["distributional"]["moments"]), tensor(SPACE["features"])
    report = target.fit(features, BASE)
    torch.testing.assert_close(tensor(target.lambdas), tensor(TARGETS["distributional"]["lambda"]), rtol=1e-8, atol=0)
    found = target.log_target(BASE, features)
    torch.testing.assert_close(found.exp(), tensor(TARGETS["distributional"]["P"]), rtol=1e-8, atol=0)
    p = tensor(TARGETS["distributional"]["p"])
    assert report.reached == pytest.approx([0.8, 0.5], abs=1e-9)
    assert report.gradient_norm < 1e-9 and report.iterations < 20 and report.samples == 6
    assert report.effective == pytest.approx(float(1 / p.square().sum()), rel=1e-6)
    assert "reached 0.8000, lambda 1.6677" in report.text() and "of 6" in report.text()


def test_one_yes_or_no_feature_has_its_closed_form():
    recorded, feature = TARGETS["distributional_single"], tensor(SPACE["boolean_feature"])
    target = DistributionalTarget([recorded["moment"]])
    target.fit(feature, BASE)
    assert target.lambdas == pytest.approx([recorded["lambda"]], rel=1e-8)
    share = float((BASE.exp() * feature).sum())
    for moment in (0.01, 0.3, 0.9, 0.999):
        target = DistributionalTarget([moment])
        target.fit(feature, BASE)
        assert target.lambdas == pytest.approx([math.log(moment * (1 - share) / ((1 - moment) * share))], rel=1e-6)


def test_gradient_steps_on_samples_against_the_recorded_numbers():
    """The weighted moments that Newton's method reads are those of the recorded plain gradient descent."""
    recorded = RECORDED["lambda_gd"]
    features = tensor(SPACE["features"])[recorded["sample_indices_from_a"]]
    wanted, lambdas = tensor(recorded["moments"]), torch.zeros(2, dtype=torch.float64)
    for expected in recorded["lambda_after_each_step"]:
        means, _, _ = Samples(features, torch.zeros(len(features), dtype=torch.float64)).tilted(lambdas)
        lambdas = lambdas - recorded["lr"] * (means - wanted)
        close(lambdas, expected)
    # Newton's method ends where that descent would.
    target = DistributionalTarget(recorded["moments"])
    target.fit(features)
    for _ in range(20000):
        means, _, _ = Samples(features, torch.zeros(len(features), dtype=torch.float64)).tilted(lambdas)
        lambdas = lambdas - recorded["lr"] * (means - wanted)
    torch.testing.assert_close(tensor(target.lambdas), lambdas, rtol=1e-6, atol=1e-8)


def test_the_covariance_is_the_derivative_of_the_moments():
    generator = torch.Generator().manual_seed(0)
    features, weights = (torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    at = tensor([0.3, -0.2, 0.5])
    for contexts in (None, torch.tensor([5, 5, 7, 7, 7, 5, 9, 9])):
        samples = Samples(features, weights[:, 0], contexts)
        means, covariance, effective = samples.tilted(at)
        jacobian = torch.autograd.functional.jacobian(lambda lam, of=samples: of.tilted(lam)[0], at)
        torch.testing.assert_close(covariance, jacobian, rtol=1e-9, atol=1e-12)
        slope = torch.autograd.functional.jacobian(lambda lam, of=samples: of.dual(lam, torch.zeros(3).double()), at)
        torch.testing.assert_close(slope, means, rtol=1e-9, atol=1e-12)
        assert 1 < effective < 8


@pytest.mark.parametrize("moments", [[0.5, 0.5], [0.9, 0.05], [0.02, 0.97]])
def test_moments_of_rare_features_are_reached(moments):
    """Base rates .21 and .09; an undamped first step goes singular here."""
    generator = torch.Generator().manual_seed(0)
    features = (torch.rand(4000, 2, generator=generator) < torch.tensor([0.21, 0.09])).float()
    target = DistributionalTarget(moments)
    report = target.fit(features)
    assert report.reached == pytest.approx(moments, abs=1e-8)
    weights = target.log_target(torch.zeros(4000, dtype=torch.float64), features).softmax(0)
    torch.testing.assert_close(weights @ features.double(), tensor(moments), rtol=0, atol=1e-8)
    assert 1 < report.effective < 4000


def test_every_prompt_counts_alike_however_likely_it_makes_the_feature():
    """Two prompts, exactly, with shares .002 and .979: pooled, the second would outweigh the first by far."""
    shares = [0.002, 0.979]
    features = tensor([1.0, 0.0, 1.0, 0.0])
    weights = tensor([part for share in shares for part in (share, 1 - share)]).log()
    target = DistributionalTarget([0.7])
    report = target.fit(features, weights, torch.tensor([3, 3, 8, 8]))
    odds = [share / (1 - share) * math.exp(target.lambdas[0]) for share in shares]
    assert sum(odd / (1 + odd) for odd in odds) / 2 == pytest.approx(0.7, abs=1e-9)
    assert report.contexts == 2 and "2 prompts" in report.text()
    with pytest.raises(UserError, match=r"of 2 prompts its mean can lie in \[0.5, 1\]"):
        DistributionalTarget([0.3]).fit(tensor([1.0, 0.0, 1.0, 1.0]), None, torch.tensor([0, 0, 1, 1]))


def test_a_prompt_without_a_possible_sample_is_left_out():
    features = tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    target = DistributionalTarget([1.0, 0.3])
    report = target.fit(features, None, torch.tensor([0, 0, 1, 1]))
    assert target.lambdas == pytest.approx([INF, math.log(0.3 / 0.7)]) and report.contexts == 1


def test_samples_of_another_distribution_are_weighted():
    # Twice as many of every element as the base would give, in other shares; log a - log q puts it right.
    q = tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    rows = torch.tensor([row for row, share in enumerate(q.tolist()) for _ in range(round(share * 10))])
    target = DistributionalTarget(TARGETS["distributional"]["moments"])
    target.fit(tensor(SPACE["features"])[rows], (BASE - q.log())[rows])
    assert target.lambdas == pytest.approx(TARGETS["distributional"]["lambda"], rel=1e-7)


def test_features_of_any_size():
    lengths = torch.arange(1, 401, dtype=torch.float32)
    target = DistributionalTarget([120.0])
    assert target.fit(lengths).reached == pytest.approx([120.0], abs=1e-5)


def test_a_redundant_feature_changes_nothing():
    feature = tensor(SPACE["boolean_feature"])
    target = DistributionalTarget([0.7, 0.7])
    target.fit(torch.stack([feature, feature], dim=1), BASE)
    alone = DistributionalTarget([0.7])
    alone.fit(feature, BASE)
    assert sum(target.lambdas) == pytest.approx(alone.lambdas[0], rel=1e-7)


# Moments of 1 and 0.


def test_moments_of_one_are_a_pointwise_target():
    features = tensor(SPACE["features"])
    target = DistributionalTarget([1.0, 1.0])
    assert target.may_be_zero
    report = target.fit(features, BASE)
    close(target.log_target(BASE, features), PointwiseTarget().log_target(BASE, features).tolist())
    assert report.reached == (1.0, 1.0) and report.lambdas == (INF, INF)


def test_a_fixed_feature_beside_a_free_one():
    """P(first = 0) = 1 and mean of the second .4: lambda is solved among the responses whose first feature is 0."""
    features = tensor([list(pair) for pair in product([0, 1], [0, 1])])
    target = DistributionalTarget([0.0, 0.4])
    report = target.fit(features)
    assert target.lambdas == [-INF, pytest.approx(math.log(0.4 / 0.6), rel=1e-8)]
    p = target.log_target(torch.zeros(4, dtype=torch.float64), features).softmax(0)
    torch.testing.assert_close(p, tensor([0.6, 0.4, 0.0, 0.0]), rtol=1e-8, atol=1e-12)
    assert report.reached == (0.0, pytest.approx(0.4))
    assert report.effective == pytest.approx(1 / (0.36 + 0.16), rel=1e-6)


@pytest.mark.parametrize("target", [PointwiseTarget(floor=1e-6), DistributionalTarget([1.0], floor=1e-6)])
def test_a_floor_keeps_every_target_above_nought(target):
    features = tensor(SPACE["boolean_feature"])
    if isinstance(target, DistributionalTarget):
        target.fit(features, BASE)
    assert not target.may_be_zero
    found = target.log_target(BASE, features)
    expected = tensor(SPACE["a"]) * features.clamp(min=1e-6)
    close(found.exp(), expected.tolist())


def test_who_may_be_zero():
    assert PointwiseTarget().may_be_zero and not RewardTarget(0.1).may_be_zero
    assert not DistributionalTarget([0.5]).may_be_zero
    # A moment of 1 of a feature that is no yes-or-no question is an ordinary moment.
    target = DistributionalTarget([1.0])
    target.fit(tensor([0.0, 1.0, 2.0, 3.0]))
    assert not target.may_be_zero


def test_the_dtype_is_that_of_the_base():
    for target in (PointwiseTarget(), RewardTarget(0.5), fitted()):
        assert target.log_target(BASE.float(), tensor(SPACE["boolean_feature"])).dtype == torch.float32


# State.


def fitted(moment: float = 0.5) -> DistributionalTarget:
    target = DistributionalTarget([moment])
    target.fit(tensor(SPACE["boolean_feature"]), BASE)
    return target


@pytest.mark.parametrize("moment", [0.5, 1.0, 0.0])
def test_a_saved_target_comes_back(moment):
    target, again = fitted(moment), DistributionalTarget([moment])
    again.load_state_dict(json.loads(json.dumps(target.state_dict(), allow_nan=False)))
    features = tensor(SPACE["boolean_feature"])
    assert torch.equal(again.log_target(BASE, features), target.log_target(BASE, features))
    for plain in (PointwiseTarget(), RewardTarget(0.1)):
        plain.load_state_dict(plain.state_dict())


def test_every_target_has_the_interface():
    targets: list[Target] = [PointwiseTarget(), RewardTarget(0.1), fitted()]
    assert all(target.log_target(BASE, tensor(SPACE["boolean_feature"])).shape == (6,) for target in targets)


# What is refused.


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DistributionalTarget([]), "moments must be one finite number for each feature"),
        (lambda: DistributionalTarget([NAN]), "moments must be one finite number for each feature"),
        (lambda: DistributionalTarget([0.5]).log_target(BASE, BASE), "has no lambda yet: fit it"),
        (lambda: DistributionalTarget([0.5]).fit(torch.ones(4, 2)), "1 moments need as many features, got 2"),
        (lambda: fitted().log_target(BASE, torch.ones(6, 2)), "1 moments need as many features, got 2"),
        (lambda: fitted().load_state_dict({"moments": [0.4], "lambdas": [1.0]}), r"has moments \[0.4\], this run asks"),
        (lambda: RewardTarget(0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: RewardTarget(0.1).log_target(BASE, torch.ones(6, 2)), "one reward a response, got 2"),
        (lambda: RewardTarget(0.1).log_target(BASE[:2], tensor([1.0, NAN])), "feature 0 of response 1 is nan"),
        (lambda: PointwiseTarget(floor=0.0), "floor must lie between 0 and 1, got 0.0"),
        (lambda: PointwiseTarget().log_target(BASE[:2], tensor([1.0, 0.5])), "feature 0 of response 1 is 0.5; a const"),
        (
            lambda: PointwiseTarget().log_target(BASE, torch.ones(5)),
            r"one row for each of 6 responses, got shape \(5,\)",
        ),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("moments", "features", "sentence"),
    [
        # Never seen, so no weighting of the samples shows it.
        ([0.5], [[0.0]] * 5, r"moment 0.5 of feature 0 cannot be reached: on 5 samples its mean can lie in \[0, 0\]"),
        ([0.5, 1.4], [[0.0, 0.0], [1.0, 1.0]], "moment 1.4 of feature 1 cannot be reached"),
        ([1.0], [[0.0]] * 5, "no sample of 5 has feature 0 = 1: the target would be empty"),
        ([1.0, 0.0], [[1.0, 1.0], [0.0, 0.0]], "no sample of 2 has feature 0 = 1, feature 1 = 0"),
        # Each is in its range, but the features exclude each other, or are the same.
        ([0.8, 0.8], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], r"moments \[0.8, 0.8\] cannot be reached together"),
        ([0.3, 0.6], [[1.0, 1.0], [0.0, 0.0]], r"moments \[0.3, 0.6\] cannot be reached together: the closest that 2"),
    ],
)
def test_moments_that_cannot_be_reached(moments, features, sentence):
    target = DistributionalTarget(moments)
    with pytest.raises(UserError, match=sentence):
        target.fit(tensor(features))
    with pytest.raises(UserError, match="no lambda yet"):
        _ = target.lambdas
