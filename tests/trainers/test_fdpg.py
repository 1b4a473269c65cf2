"""f-DPG's trainer: its gradient against finite differences, its targets, Z, the proposal, and what it refuses."""

import copy
import math
from itertools import product

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmalign import losses
from llmalign.errors import UserError
from llmalign.rewards.targets import DistributionalTarget
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig
from llmalign.trainers.rollouts import groups_of
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny

# A space of 31 completions: the end at once, or one of five tokens and then one of six, with which it is cut.
END, WORDS = 1, 6
SPACE = [[END], *([first, second] for first, second in product(range(WORDS), repeat=2) if first != END)]
PROMPT = [2, 3]
WANTED = 4


def small_tokenizer():
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", unk_token="w0")


def small_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def has_wanted(prompts, completions, completion_ids, **columns):
    return [float(WANTED in ids) for ids in completion_ids]


def starts_low(prompts, completions, completion_ids, **columns):
    return [float(ids[0] < 3) for ids in completion_ids]


class WholeSpace(FDPGTrainer):
    """Draws every completion once."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [list(own) for own in SPACE]


def small_trainer(folder, reward=has_wanted, trainer=WholeSpace, model=None, rows=1, **options):
    given = {
        "num_generations": len(SPACE), "per_device_train_batch_size": len(SPACE), "max_completion_length": 2,
        "scoring": "padded", "max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    return trainer(
        model or small_model(),
        reward,
        FDPGConfig(output_dir=str(folder), use_cpu=True, **(given | options)),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * rows),
        processing_class=small_tokenizer(),
    )


def all_logps(model):
    """Log-probs (31,) of the whole space, from full logits in the model's own precision."""
    rows = []
    for completion in SPACE:
        logits = model(input_ids=torch.tensor([PROMPT + completion])).logits[0]
        logps = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
        rows.append(logps[torch.arange(len(completion)), torch.tensor(completion)].sum())
    return torch.stack(rows)


def perturbed(model, seed=1, size=0.1):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return other


def divergence_of(model, log_p, divergence):
    with torch.no_grad():
        return float(losses.exact_divergence(all_logps(model), log_p, divergence))


def log_target(base, kind, floor=None):
    satisfied = torch.tensor([WANTED in completion for completion in SPACE])
    if kind == "pointwise":
        outside = -torch.inf if floor is None else math.log(floor)
        return base + torch.where(satisfied, 0.0, outside)
    return base + satisfied.double() / 0.5


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


@pytest.mark.parametrize("divergence", ["js", "forward_kl"])
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


def test_lambda_is_fitted_reported_and_kept(tmp_path, caplog):
    caplog.set_level("INFO", logger="llmalign")
    options = {
        "reward": [has_wanted, starts_low], "trainer": FDPGTrainer, "target": "distributional", "moments": [0.5, 0.4],
        "moment_samples": 2000, "num_generations": 50, "per_device_train_batch_size": 100, "rows": 4,
    }  # fmt: skip
    trainer = small_trainer(tmp_path, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    report = trainer.moment_report
    assert report.samples == 2000 and report.reached == pytest.approx((0.5, 0.4), abs=1e-6)
    assert "Target: moments 0.5 (reached 0.5000" in caplog.text
    with torch.no_grad():
        base = all_logps(small_model().double())
    features = torch.tensor([[float(WANTED in c), float(c[0] < 3)] for c in SPACE]).double()
    p = torch.softmax(base + features @ torch.tensor(report.lambdas).double(), 0)
    assert (p @ features).tolist() == pytest.approx([0.5, 0.4], abs=0.05)  # lambda was solved on samples
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["moments/lambda_1"] == report.lambdas[1] and first["moments/newton_steps"] > 0
    assert "satisfied" not in first and "moment/has_wanted" in trainer.state.log_history[1]
    resumed = small_trainer(tmp_path, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.target.lambdas == list(report.lambdas) and resumed.moment_report is None


def test_lambda_counts_completions_of_another_model_by_their_weights(tmp_path):
    """The policy starts elsewhere than the base: the moments are still those of the base's tilt."""
    base, policy = small_model(), perturbed(small_model(), size=0.3)
    trainer = FDPGTrainer(
        policy,
        has_wanted,
        FDPGConfig(
            output_dir=str(tmp_path), use_cpu=True, target="distributional", moments=[0.6], moment_samples=6000,
            num_generations=100, per_device_train_batch_size=200, max_completion_length=2, scoring="padded",
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        ref_model=copy.deepcopy(base),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * 4),
        processing_class=small_tokenizer(),
    )  # fmt: skip
    runs.rollout(trainer)
    with torch.no_grad():
        logps = all_logps(base.double())
    share = float(sum(logps[i].exp() for i, completion in enumerate(SPACE) if WANTED in completion))
    exact = math.log(0.6 * (1 - share) / (0.4 * share))
    assert trainer.target.lambdas[0] == pytest.approx(exact, abs=0.15)


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


def test_moments_are_means_over_prompts(tmp_path):
    """Two prompts, of which one begins with the wanted feature nearly always and the other nearly never."""

    def by_prompt(prompts, completions, completion_ids, **columns):
        liked = {"w2 w3": {2}, "w4 w5": {0, 2, 3, 4, 5}}
        return [float(ids[0] in liked[prompt]) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    args = FDPGConfig(
        output_dir=str(tmp_path), use_cpu=True, target="distributional", moments=[0.7], moment_samples=8000,
        moment_samples_per_prompt=1000, num_generations=100, per_device_train_batch_size=200, max_completion_length=2,
        scoring="padded", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = FDPGTrainer(
        small_model(), by_prompt, args, processing_class=small_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in ("w2 w3", "w4 w5")]),
    )  # fmt: skip
    runs.rollout(trainer)
    assert trainer.moment_report.contexts == 2 and trainer.moment_report.samples == 8000
    model, means = small_model(), []
    for prompt, liked in (([2, 3], {2}), ([4, 5], {0, 2, 3, 4, 5})):
        logps = torch.stack([runs.independent_logps(model, prompt, own).sum() for own in SPACE])
        features = torch.tensor([float(own[0] in liked) for own in SPACE]).double()
        means.append(float((torch.softmax(logps + trainer.target.lambdas[0] * features, 0) * features).sum()))
    assert abs(means[0] - means[1]) > 0.1 and sum(means) / 2 == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(("groups", "prompts"), [(16, 4), (18, 4), (3, 1)])
def test_each_prompt_that_lambda_is_solved_on_has_its_completions(groups, prompts, tmp_path):
    trainer = runs.build("fdpg-moments", tmp_path, moment_samples_per_prompt=16)  # four groups of four
    drawn = [row["prompt"] for row in trainer._prompts_to_fit(groups)]
    counts = {prompt: drawn.count(prompt) for prompt in drawn}
    assert len(drawn) == groups and len(counts) == prompts and min(counts.values()) >= min(4, groups)


def test_too_few_completions_of_each_prompt_show(tmp_path, caplog):
    """The true moments are off on the other side by about as much as those of the halves."""
    caplog.set_level("WARNING", logger="llmalign")
    found = {}
    for each in (10, 1000):
        target, gaps = DistributionalTarget([0.5]), []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            features = (torch.rand(4000, generator=generator) < 0.1).double()
            report = target.fit(features, None, torch.arange(4000) // each)
            odds = 0.1 / 0.9 * math.exp(target.lambdas[0])
            gaps.append((odds / (1 + odds) - 0.5, report.biased))
        found[each] = [sum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    assert found[10][0] > 0.1 and found[10][1] > 0.05
    assert abs(found[1000][0]) < 0.02 and found[1000][1] < 0.01


def test_what_the_target_cannot_hold_is_named_with_its_prompt(tmp_path):
    def huge(prompts, completions, **columns):
        return [1e38] * len(prompts)

    with pytest.raises(UserError, match="a completion of 'w2 w3' is inf.*a reward over beta"):
        runs.rollout(small_trainer(tmp_path, reward=huge, target="reward", beta=0.05))


@pytest.mark.parametrize(
    ("named", "picks"), [(None, ("js", False)), ("kl_p_pi", ("kl_p_pi", False)), ("reward", ("reward", True))]
)
def test_the_best_checkpoint_is_the_nearest(named, picks, tmp_path):
    args = FDPGConfig(
        output_dir=str(tmp_path), use_cpu=True, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model=named, **(runs.COMMON | {"save_strategy": "steps", "save_steps": 1}),
    )  # fmt: skip
    assert (args.metric_for_best_model, args.greater_is_better) == picks


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


@pytest.mark.parametrize("peft", [None, LORA], ids=["model", "adapter"])
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"divergence": "reverse_kl"}, "reverse_kl is infinite on this target.*constraint_floor"),
        ({"divergence": "chi2_reverse", "target": "distributional", "moments": [1.0]}, "chi2_reverse is infinite"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl"),
        ({"target": "distributional"}, "needs moments"),
        ({"moments": [0.5]}, "moments=.* belongs to target: distributional"),
        ({"target": "distributional", "moments": 0.5}, "moments must be a list of numbers"),
        ({"target": "distributional", "moments": ["a"]}, "moments must be a list of numbers"),
        ({"moment_samples": 8}, "moment_samples=8 .* belongs to target: distributional"),
        ({"baseline_window": 8}, "baseline_window=8 .* belongs to baseline: window"),
        ({"proposal_update_interval": 8}, "proposal_update_interval=8 .* belongs to proposal: offline"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex constrains what is drawn"),
        ({"beta": 0.5}, "beta=0.5 .* belongs to target: reward"),
        ({"target": "reward", "constraint_floor": 1e-6}, "constraint_floor belongs to constraints"),
        ({"reward_weights": [2.0]}, "reward_weights=.* belongs to target: reward"),
        ({"target": "distributional", "moments": [0.5], "constraint_floor": 1e-6}, "no moment here is 0 or 1"),
        ({"constraint_floor": 2.0}, "floor must lie between"),
        ({"baseline": "one"}, "baseline: one"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"use_transformers_continuous_batching": True}, "refused on a CPU"),
        ({"temperature": 0.7}, "temperature must be 1"),
        ({"top_p": 0.9}, "top_p must be 1"),
        ({"top_k": 50}, "top_k must be 0"),
        ({"min_p": 0.1}, "min_p must be 0"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size is refused"),
        ({"mask_truncated_completions": True}, "not honoured"),
        ({"proposal": "offline", "use_vllm": True}, "cannot use vLLM"),
        ({"proposal": "sometimes"}, "proposal must be one of"),
        ({"max_z": -1.0}, "max_z must be a positive"),
        ({"moment_samples": 0}, "moment_samples must be a positive"),
    ],
)
def test_bad_values_are_refused(options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        FDPGConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | options))


@pytest.mark.parametrize(
    ("options", "baseline"),
    [
        ({"divergence": "forward_kl"}, "one"),
        ({"divergence": "js"}, "leave_one_out"),
        ({"divergence": "reverse_kl", "constraint_floor": 1e-6}, "leave_one_out"),
        ({"divergence": "reverse_kl", "target": "distributional", "moments": [0.5]}, "leave_one_out"),
        ({"divergence": "chi2_reverse", "target": "reward", "beta": 0.2, "reward_weights": [2.0]}, "leave_one_out"),
    ],
)
def test_good_values_pass(options, baseline, tmp_path):
    assert FDPGConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | options)).baseline == baseline


def test_moments_and_features_must_be_as_many(tmp_path):
    with pytest.raises(UserError, match="2 moments need as many reward_funcs"):
        small_trainer(tmp_path, target="distributional", moments=[0.5, 0.5])


def test_a_constraint_that_is_not_yes_or_no_is_refused(tmp_path):
    def half(prompts, completions, **columns):
        return [0.5] * len(prompts)

    with pytest.raises(UserError, match="a constraint is 0 or 1"):
        runs.rollout(small_trainer(tmp_path, reward=half))


def test_moments_that_no_completion_shows_are_refused(tmp_path):
    def never(prompts, completions, **columns):
        return [0.0] * len(prompts)

    options = {"trainer": FDPGTrainer, "target": "distributional", "moments": [0.5], "moment_samples": 100}
    with pytest.raises(UserError, match="moment 0.5 of feature 0 cannot be reached"):
        small_trainer(tmp_path, reward=never, **options).train()
