"""MDPO at the trainer: its advantages away from the reference, and the step size over a run."""

import pytest
import torch

from llmalign.types import RolloutScores
from tests.trainers import sampled_runs as runs


def scores_of(rewards, log_ratios):
    """Scores of completions with these rewards and log-ratios of the sampler to the reference, (P, K)."""
    rewards, log_ratios = torch.tensor(rewards), torch.tensor(log_ratios)
    zeros, tokens = torch.zeros_like(rewards), torch.zeros(*rewards.shape, 1)
    return RolloutScores(
        policy=log_ratios, proposal=log_ratios, reference=zeros, rewards=rewards, mask=torch.ones_like(rewards).bool(),
        token_policy=tokens, token_old=tokens, token_reference=tokens, token_mask=tokens == 0,
    )  # fmt: skip


def test_the_pull_to_the_reference_is_in_the_reward(tmp_path):
    """By hand: r - beta (log pi_k - log ref), against the mean of the others, over the rollout's deviation."""
    trainer = runs.build("mdpo", tmp_path, beta=0.5)
    found = trainer.judge({}, scores_of([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]], [[2.0, -2.0, 0.0], [0.0, 4.0, 2.0]]))
    # R = 0, 3, 3 and 0, -2, 2: less the mean of the other two -3, 1.5, 1.5 and 0, -3, 3; mean square 31.5 / 6.
    expected = torch.tensor([[-3.0, 1.5, 1.5], [0.0, -3.0, 3.0]]) / (31.5 / 6) ** 0.5
    assert torch.allclose(found["advantages"], expected, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_size_falls_once_a_rollout_from_the_first_to_the_floor(accumulation, tmp_path):
    trainer = runs.build(
        "mdpo", tmp_path, step_size=0.8, step_size_floor=0.3, num_iterations=2, max_steps=8, learning_rate=1e-5,
        gradient_accumulation_steps=accumulation, steps_per_generation=accumulation,
    )  # fmt: skip
    trainer.train()
    logged = [entry["step_size"] for entry in trainer.state.log_history if "step_size" in entry]
    # Four rollouts of two steps: t = .8 (1 - k / 4), never below .3.
    assert logged == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.3, 0.3])
