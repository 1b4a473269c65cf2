"""PPO's parts and MDPO: recorded numbers, numbers by hand, masks, and the optimum on a finite space."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmalign.losses import annealed_step_size, gae, mdpo, ppo_clip, token_rewards, value_clip, whiten
from tests.losses.loss_helpers import DTYPES, gradients, tensor

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())
PPO, MDPO = RECORDED["pfppo"]["ppo"], RECORDED["mdpo"]
NAN = math.nan


def given(name: str, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    return tensor(PPO["inputs"][name], dtype, grad)


def close(actual: torch.Tensor, expected: object) -> None:
    rtol, atol = (1e-9, 1e-14) if actual.dtype == torch.float64 else (1e-5, 1e-6)
    torch.testing.assert_close(actual.detach(), tensor(expected, actual.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ppo_from_rewards_to_losses_against_the_recorded_numbers(dtype):
    inputs = PPO["inputs"]
    mask, old, values = given("action_mask", dtype), given("old_logps", dtype), given("old_values", dtype)
    rewards = token_rewards(
        given("rm_score", dtype), old, given("ref_logps", dtype), mask,
        kl_coef=inputs["kl_coef"], clamp=inputs["reward_clamp"],
    )  # fmt: skip
    close(rewards, PPO["token_rewards"])
    advantages, returns = gae(rewards, values, mask, inputs["gamma"], inputs["gae_lambda"])
    close(advantages, PPO["advantages"])
    close(returns, PPO["returns"])
    whitened = whiten(advantages, mask)
    close(whitened, PPO["normalised_advantages"])
    new, critic = given("new_logps", dtype, grad=True), given("new_values", dtype, grad=True)
    policy_loss = ppo_clip(new, old, whitened, mask, inputs["clip"]).mean()
    assert policy_loss.item() == pytest.approx(PPO["policy_loss"], rel=1e-9 if dtype == torch.float64 else 1e-5)
    close(gradients(policy_loss, new)[0], PPO["grad_new_logps_batch"])
    value_loss = value_clip(critic, values, returns, mask, inputs["value_clip"]).mean()
    assert value_loss.item() == pytest.approx(PPO["value_loss"], rel=1e-9 if dtype == torch.float64 else 1e-5)
    close(gradients(value_loss, critic)[0], PPO["grad_new_values_batch"])


def test_the_kl_in_the_reward_is_that_of_the_recorded_numbers():
    mask, zeros = given("action_mask"), tensor([0.0, 0.0, 0.0])
    close(
        token_rewards(zeros, given("old_logps"), given("ref_logps"), mask, kl_coef=1.0),
        (-tensor(PPO["kl_k1"])).tolist(),
    )


def test_gae_by_hand():
    # gamma .5, lam .5, rewards 1 2, values 3 4: delta_1 = 2 - 4 = -2, delta_0 = 1 + .5 * 4 - 3 = 0, A_0 = 0 + .25 * -2.
    advantages, returns = gae(tensor([[1.0, 2.0]]), tensor([[3.0, 4.0]]), tensor([[1, 1]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.5, -2.0]]
    assert returns.tolist() == [[2.5, 2.0]]


def test_gae_at_its_ends():
    """lam = 1 gives the return less the value; lam = 0 the one-step error."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64).unbind()
    mask = torch.ones(3, 6)
    monte_carlo, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_come, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(monte_carlo, to_come - values, rtol=1e-12, atol=1e-12)
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(one_step, rewards + 0.9 * after - values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("filler", [NAN, math.inf, 1e30])
@pytest.mark.parametrize("mask", [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
def test_masked_tokens_are_stepped_over_and_never_read(mask, filler):
    kept = [place for place, one in enumerate(mask) if one]
    short = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    long = torch.full((4, 1, 6), filler, dtype=torch.float64)
    long[:, :, kept] = short
    flags, ones = torch.tensor([mask]), torch.ones(1, 3)
    for whole, alone in zip(gae(*long[:2], flags, 0.9, 0.8), gae(*short[:2], ones, 0.9, 0.8), strict=True):
        torch.testing.assert_close(whole[:, kept], alone, rtol=1e-12, atol=1e-12)
        assert whole[flags == 0].abs().max() == 0
    for loss in (ppo_clip, value_clip):
        new_long, new_short = long[0].clone().requires_grad_(), short[0].clone().requires_grad_()
        whole, alone = loss(new_long, *long[1:3], flags, 0.2), loss(new_short, *short[1:3], ones, 0.2)
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
        on_long, on_short = gradients(whole, new_long)[0], gradients(alone, new_short)[0]
        torch.testing.assert_close(on_long[:, kept], on_short, rtol=1e-12, atol=1e-12)
        assert on_long[flags == 0].abs().max() == 0
    torch.testing.assert_close(whiten(long[0], flags)[:, kept], whiten(short[0], ones), rtol=1e-12, atol=1e-12)
    scores = tensor([2.0])
    whole = token_rewards(scores, long[0], long[1], flags, kl_coef=0.1)
    torch.testing.assert_close(whole[:, kept], token_rewards(scores, short[0], short[1], ones, kl_coef=0.1))


def test_a_sequence_without_tokens_gives_nought():
    nothing, mask = torch.full((1, 3), NAN), torch.zeros(1, 3)
    new = nothing.clone().requires_grad_()
    for loss in (ppo_clip(new, nothing, nothing, mask, 0.2), value_clip(new, nothing, nothing, mask, 0.2)):
        assert loss.tolist() == [0.0]
        assert gradients(loss, new)[0].tolist() == [[0.0, 0.0, 0.0]]
    assert token_rewards(torch.ones(1), nothing, nothing, mask, kl_coef=0.1).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(nothing, mask).tolist() == [[0.0, 0.0, 0.0]]


def test_clipping_by_hand():
    # Ratios 2 and .5 with clip .2: for A = 1 min(2, 1.2) and min(.5, .8); for A = -1 min(-2, -1.2) and min(-.5, -.8).
    log_ratio = math.log(2)
    new = tensor([[log_ratio, -log_ratio], [log_ratio, -log_ratio]], grad=True)
    losses = ppo_clip(
        new, torch.zeros(2, 2, dtype=torch.float64), tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.ones(2, 2), 0.2
    )
    assert losses.tolist() == pytest.approx([-(1.2 + 0.5) / 2, (2 + 0.8) / 2])
    # The gradient is -ratio A / 2 where the unclipped side counts, else 0.
    assert gradients(losses, new)[0].flatten().tolist() == pytest.approx([0.0, -0.25, 1.0, 0.0])


def test_value_clipping_by_hand():
    # old 0, clip 1, return 3: V = 2 is read as 1 too; (2 - 3)^2 = 1, (1 - 3)^2 = 4: 4 / 2, without a gradient.
    # V = -2 is read as -1 too; 25 against 16: 25 / 2, gradient V - R = -5.
    new = tensor([[2.0], [-2.0]], grad=True)
    losses = value_clip(new, torch.zeros(2, 1, dtype=torch.float64), tensor([[3.0], [3.0]]), torch.ones(2, 1), 1.0)
    assert losses.tolist() == [2.0, 12.5]
    assert gradients(losses, new)[0].tolist() == [[0.0], [-5.0]]


def test_a_huge_ratio_keeps_the_gradient_finite():
    new = torch.tensor([[500.0, 500.0]], requires_grad=True)
    losses = ppo_clip(new, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 0.2)
    assert torch.isfinite(losses).all() and torch.isfinite(gradients(losses, new)[0]).all()


def test_whitening_is_that_of_all_processes_together():
    """Two processes with unequal shares, in lockstep, get the rows of one."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    kept = values[mask == 1]
    expected = torch.where(mask == 1, (values - kept.mean()) / kept.std(correction=0), 0.0)
    torch.testing.assert_close(whiten(values, mask), expected, rtol=1e-12, atol=1e-12)
    # What the other process adds to the two sums that this one asks for.
    mine, others = slice(0, 3), slice(3, 6)
    theirs = values[others][mask[others] == 1]
    sums = iter([tensor([len(theirs), theirs.sum()]), (theirs - kept.mean()).square().sum().reshape(1)])
    shared = whiten(values[mine], mask[mine], lambda own: own + next(sums))
    torch.testing.assert_close(shared, expected[mine], rtol=1e-12, atol=1e-12)


def test_equal_values_are_whitened_to_nought():
    assert whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)).abs().max() == 0


# MDPO.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MDPO["sample"], ids=lambda case: f"t{case['t_k']}")
def test_samples_against_the_recorded_numbers(case, dtype):
    policy, old, advantages = (
        tensor(case[name], dtype, grad=name == "policy_logps") for name in ("policy_logps", "old_logps", "advantages")
    )
    losses = mdpo(policy, old, advantages, case["t_k"])
    close(losses, case["loss"])
    close(gradients(losses, policy)[0], case["grad_policy_logps"])
    plain = mdpo(policy, old, torch.zeros_like(advantages), 1.0)
    close(plain, case["kl_estimate"])


@pytest.mark.parametrize("case", MDPO["exact"], ids=lambda case: f"t{case['t_k']}")
def test_the_expectation_is_the_objective(case):
    logits, old, advantages = tensor(case["logits"], grad=True), tensor(case["pi_k"]).log(), tensor(case["advantage"])
    total = (old.exp() * mdpo(logits.log_softmax(0), old, advantages, case["t_k"])).sum()
    assert -total.item() == pytest.approx(case["objective"], rel=1e-9)
    close(-gradients(total, logits)[0], case["grad_logits_of_objective"])
    divergence = (old.exp() * mdpo(logits.log_softmax(0), old, torch.zeros_like(advantages), 1.0)).sum()
    assert divergence.item() == pytest.approx(case["kl_pi_pik"], rel=1e-9)


@pytest.mark.parametrize("case", MDPO["exact"], ids=lambda case: f"t{case['t_k']}")
def test_at_the_old_policy_it_is_the_plain_policy_gradient(case):
    logits, old = tensor(case["pi_k"]).log().requires_grad_(), tensor(case["pi_k"]).log()
    total = (old.exp() * mdpo(logits.log_softmax(0), old, tensor(case["advantage"]), case["t_k"])).sum()
    close(-gradients(total, logits)[0], case["grad_at_pi_k (== plain policy gradient)"])


@pytest.mark.parametrize("case", MDPO["exact"], ids=lambda case: f"t{case['t_k']}")
def test_many_steps_reach_the_closed_form(case):
    """pi_k exp(t A), normalised."""
    old, advantages = tensor(case["pi_k"]).log(), tensor(case["advantage"])
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = (old.exp() * mdpo(logits.log_softmax(0), old, advantages, case["t_k"])).sum()
        total.backward()
        return total

    optimizer.step(closure)
    torch.testing.assert_close(
        logits.softmax(0).detach(), tensor(case["closed_form_next_policy"]), rtol=1e-4, atol=1e-6
    )


def test_far_away_it_still_pulls_back():
    policy = torch.tensor([100.0, -100.0], requires_grad=True)
    losses = mdpo(policy, torch.zeros(2), torch.tensor([1.0, 1.0]), 0.5)
    (gradient,) = gradients(losses, policy)
    assert torch.isfinite(losses).all() and gradient[0] > 0 and torch.isfinite(gradient).all()


def test_the_step_size_falls_linearly_to_its_floor():
    schedule = MDPO["step_size_schedule"]
    found = [annealed_step_size(k, schedule["K"], floor=1e-6) for k in range(schedule["K"])]
    assert found == pytest.approx(schedule["t_k = 1 - k/K"])
    assert [1 / t for t in found] == pytest.approx(schedule["kl_coefficient 1/t_k"])
    assert annealed_step_size(99, 100) == 0.05
    with pytest.raises(ValueError, match=r"^iteration must lie in \[0, 5\), got 5\.$"):
        annealed_step_size(5, 5)


# Bad input.


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: gae(x, x, torch.ones(2, 2), 1.0, 1.0),
            r"mask must have the shape of rewards, \(2, 3\), got \(2, 2\)",
        ),
        (lambda x: gae(x, x[:1], torch.ones(2, 3), 1.0, 1.0), "values must have the shape of rewards"),
        (lambda x: gae(x, x, torch.ones(2, 3), 1.1, 1.0), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda x: gae(x, x, torch.ones(2, 3), 1.0, 2), r"lam must lie in \[0, 1\], got 2"),
        (lambda x: ppo_clip(x, x, x, torch.ones(2, 3), 0.0), "clip must be a finite number above 0"),
        (lambda x: value_clip(x, x, x.double(), torch.ones(2, 3), 0.2), "returns must have the dtype of new"),
        (lambda x: token_rewards(x, x, x, torch.ones(2, 3), kl_coef=0.1), r"rewards must have shape \(2,\)"),
        (lambda x: mdpo(x[0], x[0], x[0], 0.0), "step_size must be a finite number above 0"),
        (lambda x: mdpo(x, x, x, 1.0), r"policy must have shape \(N,\), got \(2, 3\)"),
    ],
)
def test_what_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(2, 3))
