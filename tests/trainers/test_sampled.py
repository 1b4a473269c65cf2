"""What the on-policy trainers share: the rollout in groups, its scores, rewards, weights; resuming; bad input."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from llmalign.errors import UserError
from llmalign.trainers.mdpo import MDPOTrainer
from llmalign.trainers.rollouts import groups_of
from llmalign.trainers.sampled_configs import MDPOConfig
from tests.slow import all_but
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny

METHODS = sorted(runs.METHODS)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def perturbed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return other


@pytest.mark.parametrize("method", METHODS)
def test_every_score_is_its_model_s_own(method, tmp_path):
    start = tiny.model()
    trainer = runs.build(method, tmp_path, model=copy.deepcopy(start), steps_per_generation=2)
    trainer.start_may_differ = "the test moves the policy"
    trainer.model.load_state_dict(perturbed(start).state_dict(), strict=False)  # a value head is the method's own
    batch = runs.rollout(trainer)
    with torch.no_grad():
        scores = trainer.rollout_scores(trainer.model, batch)
    groups = groups_of(batch)
    assert scores.policy.shape == (2, 4) and [len(group) for group in groups.completions] == [4, 4]
    assert len({tuple(p) for p in groups.prompts}) == 2  # two prompts, each with its whole group
    for row, (prompt, completions) in enumerate(zip(groups.prompts, groups.completions, strict=True)):
        for place, completion in enumerate(completions):
            for name, model, wanted in (
                ("policy", trainer.model, True),
                ("old", trainer.model, trainer.needs_proposal),
                ("reference", start, trainer.needs_reference),
            ):
                token_logps = getattr(scores, f"token_{name}")[row, place]
                expected = runs.independent_logps(model, prompt, completion) if wanted else torch.zeros(len(completion))
                assert torch.allclose(token_logps[: len(completion)].double(), expected.double(), atol=1e-4), name
                assert not token_logps[len(completion) :].any()
    assert torch.allclose(scores.policy, (scores.token_policy * scores.token_mask).sum(2))


def test_scores_are_those_of_sampling_at_the_temperature(tmp_path):
    start = tiny.model()
    trainer = runs.build("mdpo", tmp_path, model=copy.deepcopy(start), temperature=0.7)
    batch = runs.rollout(trainer)
    prompt, completion = groups_of(batch).sequences()[0]
    with torch.no_grad():
        logits = start(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    expected = torch.log_softmax(logits / 0.7, -1)[torch.arange(len(completion)), torch.tensor(completion)]
    for name in ("token_old", "token_reference"):
        assert torch.allclose(batch[name][0, 0, : len(completion)].double(), expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_rewards_stay_with_their_completions_through_the_shuffle(method, tmp_path):
    trainer = runs.build(method, tmp_path, steps_per_generation=3)
    batch = runs.rollout(trainer)
    for row, completions in enumerate(groups_of(batch).completions):
        texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        expected = torch.tensor(runs.checksum(None, texts))
        assert torch.allclose(batch["rewards"][row], expected)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_equals_one_batch(method, tmp_path):
    whole = runs.build(method, tmp_path / "a", record=True)
    parts = runs.build(
        method, tmp_path / "b", record=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    whole.train()
    parts.train()
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-4, abs=1e-6)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("method", all_but(["mdpo", "pf_ppo-model"], METHODS))
def test_resumed_anywhere_it_ends_at_the_same_weights(method, tmp_path):
    """Steps 3 and 5 lie inside a rollout of two steps; the epoch has 6 steps, so 9 lies in the second."""
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = runs.build(method, tmp_path, **options)
    whole.train()
    assert runs.digest(whole.model) != runs.digest(tiny.model())
    for step in (3, 6, 9):
        resumed = runs.build(method, tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert runs.digest(resumed.model) == runs.digest(whole.model), step


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_without_its_rollout_is_refused(method, tmp_path):
    runs.build(method, tmp_path, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "rollout_0.pt").unlink()
    with pytest.raises(UserError, match="rollout_0.pt"):
        runs.build(method, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_row_whose_reward_fails_is_masked_and_named(tmp_path, caplog):
    calls = []

    def fails_once(prompts, completions, **columns):
        calls.append(len(prompts))
        if any(text == completions[-1] for text in completions) and len(prompts) == 1 and len(calls) == 3:
            raise ValueError("no such thing")
        if len(prompts) > 1:
            raise ValueError("a row is bad")
        return [1.0]

    trainer = runs.build("mdpo", tmp_path, reward=fails_once)
    batch = runs.rollout(trainer)
    assert batch["mask"].sum() == batch["mask"].numel() - 1
    assert torch.isclose(batch["weights"].mean(), torch.tensor(1.0)) and not batch["weights"][~batch["mask"]].any()
    assert "no such thing" in caplog.text and "row_id" in caplog.text
    loss = trainer.compute_loss(trainer.model, batch)
    assert math.isfinite(loss.item())


def test_a_reward_that_fails_on_every_row_of_several_prompts_stops_the_run(tmp_path):
    trainer = runs.build("mdpo", tmp_path, reward=lambda **columns: 1 / 0)
    with pytest.raises(UserError, match="fails on all 8 rows of a rollout; the first is row 0 .*ZeroDivisionError"):
        runs.rollout(trainer)


def test_rewards_that_are_never_there_are_said_and_shares_of_failed_rows_logged(tmp_path, caplog):
    def never(prompts, **columns):
        return [None] * len(prompts)

    def sometimes(prompts, completions, **columns):
        return [float("nan") if index == 0 else 1.0 for index, _ in enumerate(prompts)]

    runs.build("mdpo", tmp_path, reward=never).train()
    assert caplog.text.count("No completion of this rollout has a reward") == 1
    trainer = runs.build("mdpo", tmp_path, reward=sometimes)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/sometimes/failed"] == 1 / 8


def test_one_bad_prompt_alone_on_a_device_costs_itself_only(tmp_path):
    trainer = runs.build("mdpo", tmp_path, reward=lambda **columns: 1 / 0, per_device_train_batch_size=4)
    batch = runs.rollout(trainer)
    assert not batch["mask"].any() and trainer.compute_loss(trainer.model, batch).item() == 0


def test_equal_rewards_move_nothing_however_they_are_rounded(tmp_path):
    """0.9 is no binary fraction: the mean of three of them differs from it in float32."""
    trainer = runs.build(
        "mdpo", tmp_path, reward=lambda prompts, **columns: [0.9] * len(prompts), num_generations=3,
        per_device_train_batch_size=9, per_device_eval_batch_size=9,
    )  # fmt: skip
    assert not runs.rollout(trainer)["advantages"].any()


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("fdpg")])  # it refuses them
def test_truncated_completions_that_are_masked_count_nowhere(method, tmp_path):
    found = []
    for bonus in (0.0, 50.0):

        def reward(prompts, completions, completion_ids, bonus=bonus, **columns):
            own = runs.checksum(prompts, completions)
            return [one + bonus * (ids[-1] != 1) for one, ids in zip(own, completion_ids, strict=True)]

        trainer = runs.build(method, tmp_path, reward=reward, record=True, mask_truncated_completions=True)
        batch = runs.rollout(trainer)
        cut = ~batch["completion_mask"].bool().any(dim=2)
        assert cut.any() and not cut.all()
        assert not batch["mask"][cut].any()
        found.append((batch["rewards"], trainer.compute_loss(trainer.model, batch)))
    assert not torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_sampling_in_parts_draws_for_every_prompt_in_its_place(tmp_path):
    trainer = runs.build("mdpo", tmp_path, sampling_batch_size=3)
    seen = []

    def echo(input_ids, **kwargs):
        """The prompt again, and how many have been sampled before."""
        before = sum(map(len, seen))
        seen.append(input_ids)
        count = torch.arange(before, before + len(input_ids))[:, None] + 10
        return torch.cat(
            [input_ids, input_ids, count, torch.full_like(count, trainer.processing_class.eos_token_id)], dim=1
        )

    trainer.model.generate = echo
    groups = groups_of(runs.rollout(trainer))
    assert [len(part) for part in seen] == [3, 3, 2]
    numbers = [completion[-2] for completions in groups.completions for completion in completions]
    assert sorted(numbers) == list(range(10, 18))
    for prompt, completions in zip(groups.prompts, groups.completions, strict=True):
        assert all(completion[-2 - len(prompt) : -2] == prompt for completion in completions)


def test_fewer_prompts_than_a_rollout_are_refused(tmp_path):
    with pytest.raises(UserError, match="a rollout takes 2 prompts and the training data has 1"):
        runs.build("mdpo", tmp_path, data=runs.prompts(1))


def test_what_was_refused_leaves_the_config_as_it_was(tmp_path):
    args = MDPOConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | {"reward_weights": [1.0, 2.0]}))
    given = {"train_dataset": runs.prompts(), "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match="reward weights"):
        MDPOTrainer(tiny.model(), runs.checksum, args, **given)
    assert args.beta == 0.05


def test_evaluation_leaves_training_s_random_numbers_alone_and_repeats_itself(tmp_path):
    trainer = runs.build("mdpo", tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = trainer.evaluate(eval_dataset=runs.prompts(6))
    assert torch.equal(torch.rand(1), expected)
    second = trainer.evaluate(eval_dataset=runs.prompts(6))
    assert first["eval_reward"] == second["eval_reward"] and math.isfinite(first["eval_entropy"])


def test_metrics_weigh_every_completion_the_same(tmp_path):
    trainer = runs.build("mdpo", tmp_path)
    trainer.model.train()
    for values, weights in (([1.0, 2.0], [1.0, 1.0]), ([7.0, 9.0], [1.0, 0.0])):
        trainer.note({"mine": (torch.tensor(values), torch.tensor(weights))})
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert logs["mine"] == pytest.approx(10 / 3)


def test_a_model_that_would_draw_from_another_distribution_is_refused(tmp_path):
    model = tiny.model()
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UserError, match="no_repeat_ngram_size=3"):
        runs.build("mdpo", tmp_path, model=model)
    runs.build("mdpo", tmp_path, model=model, generation_kwargs={"no_repeat_ngram_size": 3})


def test_without_beta_there_is_no_reference(tmp_path):
    trainer = runs.build("mdpo", tmp_path, beta=0.0)
    trainer.train()
    assert "kl_to_reference" not in trainer.state.log_history[0]
    assert not trainer._buffered_inputs[0]["token_reference"].any()


def test_the_best_checkpoint_is_picked_by_reward(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 3}
    data = {"one": runs.prompts(4), "two": runs.prompts(3)}
    trainer = runs.build("mdpo", tmp_path, evaluation=data, **options)
    trainer.train()
    measured = [entry["eval_one_reward"] for entry in trainer.state.log_history if "eval_one_reward" in entry]
    assert len(measured) == 3 and trainer.state.best_metric == max(measured)


def test_lora_s_reference_is_the_model_without_its_adapter(tmp_path):
    start = tiny.model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = runs.build("mdpo", tmp_path, model=copy.deepcopy(start), peft=lora, max_steps=4, learning_rate=0.05)
    trainer.train()
    assert trainer.ref_model is None
    batch = runs.rollout(trainer)
    prompt, completion = groups_of(batch).sequences()[1]
    expected = runs.independent_logps(start, prompt, completion)
    assert torch.allclose(batch["token_reference"][0, 1, : len(completion)].double(), expected, atol=1e-4)
    assert not torch.allclose(batch["token_old"][0, 1, : len(completion)].double(), expected, atol=1e-2)


def test_evaluation_samples_and_scores(tmp_path):
    trainer = runs.build("mdpo", tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(eval_dataset=runs.prompts(6))
    assert math.isfinite(metrics["eval_loss"]) and "eval_reward" in trainer.state.log_history[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"per_device_train_batch_size": 6}, "multiple of num_generations"),
        ({"num_iterations": 1}, "plain policy gradient"),
        ({"use_transformers_continuous_batching": True}, "continuous"),
        ({"num_generations": 0}, "num_generations must be at least 2"),
        ({"per_device_eval_batch_size": 6}, "per_device_eval_batch_size"),
        ({"num_iterations": 3, "gradient_accumulation_steps": 12, "steps_per_generation": 4}, "num_iterations"),
        ({"generation_kwargs": {"temperature": 0.7}}, "set temperature itself"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "steps",
                "metric_for_best_model": "eval_loss",
            },
            "set metric_for_best_model: reward",
        ),
        ({"scoring": "quick"}, "scoring must be"),
        ({"epsilon": 0.5}, "not honoured"),
        ({"step_size_floor": 2.0}, "at most step_size"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_bad_values_are_refused(options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        MDPOConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | {"num_iterations": 2} | options))
