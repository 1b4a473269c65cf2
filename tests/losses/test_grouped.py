"""CoPG: recorded numbers, numbers worked out by hand, and the properties its paper proves."""

import pytest
import torch

from llmalign.losses import copg, ipo
from llmalign.types import GroupScores, PairScores
from tests.losses.loss_helpers import DTYPES, VECTORS, assert_recorded, gradients, tensor

RECORDED = VECTORS["copg"]
BETAS = [case["beta"] for case in RECORDED["k"]]
NOTHING = float("nan")


def recorded_group(rows: list[int], dtype: torch.dtype = torch.float64) -> GroupScores:
    """One prompt with the completions ``rows`` of the recorded four."""
    given = RECORDED["inputs"]
    policy, reference, rewards = (
        tensor([[given[name][row] for row in rows]], dtype) for name in ("policy_logps", "ref_logps", "rewards")
    )
    return GroupScores(policy.requires_grad_(), reference, rewards)


def random_group(prompts: int = 3, completions: int = 5, seed: int = 0) -> GroupScores:
    generator = torch.Generator().manual_seed(seed)
    policy, reference, rewards = torch.randn(3, prompts, completions, generator=generator, dtype=torch.float64).unbind()
    return GroupScores((policy * 4).requires_grad_(), reference * 4, rewards)


def leave_one_out_advantage(scores: GroupScores, beta: float) -> torch.Tensor:
    """R_beta of each completion less the mean R_beta of the others of its prompt, counted out one by one."""
    shaped = (scores.rewards - beta * (scores.policy - scores.reference)).tolist()
    return tensor([[value - (sum(row) - value) / (len(row) - 1) for value in row] for row in shaped])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RECORDED["pair"], ids=lambda case: f"beta{case['beta']}")
def test_pairs_against_the_recorded_numbers(case, dtype):
    for pair in case["pairs"]:
        scores = recorded_group([pair["i"], pair["j"]], dtype)
        losses = copg(scores, beta=case["beta"])
        assert_recorded(losses, [pair["loss"]], dtype)
        (on_policy,) = gradients(losses, scores.policy)
        assert_recorded(on_policy[0], [pair["grad_i"], pair["grad_j"]], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RECORDED["k"], ids=lambda case: f"beta{case['beta']}")
def test_four_completions_against_the_recorded_numbers(case, dtype):
    scores, beta = recorded_group([0, 1, 2, 3], dtype), case["beta"]
    losses = copg(scores, beta=beta)
    (on_policy,) = gradients(losses, scores.policy)
    assert_recorded(losses, [case["loss"]], dtype)
    assert_recorded(on_policy[0], case["grad_policy_logps"], dtype)
    assert_recorded(-on_policy[0], case["rloo_advantage"], dtype)
    # The squared form 1/(k-1) sum (R_beta,i - R_beta,j)^2 has the same gradient but for its scale.
    assert_recorded(2 * beta * on_policy[0], case["squared_form_grad"], dtype)


def test_rewards_of_a_quarter_make_it_ipo():
    case = RECORDED["ipo_special_case"]
    policy, reference = recorded_group([0, 1]).policy, recorded_group([0, 1]).reference
    ours = copg(GroupScores(policy, reference, tensor([[0.25, -0.25]])), beta=case["beta"])
    theirs = ipo(PairScores(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]), tau=case["beta"])
    on_ours, on_theirs = gradients(ours, policy)[0], gradients(theirs, policy)[0]
    assert theirs.item() == pytest.approx(case["ipo_loss"], rel=1e-9)
    assert on_theirs[0, 0].item() == pytest.approx(case["ipo_grad_i"], rel=1e-9)
    assert on_ours[0, 0].item() == pytest.approx(case["copg_grad_i"], rel=1e-9)
    torch.testing.assert_close(on_ours, case["beta"] / 2 * on_theirs, rtol=1e-9, atol=1e-14)


def test_three_completions_by_hand():
    # rho = (1, 0, -1), R = (3, 0, 1), beta 1. Pairs -(dR - drho/2) drho:
    #   01: dR 3, drho 1: -(3 - .5) * 1 = -2.5;  02: dR 2, drho 2: -(2 - 1) * 2 = -2;  12: dR -1, drho 1: +1.5
    # Sum -3, over k - 1 = 2: -1.5. R_beta = R - rho = (2, 0, 2): advantages 2 - 1 = 1, 0 - 2, 2 - 1.
    policy = tensor([[-4.0, -6.0, -9.0]], grad=True)
    losses = copg(GroupScores(policy, tensor([[-5.0, -6.0, -8.0]]), tensor([[3.0, 0.0, 1.0]])), beta=1.0)
    assert losses.tolist() == [-1.5]
    assert gradients(losses, policy)[0].tolist() == [[-1.0, 2.0, -1.0]]


def test_two_completions_by_hand():
    # drho = 3 - 1 = 2, dR = 5 - 4 = 1, beta .5: -(1 - .25 * 2) * 2 = -1; gradient -(1 - .5 * 2) = 0, the optimum,
    # where the loss is its floor -dR^2 / (2 beta).
    policy = tensor([[3.0, 1.0]], grad=True)
    losses = copg(GroupScores(policy, tensor([[0.0, 0.0]]), tensor([[5.0, 4.0]])), beta=0.5)
    assert losses.tolist() == [-1.0]
    assert gradients(losses, policy)[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_leave_one_out_advantage(beta):
    scores = random_group()
    (on_policy,) = gradients(copg(scores, beta=beta), scores.policy)
    torch.testing.assert_close(-on_policy, leave_one_out_advantage(scores, beta), rtol=1e-9, atol=1e-12)


def test_the_sum_of_all_pairs_over_k_less_one():
    scores, beta = random_group(), 0.3
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(5):
        for j in range(i):
            pair = GroupScores(scores.policy[:, [i, j]], scores.reference[:, [i, j]], scores.rewards[:, [i, j]])
            total += copg(pair, beta=beta).detach()
    torch.testing.assert_close(copg(scores, beta=beta).detach(), total / 4, rtol=1e-9, atol=1e-12)


def test_the_order_of_completions_and_prompts_does_not_matter():
    scores, order = random_group(), torch.tensor([4, 2, 0, 1, 3])
    moved = GroupScores(scores.policy[:, order], scores.reference[:, order], scores.rewards[:, order])
    losses, shuffled = copg(scores, beta=0.3), copg(moved, beta=0.3)
    torch.testing.assert_close(shuffled, losses, rtol=1e-12, atol=1e-12)
    turned = GroupScores(scores.policy.flip(0), scores.reference.flip(0), scores.rewards.flip(0))
    torch.testing.assert_close(copg(turned, beta=0.3), losses.flip(0), rtol=1e-12, atol=1e-12)


def test_a_constant_added_to_every_reward_changes_nothing():
    scores = random_group()
    richer = GroupScores(scores.policy, scores.reference, scores.rewards + 7)
    torch.testing.assert_close(copg(richer, beta=0.3), copg(scores, beta=0.3), rtol=1e-9, atol=1e-9)


def test_tied_rewards_pull_to_the_reference():
    # beta/2 drho^2 with drho = 3 and beta .4: .2 * 9, slope beta drho = 1.2
    policy = tensor([[3.0, 0.0]], grad=True)
    losses = copg(GroupScores(policy, torch.zeros_like(policy), torch.ones_like(policy)), beta=0.4)
    assert losses.tolist() == pytest.approx([1.8])
    assert gradients(losses, policy)[0].tolist() == [pytest.approx([1.2, -1.2])]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("filler", [NOTHING, float("inf"), -float("inf"), 1e30])
def test_what_is_masked_is_never_read(filler, dtype):
    policy = tensor([[-3.0, filler, -5.0, -4.0], [filler, -2.0, filler, -1.0]], grad=True)
    reference = tensor([[-3.5, filler, -4.0, -4.5], [filler, -2.5, filler, -0.5]])
    rewards = tensor([[1.0, filler, 0.0, 2.0], [filler, 1.0, filler, -1.0]])
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=dtype)
    losses = copg(GroupScores(policy, reference, rewards, mask), beta=0.3)
    (on_policy,) = gradients(losses, policy)
    assert on_policy[mask == 0].tolist() == [0.0, 0.0, 0.0]
    for row, kept in enumerate(([0, 2, 3], [1, 3])):
        alone = policy.detach()[row : row + 1, kept].requires_grad_()
        whole = GroupScores(alone, reference[row : row + 1, kept], rewards[row : row + 1, kept])
        expected = copg(whole, beta=0.3)
        torch.testing.assert_close(losses[row : row + 1], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(on_policy[row, kept], gradients(expected, alone)[0][0], rtol=1e-12, atol=1e-12)


def test_fewer_than_two_completions_give_nought():
    policy = tensor([[-3.0, NOTHING, 5.0], [NOTHING, NOTHING, NOTHING], [-1.0, -2.0, -3.0]], grad=True)
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    losses = copg(GroupScores(policy, torch.zeros_like(policy), torch.ones_like(policy), mask), beta=0.3)
    (on_policy,) = gradients(losses, policy)
    assert losses[:2].tolist() == [0.0, 0.0]
    assert losses[2] != 0
    assert on_policy[:2].abs().max() == 0
    single = tensor([[-3.0]], grad=True)
    assert copg(GroupScores(single, single.detach(), tensor([[1.0]])), beta=0.3).tolist() == [0.0]


def test_gradients_are_those_of_finite_differences():
    scores = random_group()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda policy: copg(GroupScores(policy, scores.reference, scores.rewards, mask), beta=0.3), scores.policy
    )
