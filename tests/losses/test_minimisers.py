"""What the losses are for: the policies that minimise them in expectation, on games and bandits solved exactly.

Both ``inpo`` and ``copg`` are quadratic in the log-probabilities, and in a tabular policy the normaliser cancels in
every difference: one Newton step from anywhere is the minimiser.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmalign.losses import copg, inpo, ipo
from llmalign.types import GroupScores, PairScores
from tests.losses.loss_helpers import VECTORS, tensor

GAME = VECTORS["inpo"]["exact_game"]
BANDIT = VECTORS["copg"]["bandit_exact"]
REWARDS, REFERENCE = tensor(BANDIT["R"]), tensor(BANDIT["pi_ref"])
SAMPLERS = torch.outer(tensor(BANDIT["mu1"]), tensor(BANDIT["mu2"]))


def minimiser(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The policy, as probabilities, that one Newton step of a quadratic objective in the logits reaches."""
    logits = start.log().requires_grad_()
    (slope,) = torch.autograd.grad(objective(logits), logits)
    curvature = torch.autograd.functional.hessian(objective, logits.detach())
    return (logits.detach() - torch.linalg.pinv(curvature) @ slope).softmax(0)


def every_pair(policy: Tensor, reference: Tensor, last: Tensor) -> PairScores:
    """All ordered pairs (a, b) of n actions, a in the place of the chosen: n*n rows."""
    first = torch.arange(len(policy)).repeat_interleave(len(policy))
    second = torch.arange(len(policy)).repeat(len(policy))
    return PairScores(policy[first], policy[second], reference[first], reference[second], last[first], last[second])


def expected_inpo(logits: Tensor, last: Tensor) -> Tensor:
    """INPO's loss over pairs drawn from ``last`` and labelled by the game's preference."""
    scores = every_pair(logits.log_softmax(0), tensor(GAME["pi_ref"]).log(), last.log())
    weights = torch.outer(last, last) * tensor(GAME["P"])
    return 2 * (weights.flatten() * inpo(scores, eta=GAME["eta"], tau=GAME["tau"])).sum()


def duality_gap(policy: Tensor) -> float:
    """What the best reply gains against ``policy``, twice, in the KL-regularised symmetric game."""
    reference, tau = tensor(GAME["pi_ref"]), GAME["tau"]
    wins = tensor(GAME["P"]) @ policy
    best = tau * torch.logsumexp(reference.log() + wins / tau, 0)
    drift = (policy * (policy / reference).log()).sum()
    return (2 * (best + tau * drift) - 1).item()


def test_minimising_inpo_round_by_round_walks_the_exact_iterates():
    iterates = [tensor(policy) for policy in GAME["pi_1_to_pi_9"]]
    policy = tensor(GAME["pi_ref"])
    for expected, gap in zip(iterates, GAME["duality_gap"], strict=True):
        torch.testing.assert_close(policy, expected, rtol=1e-8, atol=0)
        assert duality_gap(policy) == pytest.approx(gap, abs=1e-9)
        last = policy
        policy = minimiser(lambda logits, last=last: expected_inpo(logits, last), start=last)


def test_the_nash_policy_is_where_inpo_stays():
    nash = tensor(GAME["nash_policy"])
    torch.testing.assert_close(minimiser(lambda logits: expected_inpo(logits, nash), nash), nash, rtol=1e-8, atol=0)
    assert duality_gap(nash) == pytest.approx(0, abs=1e-12)


def expected_copg(logits: Tensor) -> Tensor:
    """CoPG's loss over pairs of arms, one from each sampler."""
    scores = every_pair(logits.log_softmax(0), REFERENCE.log(), REFERENCE.log())
    first = torch.stack([scores.chosen, scores.rejected], 1)
    second = torch.stack([scores.ref_chosen, scores.ref_rejected], 1)
    rewards = torch.cartesian_prod(REWARDS, REWARDS)
    return (SAMPLERS.flatten() * copg(GroupScores(first, second, rewards), beta=BANDIT["beta"])).sum()


def expected_ipo(logits: Tensor) -> Tensor:
    """IPO's loss over the same pairs, labelled by Bradley and Terry's model of the rewards."""
    scores = every_pair(logits.log_softmax(0), REFERENCE.log(), REFERENCE.log())
    wins = (REWARDS.unsqueeze(1) - REWARDS).sigmoid()
    either_way = SAMPLERS + SAMPLERS.T
    return ((either_way * wins).flatten() * ipo(scores, tau=BANDIT["beta"])).sum()


def regret(policy: Tensor) -> float:
    value = (policy * REWARDS).sum() - BANDIT["beta"] * (policy * (policy / REFERENCE).log()).sum()
    return BANDIT["J_pi_star"] - value.item()


def test_copg_finds_the_bandits_optimum_and_ipo_does_not():
    assert regret(REFERENCE) == pytest.approx(BANDIT["initial_regret"], rel=1e-9)
    optimum = minimiser(expected_copg, REFERENCE)
    torch.testing.assert_close(optimum, tensor(BANDIT["pi_star"]), rtol=1e-9, atol=0)
    assert regret(optimum) == pytest.approx(0, abs=1e-12)
    other = minimiser(expected_ipo, REFERENCE)
    torch.testing.assert_close(other, tensor(BANDIT["population_ipo_policy"]), rtol=1e-6, atol=0)
    assert regret(other) == pytest.approx(BANDIT["population_ipo_regret"], rel=1e-6)


@pytest.mark.parametrize(("objective", "name"), [(expected_copg, "copg"), (expected_ipo, "ipo")])
def test_regret_under_adam_falls_as_recorded(objective, name):
    recorded = VECTORS["copg"]["bandit_population_adam_regret"]["regret"][name]
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=1e-3)
    for step in range(1, 501):
        adam.zero_grad()
        objective(logits).backward()
        adam.step()
        if str(step) in recorded:
            assert regret(logits.detach().softmax(0)) == pytest.approx(recorded[str(step)], abs=1e-7), step
