"""f-DPG's trainer: its gradient against finite differences, its targets, Z and the proposal."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from llmalign.errors import UserError
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.rollouts import groups_of
from tests.slow import all_but
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny
from tests.trainers.small_space import (
    SPACE,
    WANTED,
    all_logps,
    divergence_of,
    has_wanted,
    log_target,
    perturbed,
    small_model,
    small_trainer,
)


@pytest.mark.parametrize("proposal", ["online", "offline"])
@pytest.mark.parametrize(
    ("divergence", "target", "baseline", "floor"),
    [
        ("forward_kl", "pointwise", "one", None),
        ("forward_kl", "reward", "none", None),
        ("reverse_kl", "reward", "none", None),
        ("reverse_kl", "pointwise", "none", 0.2),
        ("js", "pointwise", "none", None),
        ("tv", "pointwise", "none", None),
        ("chi2_forward", "pointwise", "none", None),
        ("chi2_reverse", "reward", "none", None),
    ],
)
def test_expected_gradient_is_that_of_the_divergence(divergence, target, baseline, floor, proposal, tmp_path):
    """Over the whole space, each completion weighted by the probability with which the proposal draws it."""
    start = small_model()
    moved = perturbed(start)
    options = {"beta": 0.5} if target == "reward" else {"constraint_floor": floor}
    trainer = small_trainer(
        tmp_path, model=copy.deepcopy(start), divergence=divergence, target=target, baseline=baseline,
        proposal=proposal, **options,
    )  # fmt: skip
    trainer.start_may_differ = "the test moves the policy"
    trainer.model.load_state_dict(moved.state_dict())
    batch = runs.rollout(trainer)
    with torch.no_grad():
        base, policy = (all_logps(copy.deepcopy(model).double()) for model in (start, moved))
    q = policy if proposal == "online" else base
    assert torch.allclose((batch["token_old"] * batch["completion_mask"]).sum(2)[0].double(), q, atol=1e-5)
    wanted = log_target(base, target, floor)
    assert torch.allclose(batch["log_target"][0].double(), wanted, atol=1e-4)
    log_z = torch.logsumexp(wanted, 0)
    batch["weights"] = (q.exp() * len(SPACE)).float()[None]
    batch["log_z"] = log_z.float()[None]
    trainer.compute_loss(trainer.model, batch).backward()
    names = [name for name, _ in moved.named_parameters()]
    gradients = {name: trainer.model.get_parameter(name).grad.double() for name in names}
    for seed in range(3):  # along random directions
        generator = torch.Generator().manual_seed(seed)
        direction = {name: torch.randn(gradients[name].shape, generator=generator).double() for name in names}
        direction["model.embed_tokens.weight"][0] = 0.0  # torch gives the padding token's row no gradient
        values = []
        for sign in (1, -1):
            shifted = copy.deepcopy(moved).double()
            with torch.no_grad():
                for name in names:
                    shifted.get_parameter(name).add_(sign * 1e-4 * direction[name])
            values.append(divergence_of(shifted, wanted - log_z, divergence))
        expected = (values[0] - values[1]) / 2e-4
        found = sum(float((gradients[name] * direction[name]).sum()) for name in names)
        size = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3 * size)


@pytest.mark.parametrize("divergence", all_but(["forward_kl"], ["js", "forward_kl"]))
def test_it_reaches_a_constraint(divergence, tmp_path):
    """Completions are drawn; the share that holds the wanted token rises from a fifth to nearly all."""
    trainer = small_trainer(
        tmp_path, trainer=FDPGTrainer, rows=64, divergence=divergence, num_generations=64,
        per_device_train_batch_size=64, max_steps=60, learning_rate=0.02, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "satisfied" in entry]
    assert log[0]["satisfied"] < 0.5 and log[-1]["satisfied"] > 0.9
    with torch.no_grad():
        policy, base = all_logps(trainer.model), all_logps(small_model())
    target = log_target(base, "pointwise")
    p = torch.softmax(target, 0)
    assert float((policy.exp() - p).abs().sum() / 2) < 0.15
    assert log[-1]["log_z"] == pytest.approx(float(torch.logsumexp(target, 0)), abs=0.3)
    assert log[-1]["js"] < log[0]["js"] / 4 and "kl_pi_p" not in log[-1]


def test_metrics_are_those_of_the_space(tmp_path):
    """With the whole space weighted exactly, what is logged is what the definitions give."""
    trainer = small_trainer(tmp_path, target="reward", beta=0.5)
    start = small_model()
    batch = runs.rollout(trainer)
    moved = perturbed(start)
    trainer.model.load_state_dict(moved.state_dict())
    with torch.no_grad():
        base, pi = (all_logps(copy.deepcopy(model).double()) for model in (start, moved))
        wanted = log_target(base, "reward")
        batch["log_z"] = torch.logsumexp(wanted, 0).float()[None]
        metrics = trainer.rollout_metrics(trainer.rollout_scores(trainer.model, batch), batch)
    p = wanted - torch.logsumexp(wanted, 0)
    middle = torch.logaddexp(p, pi) - math.log(2)
    expected = {
        "kl_p_pi": (p.exp() * (p - pi)).sum(),
        "kl_pi_p": (pi.exp() * (pi - p)).sum(),
        "tv": (p.exp() - pi.exp()).abs().sum() / 2,
        "js": ((p.exp() * (p - middle)).sum() + (pi.exp() * (pi - middle)).sum()) / 2,
        "kl_pi_base": (pi.exp() * (pi - base)).sum(),
        "sequence_entropy": -(pi.exp() * pi).sum(),
        "ratio": torch.ones(()),
        "target_reward": sum(pi[i].exp() for i, completion in enumerate(SPACE) if WANTED in completion),
    }
    for name, value in expected.items():
        drawn = metrics[name][0][0]  # the proposal is the base: its expectation is the mean weighted with a
        assert float((base.exp() * drawn).sum()) == pytest.approx(float(value), rel=1e-3, abs=1e-4), name


def test_prompts_without_a_satisfying_completion_are_skipped(tmp_path):
    def by_prompt(prompts, completions, **columns):
        return [float(prompt.startswith("q6")) for prompt in prompts]

    trainer = runs.build("fdpg", tmp_path, reward=by_prompt, target="pointwise", beta=0.1, baseline="auto")
    batch = runs.rollout(trainer)
    alive = torch.tensor([trainer.processing_class.decode(ids)[-5:-3] == "q6" for ids in batch["prompt_ids"]])
    assert 0 < int(alive.sum()) < len(alive)
    assert torch.equal(batch["weights"] > 0, alive[:, None].expand(-1, 4))
    assert batch["weights"].mean() == pytest.approx(1.0)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert math.isfinite(loss.item())
    shared = runs.build("fdpg", tmp_path, reward=by_prompt, target="pointwise", beta=0.1, partition="shared")
    batch = runs.rollout(shared)
    assert len(set(batch["log_z"].tolist())) == 1


def test_a_completion_without_all_features_is_left_out(tmp_path):
    def sometimes(prompts, completions, completion_ids, **columns):
        return [None if len(ids) == 1 else 1.0 for ids in completion_ids]

    trainer = small_trainer(tmp_path, reward=[has_wanted, sometimes])
    batch = runs.rollout(trainer)
    assert batch["mask"][0].tolist() == [len(own) == 2 for own in SPACE]
    assert batch["weights"][0, 0] == 0 and batch["weights"].mean() == pytest.approx(1.0)
    possible = [i for i, own in enumerate(SPACE) if WANTED in own]
    assert (~batch["log_target"][0, 1:].isneginf()).nonzero().squeeze(1).add(1).tolist() == possible


def test_a_reward_target_needs_all_rewards_too_and_its_metrics_stay_finite(tmp_path):
    """Rewards this low have a log Z far below where its exponential is 0."""

    def low(prompts, completions, completion_ids, **columns):
        return [-100.0 - len(ids) for ids in completion_ids]

    def sometimes(prompts, completions, completion_ids, **columns):
        return [None if len(ids) == 1 else 0.0 for ids in completion_ids]

    trainer = small_trainer(tmp_path, reward=[low, sometimes], target="reward", beta=0.1)
    batch = runs.rollout(trainer)
    assert batch["mask"][0].tolist() == [len(own) == 2 for own in SPACE] and batch["log_z"][0] < -900
    metrics = trainer.rollout_metrics(trainer.rollout_scores(trainer.model, batch), batch)
    assert all(math.isfinite(float((value * weight).sum())) for value, weight in metrics.values())


def test_the_divergence_from_the_reference_is_the_policy_s_whoever_sampled(tmp_path):
    trainer = small_trainer(tmp_path, target="reward", beta=1.0)
    trainer.start_may_differ = "the test moves the policy"
    batch = runs.rollout(trainer)
    with torch.no_grad():
        base = all_logps(trainer.model).double()
        for weight in trainer.model.parameters():
            weight.mul_(1.3)
        policy = all_logps(trainer.model).double()
    trainer.compute_loss(trainer.model, batch)
    total, weight = trainer._noted["train"]["kl_to_reference"]
    # Every completion stands there once instead of as often as the base draws it.
    own = (policy - base).exp()
    assert total / weight == pytest.approx(float((own * (policy - base)).sum() / own.sum()), rel=1e-4)


def test_what_the_target_cannot_hold_is_named_with_its_prompt(tmp_path):
    def huge(prompts, completions, **columns):
        return [1e38] * len(prompts)

    with pytest.raises(UserError, match="a completion of 'w2 w3' is inf.*a reward over beta"):
        runs.rollout(small_trainer(tmp_path, reward=huge, target="reward", beta=0.05))


def test_evaluation_leaves_the_running_estimates_alone(tmp_path):
    trainer = runs.build("fdpg", tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    trainer.train()
    before = copy.deepcopy((trainer.partition.state_dict(), trainer.window.state_dict()))
    metrics = trainer.evaluate(eval_dataset=runs.prompts(6))
    assert math.isfinite(metrics["eval_loss"])
    assert (trainer.partition.state_dict(), trainer.window.state_dict()) == before
    assert "eval_self_bleu" in trainer.state.log_history[-1] and "eval_js" in trainer.state.log_history[-1]


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("peft", [None, LORA], ids=["model", "adapter"])
def test_offline_samples_from_the_copy_until_it_is_replaced(peft, tmp_path):
    trainer = runs.build(
        "fdpg", tmp_path, proposal="offline", proposal_update_interval=1, learning_rate=0.05 if peft else 1e-3,
        max_steps=1, baseline="auto", peft=LoraConfig(**peft) if peft else None,
    )  # fmt: skip
    start = tiny.model()
    trainer.train()
    batch = runs.rollout(trainer)
    groups = groups_of(batch)
    prompt, completion = groups.sequences()[1]
    drawn = batch["token_old"][0, 1, : len(completion)].double()
    assert torch.allclose(drawn, runs.independent_logps(start, prompt, completion), atol=1e-4)
    assert not torch.allclose(drawn, runs.independent_logps(trainer.model, prompt, completion), atol=1e-2)
    scores = trainer.rollout_scores(trainer.model, batch)
    weight = torch.ones_like(scores.mask)
    for towards, replaced in ((scores.policy, True), (2 * scores.proposal - scores.policy, False)):
        trainer._looked_at_step = -10
        before = [value.clone() for _, value, _ in trainer._parameters()]
        # all of p where the policy (or its mirror image) puts more than the copy
        log_p = torch.where(towards > scores.proposal, scores.proposal, torch.tensor(-torch.inf)).detach()
        trainer.look_at_proposal(batch, scores, log_p, weight)
        same = all(torch.equal(value, old) for (_, value, _), old in zip(trainer._parameters(), before, strict=True))
        assert same is not replaced
        for (_, value, _), old in zip(trainer._parameters(), before, strict=True):
            value.data.copy_(old)


@pytest.mark.parametrize("peft", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["model", "adapter"])
def test_offline_resumes_to_the_same_weights(peft, tmp_path):
    options = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "proposal": "offline",
        "proposal_update_interval": 2, "learning_rate": 1e-2 if peft else 2e-4,
    }  # fmt: skip

    def build():
        return runs.build("fdpg", tmp_path, peft=LoraConfig(**peft) if peft else None, **options)

    whole = build()
    whole.train()
    replaced = [entry.get("proposal/replaced") for entry in whole.state.log_history]
    assert 1.0 in replaced  # else the copy's weights are the start's, and their file is not tested
    for step in (4, 7):
        resumed = build()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert runs.digest(resumed.model) == runs.digest(whole.model), step
    (tmp_path / "checkpoint-4" / "proposal.safetensors").unlink()
    with pytest.raises(UserError, match="proposal.safetensors"):
        build().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
