"""Critics: values where they are read, the weights in a checkpoint, and what a critic of its own starts from."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from llmalign.errors import UserError
from llmalign.rewards.classifiers import set_statistics
from llmalign.rewards.functions import guard
from llmalign.rewards.model import ModelReward
from llmalign.trainers.critic import CRITIC_FILE, VALUE_HEAD, HeadCritic, ModelCritic, starting_point
from llmalign.trainers.rollouts import groups_of
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny


def saved_reward_model(folder) -> str:
    runs.reward_model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def states_before(model, prompt, completion):
    """The hidden states that predict each token of a completion, from a plain pass over it alone."""
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([prompt + completion]), use_cache=False).last_hidden_state
    return states[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("scoring", ["auto", "padded"])
@pytest.mark.parametrize("method", ["pf_ppo", "pf_ppo-model"])
def test_values_are_read_where_each_token_is_predicted(method, scoring, tmp_path):
    trainer = runs.build(method, tmp_path, scoring=scoring)
    if method == "pf_ppo":
        with torch.no_grad():
            trainer.critic.module.weight.normal_()
            trainer.critic.module.bias.fill_(0.3)
    batch = runs.rollout(trainer)
    with torch.no_grad():
        trainer.rollout_scores(trainer.model, batch)
    assert torch.allclose(batch["values"], trainer._values, atol=1e-5)  # nothing has been trained since
    groups = groups_of(batch)
    for row, (prompt, completions) in enumerate(zip(groups.prompts, groups.completions, strict=True)):
        for place, completion in enumerate(completions):
            if method == "pf_ppo":
                states = states_before(trainer.model, prompt, completion)
                expected = states @ trainer.critic.module.weight + trainer.critic.module.bias
            else:
                model = runs.reward_model()
                expected = model.score(states_before(model, prompt, completion))[:, 0]
            values = batch["values"][row, place]
            assert torch.allclose(values[: len(completion)], expected.detach(), atol=1e-4)
            assert not values[len(completion) :].any()


def test_a_model_s_values_have_its_rewards_scale(tmp_path):
    model = runs.reward_model()
    set_statistics(model.config, 0.5, 2.0)
    values = {}
    for normalize in (False, True):
        reward = ModelReward(model, tiny.tokenizer(), normalize=normalize)
        trainer = build_from(reward, tmp_path)
        assert isinstance(trainer.critic, ModelCritic)
        if not values:
            groups = groups_of(runs.rollout(trainer))
        values[normalize] = trainer.critic.values(groups).detach()
    assert torch.allclose(values[True], (values[False] - 0.5) / 2, atol=1e-6)
    assert values[False].abs().max() > 0.1


def test_a_critic_model_is_trained_in_float32_whatever_the_policy_is_held_in(tmp_path):
    """At the paper's rate a step is below half of bfloat16's spacing for most weights: it would not move them."""
    policy = tiny.model().to(torch.bfloat16)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = runs.build(
        "pf_ppo-model", tmp_path, model=policy, peft=adapter, bf16=True, critic_learning_rate=9e-6, max_steps=4
    )
    before = [weight.detach().clone() for weight in trainer.critic.parameters()]
    assert {weight.dtype for weight in before} == {torch.float32}
    trainer.train()
    moved = sum((now != then).sum().item() for now, then in zip(trainer.critic.parameters(), before, strict=True))
    assert moved > 0.5 * sum(weight.numel() for weight in before)


def test_values_under_autocast_keep_more_than_three_digits(tmp_path):
    for method in ("pf_ppo", "pf_ppo-model"):
        trainer = runs.build(method, tmp_path, bf16=True)
        if method == "pf_ppo":
            torch.nn.init.normal_(trainer.critic.module.weight)
        values = runs.rollout(trainer)["values"]
        assert values.any() and (values.to(torch.bfloat16).float() != values).any(), method


def test_checkpointing_switches_no_dropout_of_the_critic_on(tmp_path):
    model = runs.reward_model()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    reward = ModelReward(model, tiny.tokenizer())
    trainer = build_from(reward, tmp_path, gradient_checkpointing=True)
    groups = groups_of(runs.rollout(trainer))
    assert torch.equal(trainer.critic.values(groups), trainer.critic.values(groups))


def build_from(reward, folder, **options):
    trainer, config = runs.PFPPOTrainer, runs.PFPPOConfig
    args = config(output_dir=str(folder), use_cpu=True, **(runs.COMMON | {"critic": "model"} | options))
    return trainer(tiny.model(), reward, args, train_dataset=runs.prompts(), processing_class=tiny.tokenizer())


def test_the_reward_model_itself_is_not_trained(tmp_path):
    model = runs.reward_model()
    reward = ModelReward(model, tiny.tokenizer())
    before = copy.deepcopy(model.state_dict())
    trainer = build_from(reward, tmp_path, critic_learning_rate=1e-2)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(trainer.critic.module.classifier.score.weight, before["score.weight"])


def test_a_head_is_no_part_of_the_saved_model(tmp_path):
    trainer = runs.build("pf_ppo", tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        loaded, found = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values()), found
    for name, weight in trainer.model.named_parameters():
        if not name.startswith(VALUE_HEAD):
            assert torch.equal(dict(loaded.named_parameters())[name], weight)
    assert (tmp_path / "checkpoint-1" / CRITIC_FILE).is_file() and not (tmp_path / "final" / CRITIC_FILE).exists()


@pytest.mark.parametrize("method", ["pf_ppo", "pf_ppo-model"])
def test_weights_come_back_from_a_checkpoint(method, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = runs.build(method, tmp_path, **options)
    whole.train()
    resumed = runs.build(method, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in zip(whole.critic.parameters(), resumed.critic.parameters(), strict=True):
        assert torch.equal(one, other)
    start = runs.build(method, tmp_path)
    assert not any(map(torch.equal, whole.critic.parameters(), start.critic.parameters()))
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    assert (state.parent / CRITIC_FILE).stat().st_mtime_ns <= state.stat().st_mtime_ns


def test_a_checkpoint_without_its_critic_is_refused(tmp_path):
    runs.build("pf_ppo", tmp_path, save_strategy="steps", save_steps=1).train()
    other = runs.build("pf_ppo-model", tmp_path)
    with pytest.raises(UserError, match="another critic"):
        other.critic.load(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / CRITIC_FILE).unlink()
    with pytest.raises(UserError, match=CRITIC_FILE):
        runs.build("pf_ppo", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_set_aside_hides_the_head_and_puts_it_back():
    model = tiny.model()
    names = [name for name, _ in model.named_parameters()]
    critic = HeadCritic(model)
    assert [name for name, _ in model.named_parameters()] != names
    with pytest.raises(RuntimeError), critic.set_aside():
        assert [name for name, _ in model.named_parameters()] == names
        raise RuntimeError
    assert model.get_submodule(VALUE_HEAD) is critic.module


def test_a_head_computes_in_its_own_precision():
    head = HeadCritic(tiny.model()).module
    with torch.no_grad():
        head.weight.fill_(1.001)
    hidden = torch.full((1, 32), 1.003)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(head(hidden), torch.tensor([32 * 1.001 * 1.003]), rtol=1e-6)


class Options:
    critic_model_name_or_path = None
    trust_remote_code = False


def start(given=None, functions=(), tokenizer=None, path=None):
    args = Options()
    args.critic_model_name_or_path = path
    return starting_point(given, args, functions, tokenizer or tiny.tokenizer())


def test_it_starts_from_what_is_given_then_named_then_rewards(tmp_path):
    given, named, rewards = runs.reward_model(1), saved_reward_model(tmp_path), runs.reward_model(2)
    functions = [guard(len), guard(ModelReward(rewards, tiny.tokenizer()))]
    for found, expected in (
        (start(given, functions, path=named), given),
        (start(None, functions, path=named), runs.reward_model()),
        (start(None, functions), rewards),
    ):
        assert torch.equal(found.score.weight, expected.score.weight) and found is not expected


def test_what_cannot_be_a_critic_is_refused():
    several = runs.reward_model()
    several.config.num_labels = 2
    bert = BertForSequenceClassification(
        BertConfig(
            num_labels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=300
        )
    )
    longer = tiny.tokenizer()
    longer.add_tokens(["another"])
    reward = ModelReward(runs.reward_model(), tiny.tokenizer())
    for arguments, sentence in (
        ({}, "none is named"),
        ({"given": several}, "2 labels"),
        ({"given": bert}, "linear head"),
        ({"functions": [reward], "tokenizer": longer}, "another vocabulary"),
        ({"path": "no/such/place"}, "no/such/place"),
    ):
        with pytest.raises(UserError, match=sentence):
            start(**arguments)


def test_a_resumed_critic_reads_as_the_run_began(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = runs.build("pf_ppo-model", tmp_path, **options)
    whole.critic.go_on_as("padding_free")
    whole.train()
    resumed = runs.build("pf_ppo-model", tmp_path, **options)
    assert resumed.critic.scorer.kind == "shared_prompt"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.critic.scorer.kind == "padding_free"
