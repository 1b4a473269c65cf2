"""f-DPG: recorded numbers, exact gradients on a finite space, and what is drawn where the target is 0."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmalign.losses import (
    DIVERGENCES,
    clamped,
    exact_divergence,
    fdpg,
    leave_one_out_baseline,
    pseudo_rewards,
)
from llmalign.trainers.partition import BaselineWindow, PartitionFunction
from tests.losses.loss_helpers import DTYPES, gradients, tensor
from tests.slow import all_but

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())["fdpg"]
INFINITE = ("reverse_kl", "chi2_reverse")
NAN, INF = math.nan, math.inf
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def numbers(values: list[float | str]) -> list[float]:
    return [float(value) for value in values]


def recorded_samples(
    dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Policy, proposal and target of the recorded samples, which rows were kept, and which of those are comparable.

    Where the divergence is infinite the sample with P = 0 is left out. The last sample is a stress test: pi of e^-1400
    in float64; the direct forms of forward KL and chi2 are checked there on their own.
    """
    given = VECTORS["monte_carlo"]
    kept = [row for row in range(8) if not (row == 3 and name in INFINITE)]
    policy, proposal, target = (
        tensor([numbers(given[key])[row] for row in kept], dtype)
        for key in ("policy_logps", "proposal_logps", "target_log_scores")
    )
    comparable = [place for place, row in enumerate(kept) if row != 7 or (dtype == torch.float64)]
    if name == "chi2_forward":
        comparable = [place for place in comparable if kept[place] != 7]
    return policy.requires_grad_(), proposal, target, kept, comparable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("baseline", [None, 0.25])
@every_divergence
def test_samples_against_the_recorded_numbers(name, baseline, dtype):
    given = VECTORS["monte_carlo"]
    recorded = given["per_divergence"][name]["baseline_0" if baseline is None else "baseline_0.25"]
    policy, proposal, target, kept, comparable = recorded_samples(dtype, name)
    losses = fdpg(policy, proposal, target, given["log_z_from_these_samples"], name, baseline)
    (gradient,) = gradients(losses, policy)
    assert losses.dtype == dtype and torch.isfinite(losses).all() and torch.isfinite(gradient).all()
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for actual, key in ((losses.detach(), "loss"), (gradient, "grad_policy_logp")):
        expected = tensor([numbers(recorded[key])[row] for row in kept], dtype)
        torch.testing.assert_close(actual[comparable], expected[comparable], rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_divergence
def test_pseudo_rewards_against_the_recorded_numbers(name, dtype):
    given = VECTORS["monte_carlo"]
    policy, proposal, target, kept, comparable = recorded_samples(dtype, name)
    if name in ("forward_kl", "chi2_forward"):  # e^693 and its square are cut
        comparable = [place for place in comparable if kept[place] != 7]
    actual = pseudo_rewards(policy, proposal, target, given["log_z_from_these_samples"], name)
    recorded = numbers(given["per_divergence"][name]["baseline_0"]["pseudo_reward"])
    expected = tensor([recorded[row] for row in kept], dtype)
    torch.testing.assert_close(
        actual[comparable], expected[comparable], rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=1e-15
    )
    assert torch.isfinite(actual).all() and not actual.requires_grad


@every_divergence
def test_the_stress_sample_is_clamped_only_where_its_product_is_large(name):
    # log w = -700. Forward KL exponentiates logP - logZ - logq = -705 - 1.97 + 700, small, although f' alone is
    # e^693. chi2_forward: 2 (-706.97) + 1400 + 700 = 686. chi2_reverse: 2 (-1400) + 700 + 706.97 = -1393.
    policy, proposal, target, kept, _ = recorded_samples(torch.float32, name)
    cut = clamped(policy, proposal, target, VECTORS["monte_carlo"]["log_z_from_these_samples"], name)
    assert [kept[place] for place in cut.nonzero().flatten().tolist()] == ([7] if name == "chi2_forward" else [])


def test_the_clamp_by_hand():
    # log w = 30 > 20; forward KL's own exponent is -1 - 0 - (-40) = 39 > 20.
    policy, proposal, target = tensor([-10.0], grad=True), tensor([-40.0]), tensor([-1.0])
    assert clamped(policy, proposal, target, 0.0, "forward_kl").tolist() == [True]
    (gradient,) = gradients(fdpg(policy, proposal, target, 0.0, "forward_kl", 3.0), policy)
    assert gradient.item() == pytest.approx((3 - 1) * math.exp(20), rel=1e-12)
    assert clamped(tensor([-1.0]), tensor([-1.0]), tensor([-INF]), 0.0, "forward_kl").tolist() == [False]


@pytest.mark.parametrize("baseline", [None, "windowed"])
@every_divergence
def test_minibatches_and_the_windowed_baseline_against_the_recorded_numbers(name, baseline):
    given = VECTORS["monte_carlo_clean"]
    recorded = given["per_divergence"][name]
    policy, proposal, target = (tensor(given[key]) for key in ("policy_logps", "proposal_logps", "target_log_scores"))
    policy.requires_grad_()
    rewards = pseudo_rewards(policy, proposal, target, given["log_z"], name)
    torch.testing.assert_close(rewards, tensor(recorded["pseudo_reward"]), rtol=1e-9, atol=0)
    if baseline is None:
        mean = fdpg(policy, proposal, target, given["log_z"], name).mean()
        assert mean.item() == pytest.approx(recorded["loss_mean_no_baseline"], rel=1e-9)
        expected = tensor(recorded["grad_policy_logp_of_mean_loss"])
        torch.testing.assert_close(gradients(mean, policy)[0], expected, rtol=1e-9, atol=0)
        return
    windowed = recorded["windowed_baseline"]
    window = BaselineWindow(windowed["window"])
    losses = []
    for part in (slice(0, 3), slice(3, 6)):
        used = window.mean()
        losses.append(fdpg(policy[part], proposal[part], target[part], given["log_z"], name, used).mean())
        window.update(rewards[part])
    assert used == pytest.approx(windowed["baseline_used_for_minibatch_2"], rel=1e-9)
    assert losses[0].item() == pytest.approx(windowed["minibatch_1_loss_mean"], rel=1e-9)
    assert losses[1].item() == pytest.approx(windowed["minibatch_2_loss_mean"], rel=1e-9)
    expected = tensor(windowed["grad_policy_logp_minibatch_2"])
    torch.testing.assert_close(gradients(losses[1], policy)[0][3:], expected, rtol=1e-9, atol=1e-16)
    assert window.mean() == pytest.approx(windowed["baseline_after"], rel=1e-9)


@pytest.mark.parametrize("name", VECTORS["conditional"]["per_divergence"])
def test_one_partition_function_a_context_against_the_recorded_numbers(name):
    recorded = VECTORS["conditional"]["per_divergence"][name]
    partition = PartitionFunction(per_context=True)
    losses, sums = [], []
    for key, given in VECTORS["conditional"]["inputs"].items():
        policy, proposal, target = (tensor(numbers(given[part])) for part in ("policy", "proposal", "target"))
        keys = [key] * len(policy)
        partition.update(keys, target - proposal)
        log_z = partition.log_z(keys)
        sums.append(log_z[0].exp().item())
        if log_z[0] > -INF:
            losses.append(fdpg(policy, proposal, target, log_z, name).mean().item())
    assert sums == pytest.approx(recorded["z_per_context"], rel=1e-9)
    assert losses == pytest.approx(recorded["context_losses"], rel=1e-9)
    assert sum(losses) / len(losses) == pytest.approx(recorded["batch_loss"], rel=1e-9)


def target_of(kind: str) -> torch.Tensor:
    return tensor(VECTORS["targets"][kind]["P"]).log()


@pytest.mark.parametrize("target", VECTORS["exact"])
@every_divergence
def test_the_exact_divergence_and_its_gradient(target, name):
    recorded = VECTORS["exact"][target][name]
    logits = tensor(VECTORS["space"]["policy_logits"], grad=True)
    log_p = target_of(target).log_softmax(0)
    divergence = exact_divergence(logits.log_softmax(0), log_p, name)
    assert divergence.item() == pytest.approx(float(recorded["divergence"]), rel=1e-9)
    if recorded["divergence"] != "inf" and name != "tv":  # |t - 1| has a kink, but none of t is 1
        expected = tensor(recorded["grad_logits"])
        torch.testing.assert_close(gradients(divergence, logits)[0], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("proposal", ["policy", "base"])
@pytest.mark.parametrize("baseline", [None, 1.0, -0.7])
@pytest.mark.parametrize("target", VECTORS["exact"])
@every_divergence
def test_the_expected_gradient_is_that_of_the_divergence(target, name, baseline, proposal):
    """Theorem 1, over every sample of the space with its probability under the proposal."""
    recorded = VECTORS["exact"][target][name]["grad_logits"]
    logits = tensor(VECTORS["space"]["policy_logits"], grad=True)
    policy, log_target = logits.log_softmax(0), target_of(target)
    log_q = policy.detach() if proposal == "policy" else tensor(VECTORS["space"]["a"]).log()
    log_z = math.log(VECTORS["targets"][target]["Z"])
    if isinstance(recorded, str):
        with pytest.raises(ValueError, match=f"^{name} is infinite: the target gives sample 0 probability 0"):
            fdpg(policy, log_q, log_target, log_z, name, baseline)
        return
    losses = fdpg(policy, log_q, log_target, log_z, name, baseline)
    (gradient,) = gradients((log_q.exp() * losses), logits)
    torch.testing.assert_close(gradient, tensor(recorded), rtol=1e-9, atol=1e-13)


def test_reverse_kl_to_a_reward_target_is_regularised_reward():
    """beta grad KL(pi|p) = -grad (E r - beta KL(pi|a)), the objective of reinforcement learning with a KL penalty."""
    space, beta = VECTORS["space"], VECTORS["targets"]["rlhf"]["beta"]
    logits = tensor(space["policy_logits"], grad=True)
    policy = logits.log_softmax(0)
    losses = fdpg(policy, policy.detach(), target_of("rlhf"), math.log(VECTORS["targets"]["rlhf"]["Z"]), "reverse_kl")
    (ours,) = torch.autograd.grad((policy.exp().detach() * losses).sum(), logits, retain_graph=True)
    probabilities = policy.exp()
    objective = (probabilities * tensor(space["reward"])).sum() - beta * (
        probabilities * (policy - tensor(space["a"]).log())
    ).sum()
    torch.testing.assert_close(beta * ours, -gradients(objective, logits)[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("target", all_but(["rlhf"], ["rlhf", "pointwise", "distributional"]))
@every_divergence
def test_every_divergence_reaches_its_target_on_a_finite_space(target, name):
    log_target, steps = target_of(target), 1500
    if target == "pointwise" and name in INFINITE:  # a floor of 1e-6 makes chi2_reverse slow: t starts at 1e5
        steps = 6000
        log_target = torch.where(
            log_target.isneginf(), tensor(VECTORS["space"]["a"]).log() + math.log(1e-6), log_target
        )
    log_z = log_target.logsumexp(0)
    p = (log_target - log_z).exp()
    logits = tensor(VECTORS["space"]["policy_logits"], grad=True)
    # TV's gradient keeps its length up to the minimum, so that the step has to fall.
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    for _ in range(steps):
        policy = logits.log_softmax(0)
        losses = fdpg(policy, policy.detach(), log_target, log_z, name, 1.0 if name == "forward_kl" else None)
        optimizer.zero_grad()
        (policy.exp().detach() * losses).sum().backward()
        optimizer.step()
        schedule.step()
    assert (logits.softmax(0) - p).abs().max() < 1e-3


@every_divergence
def test_the_table_is_consistent(name):
    """f(1) = 0; f' is the derivative of f; w f' is their product; a very large t has the slope at infinity."""
    found = DIVERGENCES[name]
    s = tensor([-3.0, -0.7, -0.1, 0.2, 0.9, 2.5], grad=True)
    assert found.f(tensor([0.0])).item() == 0
    (on_s,) = gradients(found.f(s), s)
    torch.testing.assert_close(on_s / s.detach().exp(), found.slope(s.detach()), rtol=1e-9, atol=1e-12)
    policy, proposal = torch.linspace(-4, -1, 6, dtype=torch.float64), torch.linspace(-2, -3, 6, dtype=torch.float64)
    product = (policy - proposal).exp() * found.slope(s.detach())
    torch.testing.assert_close(found.weighted(policy - proposal, s.detach()), product, rtol=1e-9, atol=1e-12)
    far = found.slope(tensor([60.0])).item()
    if name in INFINITE:
        assert found.slope_at_infinity == INF and far > found.slope(tensor([2.0])).item() + 10
    else:
        assert far == pytest.approx(found.slope_at_infinity, abs=1e-12)


@every_divergence
def test_the_exact_divergence_allows_a_policy_without_some_of_the_space(name):
    # pi = (1, 0), p = (1/2, 1/2), t = (2, 0), by hand: E_p f(t).
    found = exact_divergence(tensor([0.0, -INF]), tensor([0.5, 0.5]).log(), name).item()
    expected = {
        "forward_kl": INF,
        "reverse_kl": math.log(2),
        "tv": 0.5,
        "js": math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "chi2_forward": INF,
        "chi2_reverse": 1.0,
    }[name]
    assert found == pytest.approx(expected, rel=1e-12)


# Leave one out.


def groups(prompts: int = 3, samples: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    policy, proposal, target = torch.randn(3, prompts, samples, generator=generator, dtype=torch.float64).unbind()
    return policy - 20, proposal - 20, target - 21


@every_divergence
def test_the_baseline_is_the_weighted_mean_over_the_others(name):
    policy, proposal, target = groups()
    log_z = tensor([[0.3], [-0.2], [0.1]]).expand(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    broken = [value.masked_fill(mask == 0, NAN) for value in (policy, proposal, target, log_z)]
    found = leave_one_out_baseline(*broken, name, mask)
    for row in range(3):
        rewards = pseudo_rewards(policy[row], proposal[row], target[row], log_z[row], name).tolist()
        weights = (policy[row] - proposal[row]).exp().tolist()
        for place in range(5):
            others = [other for other in range(5) if other != place and mask[row, other]]
            total = sum(weights[other] for other in others)
            expected = sum(weights[other] * rewards[other] for other in others) / total if others else 0.0
            assert found[row, place].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_baseline_does_not_cancel():
    # One weight of e^18 beside two of 1: as a difference of float32 sums the others' would be lost.
    policy, proposal = tensor([[18.0, 0.0, 0.0]], torch.float32), torch.zeros(1, 3)
    found = leave_one_out_baseline(policy, proposal, torch.tensor([[0.0, -1.0, 2.0]]), 0.0, "reverse_kl")
    # -f' = -(s + 1): of the two others s = 1 and -2, so -2 and 1.
    assert found[0, 0].item() == pytest.approx(-0.5, rel=1e-6)


def test_the_baseline_reads_impossible_samples():
    # tv: -f' is -1/2 for P = 0 as for pi > p.
    policy = torch.full((1, 3), -2.0)
    found = leave_one_out_baseline(policy, policy, torch.tensor([[-INF, -1.0, -INF]]), 0.0, "tv")
    assert found.tolist() == [[0.0, -0.5, 0.0]]


@every_divergence
def test_baselines_do_not_change_the_expected_gradient(name):
    """Over all pairs of samples of a small space, the mean gradient with the other one's pseudo-reward is unchanged."""
    logits, log_p = tensor([0.3, -0.4, 0.1], grad=True), tensor([0.5, 0.2, 0.3]).log()
    policy = logits.log_softmax(0)
    q = tensor([0.4, 0.4, 0.2]).log()
    (plain,) = torch.autograd.grad((q.exp() * fdpg(policy, q, log_p, 0.0, name)).sum(), logits, retain_graph=True)
    total = torch.zeros(())
    for i in range(3):
        for j in range(3):
            pair = torch.tensor([i, j])
            shift = leave_one_out_baseline(policy[pair][None], q[pair][None], log_p[pair][None], 0.0, name)[0]
            losses = fdpg(policy[pair], q[pair], log_p[pair], 0.0, name, shift)
            total = total + (q[i] + q[j]).exp() * losses.mean()
    torch.testing.assert_close(gradients(total, logits)[0], plain, rtol=1e-9, atol=1e-12)


# Bad input.


def test_only_the_policys_log_prob_has_a_gradient():
    policy, proposal, target, log_z, baseline = (tensor([value], grad=True) for value in (-1.0, -1.1, -1.2, 0.1, 0.2))
    losses = fdpg(policy, proposal, target, log_z, "js", baseline)
    losses.sum().backward()
    assert policy.grad is not None
    assert proposal.grad is None and target.grad is None and log_z.grad is None and baseline.grad is None


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_target_that_is_no_number(value):
    with pytest.raises(ValueError, match=r"^log_target is (nan|inf) at sample 1; it must be a number or -inf\.$"):
        fdpg(torch.zeros(2), torch.zeros(2), torch.tensor([0.0, value]), 0.0, "tv")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_log_z_that_is_not_finite(value):
    with pytest.raises(ValueError, match="^log_z is (nan|-?inf) at sample 1: mask contexts whose Z is 0"):
        fdpg(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.tensor([0.0, value]), "tv")


def test_an_unknown_divergence():
    with pytest.raises(ValueError, match="^divergence must be one of forward_kl, reverse_kl, .*, got 'kl'"):
        fdpg(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0, "kl")


def test_infinite_divergences_name_the_sample_and_the_ways_out():
    with pytest.raises(ValueError, match="sample 1 probability 0.*Floor the constraint.*or use forward_kl, tv, js"):
        fdpg(torch.zeros(2), torch.zeros(2), torch.tensor([0.0, -INF]), 0.0, "chi2_reverse")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"policy": torch.zeros(2, 1)}, r"policy must have shape \(N,\), got \(2, 1\)"),
        ({"proposal": torch.zeros(3)}, r"proposal must have the shape of policy, \(2,\), got \(3,\)"),
        ({"log_target": torch.zeros(2, dtype=torch.float64)}, "log_target must have the dtype of policy"),
        ({"log_z": torch.zeros(3)}, r"log_z must be one number or a tensor of shape \(2,\), got shape \(3,\)"),
        ({"baseline": torch.zeros(2, 2)}, r"baseline must be one number or a tensor of shape \(2,\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_shapes_and_dtypes(changed, sentence):
    given = {"policy": torch.zeros(2), "proposal": torch.zeros(2), "log_target": torch.zeros(2), "log_z": 0.0}
    with pytest.raises(ValueError, match=sentence):
        fdpg(**(given | changed), divergence="js")
