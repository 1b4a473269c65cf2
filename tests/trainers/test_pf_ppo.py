"""PF-PPO: what the filter leaves, PPO's numbers at the trainer, the optimizer they share, and what is refused."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from llmalign.errors import UserError
from llmalign.types import RolloutScores
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny

ROOT = Path(__file__).parents[2]
PPO = json.loads((ROOT / "tests/data/on-policy-losses.json").read_text())["pfppo"]["ppo"]


def tensor(name):
    return torch.tensor(PPO["inputs"][name], dtype=torch.float32)[None]


def expected(name):
    return torch.tensor(PPO[name], dtype=torch.float32)


def recorded_scores(policy, rewards=None):
    """One prompt with the oracle's three completions, as scores and as a rollout."""
    mask = tensor("action_mask")
    sums = {name: (tensor(f"{name}_logps") * mask).sum(2) for name in ("old", "ref")}
    scores = RolloutScores(
        policy=(policy * mask).sum(2),
        proposal=sums["old"],
        reference=sums["ref"],
        rewards=tensor("rm_score") if rewards is None else torch.tensor([rewards]),
        mask=torch.ones(1, 3, dtype=torch.bool),
        token_policy=policy,
        token_old=tensor("old_logps"),
        token_reference=tensor("ref_logps"),
        token_mask=mask.bool(),
    )
    ids = torch.ones(1, 3, 5, dtype=torch.long)
    prompt = torch.ones(1, 2, dtype=torch.long)
    rollout = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": ids, "completion_mask": mask.long()}
    return scores, rollout


def judged(trainer, policy, rewards=None):
    scores, rollout = recorded_scores(policy, rewards)
    trainer._sampled_values = tensor("old_values")
    return scores, rollout | trainer.judge(rollout, scores)


def test_ppo_s_numbers_are_the_oracle_s(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy="none", value_coef=0.5)
    policy, values = tensor("new_logps").requires_grad_(), tensor("new_values").requires_grad_()
    scores, rollout = judged(trainer, policy)
    assert torch.allclose(rollout["returns"][0], expected("returns"), atol=1e-6)
    assert torch.allclose(rollout["advantages"][0], expected("normalised_advantages"), atol=1e-5)
    trainer._values = values
    losses = trainer.rollout_loss(scores, rollout)
    assert losses.shape == (1, 3) and torch.equal(rollout["weights"], torch.ones(1, 3))
    total = (losses * rollout["weights"]).mean()
    assert total.item() == pytest.approx(PPO["policy_loss"] + 0.5 * PPO["value_loss"], rel=1e-5)
    total.backward()
    assert torch.allclose(policy.grad[0], expected("grad_new_logps_batch"), atol=1e-6)
    assert torch.allclose(values.grad[0], 0.5 * expected("grad_new_values_batch"), atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "rewards", "kept"),
    [
        ("none", [0.5, -2.0, 1.5], [1, 1, 1]),
        ("best_of_n", [0.5, -2.0, 1.5], [0, 0, 1]),
        ("best_worst", [0.5, -2.0, 1.5], [0, 1, 1]),
        ("best_worst", [1.0, 1.0, 1.0], [0, 0, 0]),  # no signal
    ],
)
def test_the_filter_s_choice_is_all_that_counts(strategy, rewards, kept, tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy=strategy)
    _, rollout = judged(trainer, tensor("new_logps"), rewards)
    assert torch.equal(rollout["weights"], torch.tensor([kept]) * 3 / max(sum(kept), 1))


@pytest.mark.parametrize(("whitening", "strategy"), [("after", "best_worst"), ("before", "best_worst")])
def test_whitening_before_and_after_the_filter(whitening, strategy, tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy=strategy, whitening=whitening, reward_clip=None)
    _, rollout = judged(trainer, tensor("new_logps"), [0.5, -2.0, 1.5])
    mask = tensor("action_mask").bool()
    read = mask & (rollout["weights"] > 0)[:, :, None] if whitening == "after" else mask
    values = rollout["advantages"][read]
    assert values.mean().abs() < 1e-6 and values.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    if whitening == "before":
        assert rollout["advantages"][0, 0].any()  # filtered out, and in the mean


def test_gae_has_the_config_s_discount_and_lambda(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy="none", gamma=0.9, gae_lambda=0.5, beta=0.2, reward_clip=1.0)
    _, rollout = judged(trainer, tensor("new_logps"))
    mask = tensor("action_mask")[0]
    for place in range(3):
        length = int(mask[place].sum())
        rewards = [-0.2 * gap for gap in (tensor("old_logps") - tensor("ref_logps"))[0, place, :length].tolist()]
        rewards[-1] += max(-1.0, min(1.0, tensor("rm_score")[0, place].item()))
        values = [*tensor("old_values")[0, place, :length].tolist(), 0.0]
        advantage = 0.0
        for t in reversed(range(length)):
            advantage = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.5 * advantage
            assert rollout["returns"][0, place, t].item() == pytest.approx(advantage + values[t], abs=1e-5)


def test_value_clip_is_the_config_s(tmp_path):
    losses = []
    for clip in (0.2, 1e3):
        trainer = runs.build("pf_ppo", tmp_path, strategy="none", value_clip=clip)
        _, rollout = judged(trainer, tensor("new_logps"))
        far = rollout["values"] + 0.9 * (rollout["returns"] - rollout["values"])  # clipped, it stays behind
        kept = tensor("action_mask").bool().flatten(0, 1)
        losses.append(trainer._value_loss(rollout, far, kept).sum().item())
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("selection", ["exact", "resample"])
def test_a_completion_without_a_reward_is_never_kept_and_in_no_statistic(selection, tmp_path):
    """Its place holds the highest number of all."""
    trainer = runs.build("pf_ppo", tmp_path, strategy="best_worst", whitening="before", selection=selection)
    found = []
    for number in (9.0, -9.0):
        scores, rollout = recorded_scores(tensor("new_logps"), [number, -2.0, 1.5])
        scores = dataclasses.replace(scores, mask=torch.tensor([[False, True, True]]))
        trainer._sampled_values = tensor("old_values")
        found.append(trainer.judge(rollout, scores))
    assert found[0]["weights"][0, 0] == 0 and found[0]["weights"][0, 1:].sum() > 0
    for name in ("weights", "advantages"):
        assert torch.equal(found[0][name][:, 1:], found[1][name][:, 1:]), name


def test_the_other_one_is_drawn_anew_for_each_prompt(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy="best_random")
    ids = torch.arange(40 * 2).view(40, 2) + 3
    completions = torch.ones(40, 4, 3, dtype=torch.long)
    rollout = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids)}
    rollout |= {"completion_ids": completions, "completion_mask": torch.ones_like(completions)}
    zeros = torch.zeros(40, 4, 3)
    scores = RolloutScores(
        policy=zeros.sum(2), proposal=zeros.sum(2), reference=zeros.sum(2), mask=torch.ones(40, 4, dtype=torch.bool),
        rewards=torch.tensor([3.0, 0.0, 1.0, 2.0]).expand(40, 4), token_policy=zeros, token_old=zeros,
        token_reference=zeros, token_mask=zeros == 0,
    )  # fmt: skip
    chosen = trainer._select(rollout, scores)
    assert chosen[:, 0].all() and (chosen.sum(1) == 2).all()
    assert (chosen[:, 1:].sum(0) > 4).all()  # of 40, 13 each


def test_resampling_counts_what_is_drawn_twice_twice(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy="best_worst", selection="resample", draws=5)
    _, rollout = judged(trainer, tensor("new_logps"), [0.5, -2.0, 1.5])
    counts = (rollout["weights"][0] / rollout["weights"].sum() * 5).round()
    assert counts.sum() == 5 and counts[0] == 0 and sorted(counts.tolist()) != [0, 2.5, 2.5]
    mask = tensor("action_mask")[0]
    weight = mask * counts[:, None]
    advantages = rollout["advantages"][0]
    mean = (advantages * weight).sum() / weight.sum()
    variance = (advantages.square() * weight).sum() / weight.sum()
    assert mean.abs() < 1e-5 and variance.item() == pytest.approx(1, abs=1e-4)


def test_group_advantages_are_taken_before_the_filter(tmp_path):
    """The first completion is filtered out, and in the baseline of the others all the same."""
    trainer = runs.build(
        "pf_ppo", tmp_path, advantage="group", critic_learning_rate=None, strategy="best_worst", whitening="before"
    )
    assert trainer.critic is None
    scores, rollout = judged(trainer, tensor("new_logps"), [0.5, -2.0, 1.5])
    log_ratios = [0.25, 0.35, -0.15]  # summed over the oracle's kl_k1
    rewards = [r - 0.01 * k for r, k in zip([0.5, -2.0, 1.5], log_ratios, strict=True)]
    raw = [rewards[i] - (sum(rewards) - rewards[i]) / 2 for i in range(3)]
    tokens = [raw[0]] * 4 + [raw[1]] * 5 + [raw[2]] * 2
    mean = sum(tokens) / 11
    deviation = math.sqrt(sum((value - mean) ** 2 for value in tokens) / 11)
    for place, value in enumerate(raw):
        assert rollout["advantages"][0, place, 0].item() == pytest.approx((value - mean) / deviation, abs=1e-5)
    assert rollout["weights"].tolist() == [[0, 1.5, 1.5]] and "values" not in rollout
    loss = trainer.rollout_loss(scores, rollout)
    assert loss[0, 0] == 0 and loss[0, 1:].all()


@pytest.mark.parametrize("method", ["pf_ppo", "pf_ppo-model"])
def test_what_is_filtered_out_moves_no_weight(method, tmp_path):
    gradients = []
    for poison in (False, True):
        trainer = runs.build(method, tmp_path, record=True, strategy="best_worst", max_grad_norm=0)
        batch = runs.rollout(trainer)
        out = batch["weights"] == 0
        assert 0 < out.sum() < out.numel()
        if poison:
            for name in ("advantages", "values", "returns", "token_old"):
                batch[name] = batch[name].masked_fill(out[:, :, None], float("nan"))
            batch["rewards"] = batch["rewards"].masked_fill(out, float("nan"))
            batch["completion_ids"] = torch.where(out[:, :, None], 7, batch["completion_ids"])
        scores = trainer.rollout_scores(trainer.model, batch)
        losses = trainer.rollout_loss(scores, batch)
        ((losses * batch["weights"]).sum() / batch["weights"].numel()).backward()
        weights = [*trainer.model.parameters(), *trainer.critic.parameters()]
        gradients.append([weight.grad.clone() for weight in weights])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6), (one - other).abs().max()
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize(("method", "rate"), [("pf_ppo", 0.03), ("pf_ppo-model", 0.01)])
def test_the_critic_learns(method, rate, tmp_path):
    """The completions are the same at every step; what equal beginnings do not tell apart, no critic can explain."""
    trainer = runs.build(
        method, tmp_path, record=True, data=runs.prompts(2), learning_rate=3e-3, critic_learning_rate=rate,
        strategy="none", num_iterations=4, max_steps=48, value_clip=100.0, value_coef=1.0, beta=1e-4, gae_lambda=1.0,
        lr_scheduler_type="constant", logging_steps=4,
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "critic/explained_variance" in entry]
    explained = [entry["critic/explained_variance"] for entry in history]
    assert len(explained) == 12 and explained[0] < 0.1 and explained[-1] > 0.7, explained
    assert history[-1]["critic/value_loss"] < 0.2 * history[0]["critic/value_loss"]


@pytest.mark.parametrize("method", ["pf_ppo", "pf_ppo-model"])
def test_the_critic_has_its_own_rate_and_its_own_clipping(method, tmp_path):
    trainer = runs.build(method, tmp_path, learning_rate=2e-4, critic_learning_rate=3e-2, max_grad_norm=0.5)
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(10)
    own = {id(weight) for weight in trainer.critic.parameters()}
    places = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(places)
    assert {places[weight] for weight in own} == {3e-2}
    assert {rate for weight, rate in places.items() if weight not in own} == {2e-4}
    assert set(places) == own | {id(weight) for weight in trainer.model.parameters()}
    for weight in [*trainer.model.parameters(), *trainer.critic.parameters()]:
        weight.grad = torch.ones_like(weight)
    policy = [weight for weight in trainer.model.parameters() if id(weight) not in own]
    norm = trainer._clip_grad_norm(trainer.model)
    trainer._clip_as_measured(trainer.model)
    assert norm.item() == pytest.approx(math.sqrt(sum(weight.numel() for weight in policy)))
    for weights in (policy, trainer.critic.parameters()):
        total = torch.stack([weight.grad.norm() for weight in weights]).norm()
        assert total.item() == pytest.approx(0.5, rel=1e-4)


def test_gradients_of_a_critic_model_do_not_pile_up(tmp_path):
    trainer = runs.build("pf_ppo-model", tmp_path)
    trainer.train()
    assert all(weight.grad is None or not weight.grad.any() for weight in trainer.critic.parameters())


def test_an_optimizer_without_the_critic_is_refused(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path)
    trainer.optimizer = torch.optim.SGD([next(trainer.model.parameters())], lr=0.1)
    with pytest.raises(UserError, match="lacks the critic"):
        trainer.create_optimizer()


@pytest.mark.parametrize("method", ["pf_ppo", "pf_ppo-model", "pf_ppo-group"])
def test_lora_trains_resumes_and_keeps_its_reference(method, tmp_path):
    start = tiny.model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "learning_rate": 1e-2}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = runs.build(method, tmp_path, model=copy.deepcopy(start), peft=copy.deepcopy(lora), **options)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(runs.digest(trainer.model))
    assert ends[0] == ends[1]
    for name, weight in start.named_parameters():
        kept = dict(trainer.model.get_base_model().named_parameters())
        assert torch.equal(kept.get(name, kept.get(name.replace(".weight", ".base_layer.weight"))), weight)
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert trainer.ref_model is None


def test_the_log_says_what_the_filter_and_the_critic_do(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, record=True, strategy="best_worst")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kept"] == 0.5 and first["ratio"] == pytest.approx(1, abs=1e-5) and first["clip_fraction"] == 0
    assert first["critic/value"] == 0 and first["critic/explained_variance"] == 0
    for name in ("kl_to_sampler", "kl_per_token", "kl_to_reference", "critic/value_loss", "critic/clip_fraction"):
        assert math.isfinite(first[name])
    group = runs.build("pf_ppo-group", tmp_path)
    group.train()
    assert not any(name.startswith("critic") for name in group.state.log_history[0])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_ppo_takes_one_completion_a_prompt(accumulation, tmp_path):
    given = {"strategy": "none", "num_generations": 1, "per_device_train_batch_size": 12 // accumulation}
    trainer = runs.build(
        "pf_ppo", tmp_path, record=True, evaluation=runs.prompts(4), eval_strategy="steps", eval_steps=1,
        gradient_accumulation_steps=accumulation, **given,
    )  # fmt: skip
    assert trainer.args.num_generations == trainer.num_generations == trainer.num_generations_eval == 1
    start = runs.digest(trainer.model)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kept"] == 1 and first["ratio"] == pytest.approx(1, abs=1e-5)
    drawn = runs.rollout(trainer)
    assert len(drawn["prompt_ids"].unique(dim=0)) == len(drawn["prompt_ids"])
    assert runs.digest(trainer.model) != start and math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_without_a_reference_no_distance_from_it_is_logged(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, beta=0.0)
    trainer.train()
    assert not {"kl_per_token", "kl_to_reference"} & set(trainer.state.log_history[0])


def test_one_completion_in_evaluation_is_measured_whatever_the_filter(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, strategy="best_worst", num_generations_eval=1)
    metrics = trainer.evaluate(eval_dataset=runs.prompts(8))
    assert metrics["eval_kept"] == 1 and metrics["eval_loss"] != 0


def test_evaluation_reads_values_too(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(eval_dataset=runs.prompts(6))
    assert math.isfinite(metrics["eval_loss"]) and "eval_critic/value_loss" in trainer.state.log_history[-1]


def test_vllm_gets_the_model_s_own_weights_alone(tmp_path):
    class Engine:
        def __init__(self, model):
            self.model, self.sent = model, []

        def sync_weights(self):
            self.sent += [name for name, _ in self.model.named_parameters()]

    trainer = runs.build("pf_ppo", tmp_path)
    trainer.vllm_generation = engine = Engine(trainer.model)
    trainer._send_weights_without(trainer.critic)
    trainer.vllm_generation.sync_weights()
    assert engine.sent == [name for name, _ in tiny.model().named_parameters()]
