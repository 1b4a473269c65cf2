"""CoPG on sampled completions: the offline trainer's loss and gradient, and the replay of earlier rollouts."""

import copy

import pytest
import torch

from llmalign import losses
from llmalign.errors import UserError
from llmalign.trainers.replay import ReplayBuffer, joined
from llmalign.trainers.rollouts import groups_of
from llmalign.trainers.sampled_configs import OnlineCoPGConfig
from llmalign.types import GroupScores
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny


def test_loss_and_gradient_are_the_grouped_loss_of_each_completion_alone(tmp_path):
    start = tiny.model()
    trainer = runs.build("copg", tmp_path, model=copy.deepcopy(start), beta=0.5)
    trainer.start_may_differ = "the test moves the policy"
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    batch = runs.rollout(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    # In float64, since float32 rounds this gradient by as much as it differs from the trainer's.
    alone, start = copy.deepcopy(trainer.model).double(), start.double()
    alone.zero_grad()
    groups = groups_of(batch)

    def logps(model):
        rows = [
            torch.log_softmax(model(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1].double(), -1)[
                torch.arange(len(c)), torch.tensor(c)
            ].sum()
            for p, c in groups.sequences()
        ]
        return torch.stack(rows).view(-1, 4)

    with torch.no_grad():
        reference = logps(start)
    scores = GroupScores(logps(alone), reference, batch["rewards"].double())
    expected = losses.copg(scores, beta=0.5).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(trainer.model.parameters(), alone.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        assert torch.allclose(one.grad.double(), other.grad, rtol=0, atol=1e-5 * scale)


def test_means_of_the_policy_leave_out_what_is_replayed_and_what_has_no_score(tmp_path):
    trainer = runs.build("copg-replay", tmp_path, max_steps=2)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    scores = trainer.rollout_scores(trainer.model, batch)
    fresh = batch["fresh"].bool()
    assert 0 < fresh.sum() < len(fresh)
    weights = trainer.policy_weights(scores, batch)
    assert torch.equal(weights.any(dim=1), fresh) and not torch.equal(weights, scores.mask)
    batch["mask"] = batch["mask"].clone()
    batch["mask"][0] = False
    metrics = trainer.rollout_metrics(trainer.rollout_scores(trainer.model, batch), batch)
    assert all(metrics[name][1][0] == 0 for name in ("drift/chosen", "drift/mean", "residual"))


def test_replayed_prompts_are_earlier_ones_with_the_scores_they_had(tmp_path):
    trainer = runs.build("copg-replay", tmp_path, max_steps=3)
    seen = []
    original = trainer.judge
    trainer.judge = lambda rollout, scores: seen.append(rollout) or original(rollout, scores)
    trainer.train()
    sizes = [len(rollout["rewards"]) for rollout in seen]
    assert sizes == [2, 4, 6]  # 2 fresh, and as many earlier ones as there are, up to 6
    earlier = {
        (tuple(prompt), tuple(completion)): (reward, reference)
        for rollout in seen[:2]
        for prompt, completions, rewards, references in zip(
            groups_of(rollout).prompts, groups_of(rollout).completions, rollout["rewards"],
            rollout["token_reference"].sum(2), strict=True,
        )
        for completion, reward, reference in zip(completions, rewards.tolist(), references.tolist(), strict=True)
    }  # fmt: skip
    last = seen[2]
    for row in range(2, 6):
        prompt, completions = groups_of(last).prompts[row], groups_of(last).completions[row]
        for place, completion in enumerate(completions):
            reward, reference = earlier[tuple(prompt), tuple(completion)]
            assert last["rewards"][row, place].item() == reward
            assert last["token_reference"][row, place].sum().item() == pytest.approx(reference, rel=1e-6)


def test_the_oldest_leave_a_full_buffer():
    buffer = ReplayBuffer(3)
    for number in range(5):
        buffer.add(
            {
                "prompt_ids": torch.tensor([[0, number]]),
                "prompt_mask": torch.tensor([[0, 1]]),
                "completion_ids": torch.tensor([[[7, number, 0], [8, 0, 0]]]),
                "completion_mask": torch.tensor([[[1, 1, 0], [1, 0, 0]]]),
                "rewards": torch.tensor([[1.0, number]]),
            }  # fmt: skip
        )
    assert sorted(row["rewards"][1].item() for row in buffer.draw(3)) == [2, 3, 4]
    assert buffer.draw(1)[0]["prompt_ids"].shape == (1,) and buffer.draw(1)[0]["completion_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="4 prompts were asked for and 3"):
        buffer.draw(4)


def test_joined_rows_keep_their_tokens_whatever_the_padding():
    buffer = ReplayBuffer(3)
    short = {
        "prompt_ids": torch.tensor([[5]]), "prompt_mask": torch.tensor([[1]]),
        "completion_ids": torch.tensor([[[6, 7], [8, 0]]]), "completion_mask": torch.tensor([[[1, 1], [1, 0]]]),
        "rewards": torch.tensor([[1.0, 2.0]]),
    }  # fmt: skip
    buffer.add(short)
    longer = {
        "prompt_ids": torch.tensor([[0, 1, 2]]), "prompt_mask": torch.tensor([[0, 1, 1]]),
        "completion_ids": torch.tensor([[[3, 4, 5], [9, 9, 9]]]), "completion_mask": torch.ones(1, 2, 3).long(),
        "rewards": torch.tensor([[3.0, 4.0]]),
    }  # fmt: skip
    both = joined(longer, buffer.draw(1))
    groups = groups_of(both)
    assert groups.prompts == [[1, 2], [5]]
    assert groups.completions == [[[3, 4, 5], [9, 9, 9]], [[6, 7], [8]]]
    assert both["rewards"].tolist() == [[3, 4], [1, 2]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replay_prompts": 3, "steps_per_generation": 2}, "multiple of steps_per_generation"),
        ({"replay_prompts": 8, "replay_capacity": 4}, "at most replay_capacity"),
        ({"normalize_rewards": "dataset"}, "none or group"),
        ({"replay_prompts": -1}, "zero or more"),
    ],
)
def test_bad_values_are_refused(options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        OnlineCoPGConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | options))
