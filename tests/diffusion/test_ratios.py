"""Scores of D3PO, PSO and SePPO: recorded vectors through the losses as they are, and what each rule means."""

import math
from dataclasses import replace

import pytest
import torch

from llmalign.diffusion.ratios import (
    clipped_fraction,
    pareto_preference,
    pso_scores,
    seppo_flip,
    seppo_scores,
    transition_scores,
)
from llmalign.diffusion.scores import PairErrors, pair_scores
from llmalign.losses import dpo, slic
from tests.diffusion.vectors import VECTORS, assert_recorded, seq, tensor


def columns(case: dict, name: str) -> torch.Tensor:
    return torch.stack([tensor(case[f"{name}0"]), tensor(case[f"{name}1"])], dim=1)


def random_errors(grad: bool = False) -> PairErrors:
    generator = torch.Generator().manual_seed(0)
    draws = [0.2 + 0.1 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    return PairErrors(draws[0].requires_grad_(grad), draws[1].requires_grad_(grad), draws[2], draws[3])


# D3PO and online PSO


@pytest.mark.parametrize("case", VECTORS["d3po"], ids=lambda case: f"beta{case['beta']}-clip{case['clip']}")
def test_d3po(case):
    policy, reference = columns(case, "logp").requires_grad_(), columns(case, "ref")
    preference = tensor(case["prefer"])[:, 0]
    loss = dpo(transition_scores(policy, reference, preference, clip=case["clip"]), beta=case["beta"]).mean()
    (slope,) = torch.autograd.grad(loss, policy)
    assert_recorded(loss, case["loss"])
    assert_recorded(slope[:, 0], case["dlogp0"])
    assert_recorded(slope[:, 1], case["dlogp1"])


def test_a_ratio_outside_of_the_band_has_no_gradient_on_either_side_of_it():
    # Log-ratios of .2 and -.2 (e^.2 = 1.22, e^-.2 = .82), then within: each clamped to log 1.1 or log .9, by hand.
    policy = tensor([[0.2, -0.2], [-0.2, 0.2], [0.05, -0.05]], grad=True)
    scores = transition_scores(policy, torch.zeros_like(policy), torch.ones(3), clip=0.1)
    assert scores.chosen.tolist() == pytest.approx([math.log(1.1), math.log(0.9), 0.05], rel=1e-12)
    assert scores.rejected.tolist() == pytest.approx([math.log(0.9), math.log(1.1), -0.05], rel=1e-12)
    (slope,) = torch.autograd.grad(dpo(scores, beta=0.1).sum(), policy)
    assert torch.equal(slope[:2], torch.zeros_like(slope[:2])) and bool((slope[2] != 0).all())
    assert clipped_fraction(policy, torch.zeros_like(policy), 0.1).tolist() == [1, 1, 0]


def test_the_clipped_fraction_counts_both_samples_of_a_pair():
    policy = tensor([[0.2, 0.0], [0.0, -0.2], [math.log(1.1) - 1e-9, math.log(0.9) + 1e-9], [-0.2, 0.2]])
    assert clipped_fraction(policy, torch.zeros_like(policy), 0.1).tolist() == [0.5, 0.5, 0, 1]
    assert clipped_fraction(policy, policy, 0.1).tolist() == [0, 0, 0, 0]


def test_without_clip_it_is_dpo_on_the_transitions_and_the_order_of_a_pair_is_no_matter():
    policy, reference = columns(VECTORS["d3po"][0], "logp"), columns(VECTORS["d3po"][0], "ref")
    preference = torch.tensor([1, -1, -1, 1])
    scores = transition_scores(policy, reference, preference, clip=None)
    winner = (preference < 0).long()
    plain = [values.gather(1, place[:, None])[:, 0] for values in (policy, reference) for place in (winner, 1 - winner)]
    margin = (plain[0] - plain[2]) - (plain[1] - plain[3])
    assert_recorded(dpo(scores, beta=2.0), torch.nn.functional.softplus(-2.0 * margin).tolist())
    swapped = transition_scores(policy.flip(1), reference.flip(1), -preference, clip=None)
    assert all(torch.equal(vars(swapped)[name], vars(scores)[name]) for name in ("chosen", "rejected"))


def test_a_tie_has_loss_log_2_and_no_gradient():
    policy = tensor([[3.0, -2.0]], grad=True)
    for clip in (None, 0.1):
        losses = dpo(transition_scores(policy, torch.zeros_like(policy), torch.zeros(1), clip=clip), beta=5.0)
        assert losses.item() == pytest.approx(math.log(2), rel=1e-12)
        assert torch.autograd.grad(losses.sum(), policy)[0].abs().max() == 0


def test_ratios_too_large_for_an_exponential_are_clamped():
    policy = torch.tensor([[500.0, -500.0]], requires_grad=True)
    losses = dpo(transition_scores(policy, torch.zeros(1, 2), torch.ones(1)), beta=50.0)
    # beta (log 1.1 - log .9) = 50 * .200671 = 10.03: softplus(-10.03) is e^-10.03 less half its square
    assert losses.item() == pytest.approx(4.3889e-5, rel=1e-3)
    assert torch.equal(torch.autograd.grad(losses.sum(), policy)[0], torch.zeros(1, 2))


def test_bad_transitions_are_refused():
    good = torch.zeros(3, 2)
    for policy, reference in [(torch.zeros(3), torch.zeros(3)), (good, torch.zeros(3, 1)), (torch.zeros(3, 3),) * 2]:
        with pytest.raises(ValueError, match=r"must be \(B, 2\), twice"):
            transition_scores(policy, reference, torch.ones(3))
    with pytest.raises(ValueError, match=r"preference must have shape \(3,\)"):
        transition_scores(good, good, torch.ones(3, 2))
    for clip in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="clip must lie between 0 and 1"):
            transition_scores(good, good, torch.ones(3), clip=clip)
        with pytest.raises(ValueError, match="clip must lie between 0 and 1"):
            clipped_fraction(good, good, clip)


# Preferences


def test_one_reward_is_compared():
    first, second = torch.tensor([1.0, 2.0, 3.0, math.nan, 1.0]), torch.tensor([2.0, 1.0, 3.0, 1.0, math.nan])
    assert pareto_preference(first, second).tolist() == [-1, 1, 0, 0, 0]


def test_several_rewards_are_compared_by_strict_pareto_dominance():
    rows = [
        ([30.0, 10.0, 6.0], [20.0, 8.0, 5.0], 1),  # all higher
        ([30.0, 10.0, 6.0], [40.0, 4.0, 4.0], 0),  # higher here, lower there
        ([30.0, 10.0, 6.0], [30.0, 10.0, 6.5], -1),  # one lower, none higher
        ([30.0, 10.0, 6.0], [30.0, 10.0, 6.0], 0),  # all the same
        ([30.0, 10.0, math.nan], [20.0, 8.0, 5.0], 0),  # one missing
    ]
    first, second, expected = zip(*rows, strict=True)
    assert pareto_preference(torch.tensor(first), torch.tensor(second)).tolist() == list(expected)
    assert pareto_preference(torch.tensor(second), torch.tensor(first)).tolist() == [-value for value in expected]


def test_rewards_of_unequal_shape_are_refused():
    for first, second in [((3,), (2,)), ((3, 2), (3,)), ((3, 2, 1), (3, 2, 1)), ((), ())]:
        with pytest.raises(ValueError, match=r"must be \(B,\) or \(B, R\)"):
            pareto_preference(torch.zeros(first), torch.zeros(second))


# SePPO


@pytest.mark.parametrize("case", VECTORS["seppo"], ids=lambda case: case["mode"])
def test_seppo(case):
    chosen, rejected = tensor(case["err_w"], grad=True), tensor(case["err_x"], grad=True)
    errors = PairErrors(chosen, rejected, tensor(case["ref_err_w"]), tensor(case["ref_err_x"]))
    scores = seppo_scores(errors, rule=case["mode"], tie=0)
    loss = dpo(scores, beta=case["beta"]).mean()
    on_chosen, on_rejected = torch.autograd.grad(loss, (chosen, rejected))
    margin = (scores.chosen - scores.ref_chosen) - (scores.rejected - scores.ref_rejected)
    assert_recorded(seppo_flip(errors, rule=case["mode"], tie=0), case["flip"])
    assert_recorded(case["beta"] * margin, case["logits"])
    assert_recorded(loss, case["loss"])
    assert_recorded(on_chosen, case["dloss_derr_w"])
    assert_recorded(on_rejected, case["dloss_derr_x"])


@pytest.mark.parametrize("rule", ["sign", "indicator"])
def test_where_the_policy_is_the_reference_seppo_is_diffusion_dpo_or_leaves_its_sample_out(rule):
    errors = random_errors(grad=True)
    errors = replace(errors, ref_chosen=errors.chosen.detach())
    assert seppo_flip(errors, rule=rule).tolist() == [1] * 6
    assert torch.equal(dpo(seppo_scores(errors, rule=rule), beta=2.0), dpo(pair_scores(errors), beta=2.0))
    losses = dpo(seppo_scores(errors, rule=rule, tie=0), beta=2.0)
    on_chosen, on_rejected = torch.autograd.grad(losses.sum(), (errors.chosen, errors.rejected))
    assert torch.equal(on_rejected, torch.zeros(6, dtype=torch.float64))
    assert on_chosen.tolist() == pytest.approx([0.5] * 6)  # beta/2 sigmoid(0)


def test_the_flip_itself_has_no_gradient_and_summed_errors_scale_the_scores():
    errors = random_errors(grad=True)
    assert not seppo_flip(errors).requires_grad
    ones, sums = seppo_scores(errors), seppo_scores(errors, scale=16.0)
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        torch.testing.assert_close(vars(sums)[name], 16 * vars(ones)[name])


def test_unknown_rules_and_ties_are_refused():
    with pytest.raises(ValueError, match="one of sign, indicator, got 'flip'"):
        seppo_flip(random_errors(), rule="flip")
    with pytest.raises(ValueError, match="tie must be 1 .* got -1"):
        seppo_scores(random_errors(), tie=-1)


# Offline PSO


@pytest.mark.parametrize("case", VECTORS["pso_offline"], ids=lambda case: case["loss_type"])
def test_pso_offline(case):
    sigma, noise = tensor(case["sigma"]).reshape(2, 1, 1, 1), seq(case["noise"])

    def errors_of(clean: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        noisy = clean + sigma * noise
        predicted = factor * noisy / (sigma.square() + 1).sqrt()
        of_noise = (predicted - noise).square().flatten(1).mean(1)
        of_clean = (noisy - sigma * predicted - clean).square().flatten(1).mean(1) / sigma.flatten().square()
        torch.testing.assert_close(of_noise, of_clean, rtol=1e-12, atol=0)
        return of_noise

    factor = tensor(0.6, grad=True)
    winner, loser = seq(case["x0_w"]), seq(case["x0_l"])
    errors = PairErrors(*(errors_of(clean, by) for by in (factor, 0.5) for clean in (winner, loser)))
    assert_recorded(errors.chosen, case["err_w"])
    assert_recorded(errors.rejected, case["err_l"])

    with_reference = case["loss_type"] == "pso"
    scores = pso_scores(errors, negative_factor=case["neg_defactor"], with_reference=with_reference)
    losses = dpo(scores, beta=case["beta"]) if with_reference else slic(scores, beta=case["beta"])
    loss = (losses + case["prior_loss_weight"] * errors.rejected).mean()
    assert_recorded(loss, case["loss"])
    assert_recorded(torch.autograd.grad(loss, factor)[0], case["dloss_da"])


def test_pso_with_factor_1_is_diffusion_dpo_at_twice_the_beta():
    errors = random_errors()
    ours = dpo(pso_scores(errors, negative_factor=1.0), beta=5.0)
    torch.testing.assert_close(ours, dpo(pair_scores(errors), beta=10.0), rtol=1e-12, atol=0)


def test_pso_without_reference_reads_no_reference():
    errors = random_errors()
    other = replace(errors, ref_chosen=errors.ref_chosen + 1, ref_rejected=errors.ref_rejected - 1)
    ours, theirs = (pso_scores(given, with_reference=False) for given in (errors, other))
    assert torch.equal(dpo(ours, beta=5.0), dpo(theirs, beta=5.0))
    assert not torch.equal(dpo(pso_scores(errors), beta=5.0), dpo(pso_scores(other), beta=5.0))
