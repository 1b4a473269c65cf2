"""CoPG's trainer: groups of unequal size, rewards normalised or not, and its logged residual."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmalign import CoPGConfig, CoPGTrainer
from llmalign.data.collators import GroupCollator
from llmalign.errors import UserError
from llmalign.scores import sequence_logps
from tests.trainers import tiny

COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, "save_strategy": "no", "logging_steps": 1,
    "report_to": "none", "disable_tqdm": True, "max_length": 96, "alarm_prompts": 0, "beta": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"), seed=0)


def build(start, folder, data=None, **options):
    return CoPGTrainer(
        model=start,
        args=CoPGConfig(output_dir=str(folder), **(COMMON | options)),
        train_dataset=data if data is not None else tiny.groups(8),
        eval_dataset=tiny.groups(5, seed=9),
        processing_class=tiny.tokenizer(),
    )


def batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_loss_gradient_and_residual_on_unequal_groups(start, tmp_path):
    """Per completion the gradient is -(R_beta - mean of the others' R_beta), averaged over the prompts."""
    trainer = build(start, tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(0.05 * torch.randn_like(trainer.model.lm_head.weight))
    trainer.start_may_differ = "the test moved the policy"
    inputs = batch(trainer)
    scores = trainer.scores(trainer.model, inputs)
    kept = {row["row_id"]: row for row in trainer.train_dataset}
    reference = AutoModelForCausalLM.from_pretrained(start)
    residuals, expected = [], 0.0
    for place, row_id in enumerate(inputs["row_id"].tolist()):
        row = kept[row_id]
        sequences = [(row["prompt_ids"], ids) for ids in row["completion_ids"]]
        policy = sequence_logps(trainer.model, sequences, pad_token_id=0)
        rho = policy - sequence_logps(reference, sequences, pad_token_id=0)
        k = len(sequences)
        assert scores.mask[place].tolist() == [True] * k + [False] * (scores.mask.shape[1] - k)
        torch.testing.assert_close(scores.policy[place, :k].detach(), policy, rtol=0, atol=1e-4)
        rewards = torch.tensor(row["rewards"])
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        deltas = [(rewards[i] - rewards[j], rho[i] - rho[j]) for i, j in pairs]
        expected += sum(-(dr - 0.25 * dp) * dp for dr, dp in deltas) / (k - 1)
        residuals.append(sum(abs(dr - 0.5 * dp) for dr, dp in deltas) / len(pairs))
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item() / 4, abs=1e-3)
    logged = trainer.row_metrics(scores, inputs)["residual"]
    torch.testing.assert_close(logged.detach(), torch.stack(residuals), rtol=0, atol=1e-3)


def test_training_shrinks_the_residual(start, tmp_path):
    trainer = build(start, tmp_path, data=tiny.groups(4, seed=1), max_steps=60, learning_rate=3e-3)
    trainer.train()
    history = [entry["residual"] for entry in trainer.state.log_history if "residual" in entry]
    assert history[-1] < 0.5 * history[0]
    assert trainer.state.log_history[-2]["rewards/accuracies"] > 0.9
    assert 0 <= trainer.evaluate()["eval_rewards/accuracies"] <= 1


def test_rewards_normalised_in_their_group(start, tmp_path):
    trainer = build(start, tmp_path, normalize_rewards="group")
    scores = trainer.scores(trainer.model, batch(trainer))
    for rewards, mask in zip(scores.rewards, scores.mask, strict=True):
        assert rewards[mask].mean().item() == pytest.approx(0, abs=1e-6)
        assert rewards[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert (scores.rewards[~scores.mask] == 0).all()
    flat = trainer._normalised(torch.full((1, 3), 7.0), torch.ones(1, 3, dtype=torch.bool))
    assert flat.tolist() == [[0.0, 0.0, 0.0]]


def test_rewards_normalised_over_the_training_set(start, tmp_path):
    trainer = build(start, tmp_path, normalize_rewards="dataset")
    rewards = torch.tensor([r for row in tiny.groups(8)["rewards"] for r in row])
    assert (trainer.reward_mean, trainer.reward_std) == pytest.approx((rewards.mean().item(), rewards.std().item()))


def test_equal_rewards_cannot_be_normalised(start, tmp_path):
    rows = [{"prompt": "q", "completions": ["a", "b"], "rewards": [1.0, 1.0]}] * 2
    with pytest.raises(UserError, match="all rewards are equal"):
        build(start, tmp_path, data=tiny.Dataset.from_list(rows), normalize_rewards="dataset")


def test_conversational_groups_share_their_prompt(start, tmp_path):
    reply = [[{"role": "assistant", "content": text}] for text in ("yes", "no", "well")]
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "completions": reply, "rewards": [1.0, 0.0, 0.5]}] * 4
    trainer = build(start, tmp_path, data=tiny.Dataset.from_list(rows), max_steps=1)
    row = trainer.train_dataset[0]
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(row["prompt_ids"]) == "<|user|>hi<|assistant|>"
    assert [tokenizer.decode(ids) for ids in row["completion_ids"]] == ["yes<|end|>", "no<|end|>", "well<|end|>"]
    trainer.train()


ONE = {"prompt": "q", "completions": ["alone"], "rewards": [0.5]}
NONE = {"prompt": "q", "completions": [], "rewards": []}


def test_a_row_with_one_completion_counts_in_the_loss_and_not_in_the_residual(start, tmp_path):
    """Its loss is 0, so the mean over rows is smaller; no pair of its own has a residual."""
    two, both = tiny.groups(3, seed=3), tiny.Dataset.from_list([*tiny.groups(3, seed=3), ONE])
    logged = []
    for name, data in (("two", two), ("both", both)):
        trainer = build(start, tmp_path / name, data=data, max_steps=1, normalize_rewards="group")
        assert trainer.evaluate(data)["eval_residual"] == pytest.approx(trainer.evaluate(two)["eval_residual"])
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[1]["residual"] == pytest.approx(logged[0]["residual"], rel=1e-5)
    assert logged[1]["grad_norm"] == pytest.approx(0.75 * logged[0]["grad_norm"], rel=1e-4)
    assert not any(value != value for value in logged[1].values() if isinstance(value, float))


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_without_completions_is_named(start, tmp_path, stream):
    data = tiny.Dataset.from_list([*tiny.groups(3), NONE])
    with pytest.raises(UserError, match="Row 3 of train has no completions"):
        trainer = build(start, tmp_path, data=data.to_iterable_dataset() if stream else data)
        list(trainer.train_dataset)
    ids = {"row_id": 7, "prompt_ids": [5], "completion_ids": [], "rewards": []}
    with pytest.raises(UserError, match="Row 7 has no completions"):
        GroupCollator()([ids])
