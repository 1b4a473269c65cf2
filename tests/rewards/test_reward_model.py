"""Rewards with a shared prompt, against the classifier's own forward one sequence at a time."""

import json
import logging
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from llmalign.errors import UserError
from llmalign.rewards import model as reward_module
from llmalign.rewards.classifiers import load_classifier, reward_statistics, set_statistics
from llmalign.rewards.model import ModelReward, RewardScorer, group_by_prompt, load_reward_model
from llmalign.types import PromptGroups
from tests.scores.test_proven import SMALL as BASE
from tests.scores.test_proven import ragged
from tests.trainers import tiny


def classifier(kind="llama", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **BASE | {"num_labels": 1} | options)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()


def own(model, sequences):
    """What the classifier itself says, one sequence at a time."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in sequences])


def joined(groups):
    return [prompt + completion for prompt, completion in groups.sequences()]


def tiny_classifier(seed=0, **options):
    torch.manual_seed(seed)
    known = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1,
        "bos_token_id": None, "initializer_range": 0.3, "num_labels": 1,
    }  # fmt: skip
    config = LlamaConfig(**known | options)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A reward model in a folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    tiny_classifier().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "options", "layout"),
    [
        ("llama", {}, "shared_prompt"),
        ("qwen2", {}, "shared_prompt"),
        ("mistral", {"sliding_window": 8}, "shared_prompt"),  # the batch is longer: padded, and right
        ("gemma3_text", {"sliding_window": 8}, "padded"),
    ],
)
def test_rewards_equal_the_classifier_s_own(kind, options, layout):
    model = classifier(kind, **options)
    groups = ragged()
    expected = own(model, joined(groups))
    scorer = RewardScorer(model, pad_token_id=0)
    assert scorer.kind == layout
    for _ in range(2):  # the first batch is scored both ways
        torch.testing.assert_close(scorer.rewards(groups), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01 and scorer.kind == layout


def test_a_head_of_another_kind_is_left_to_the_model_s_own_forward():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=97, num_labels=1, initializer_range=0.3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    scorer = RewardScorer(model, pad_token_id=0)
    assert scorer.kind == "padded"
    groups = ragged()
    torch.testing.assert_close(scorer.rewards(groups), own(model, joined(groups)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared_prompt", "padded"])
def test_the_read_position_is_the_classifier_s_where_pad_is_eos(kind):
    """TRL trains such a model at the token before the EOS; reading at the EOS would be another function."""
    model = classifier(pad_token_id=1)
    groups = PromptGroups([[5, 6, 7], [8, 1], [1]], [[[9, 10, 1], [11, 1, 1], [1]], [[1], [4]], [[1, 1]]])
    scorer = RewardScorer(model, pad_token_id=1)
    scorer.kind = kind
    expected = own(model, joined(groups))
    torch.testing.assert_close(scorer.rewards(groups), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], own(model, [[5, 6, 7, 9]])[0], atol=1e-3)


@pytest.mark.parametrize("budget", [1, 20, 10**6])
def test_any_budget_of_tokens_gives_the_same_rewards_in_the_same_order(budget):
    model = classifier()
    groups = PromptGroups([], [])
    for seed in range(5):
        more = ragged(seed)
        groups = PromptGroups(groups.prompts + more.prompts, groups.completions + more.completions)
    scorer = RewardScorer(model, pad_token_id=0)
    found = scorer.score(groups, tokens_per_batch=budget)
    torch.testing.assert_close(found, own(model, joined(groups)), rtol=1e-5, atol=1e-5)
    assert len(scorer.score(PromptGroups([], []))) == 0


def test_a_layout_that_disagrees_is_dropped_aloud(monkeypatch, caplog):
    model, groups = classifier(), ragged()
    expected = own(model, joined(groups))
    right = reward_module.lay_out_trees

    def shifted(*args, **kwargs):
        layout = right(*args, **kwargs)
        layout.inputs["position_ids"] += torch.arange(layout.inputs["position_ids"].shape[1]) % 2
        return layout

    monkeypatch.setattr(reward_module, "lay_out_trees", shifted)
    scorer = RewardScorer(model, pad_token_id=0)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(scorer.rewards(groups), expected, rtol=1e-5, atol=1e-5)
    assert scorer.kind == "padded" and "from padded rows on the first batch" in caplog.text


def test_bfloat16_is_held_to_its_own_noise(caplog):
    model = classifier(num_hidden_layers=4).to(torch.bfloat16)
    with caplog.at_level(logging.INFO):
        found = RewardScorer(model, pad_token_id=0).rewards(ragged())
    assert found.dtype == torch.float32
    exact = own(classifier(num_hidden_layers=4), joined(ragged()))
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_large_rewards_may_differ_by_what_float32_rounds():
    model = classifier()
    with torch.no_grad():
        model.score.weight.mul_(1e5)
    scorer = RewardScorer(model, pad_token_id=0)
    found = scorer.rewards(ragged())
    assert scorer.kind == "shared_prompt" and found.abs().max() > 1e3


def test_several_labels_are_refused():
    with pytest.raises(UserError, match="one number, this one has 3 labels"):
        RewardScorer(classifier(num_labels=3), pad_token_id=0)


def test_groups_share_what_their_tokens_share():
    keys = ["a", "b", "a", "a", "c", "c"]
    rows = [[1, 2, 3, 4], [9], [1, 2, 3], [1, 2, 5], [6, 7], [8, 7]]
    groups, order = group_by_prompt(keys, rows)
    assert groups.prompts == [[1, 2], [9], [6, 7], [8, 7]]  # those of c begin differently
    assert groups.completions == [[[3, 4], [3], [5]], [[]], [[]], [[]]]
    assert [rows[place] for place in order] == joined(groups) and sorted(order) == list(range(6))


def texts(count, seed=0):
    rng = random.Random(seed)
    prompts = [f"question {rng.randint(0, 3)} ? " for _ in range(count)]
    return prompts, ["".join(rng.choice("abcd ") for _ in range(rng.randint(0, 12))) for _ in range(count)]


def test_texts_are_read_as_the_trainer_reads_them(saved):
    """prompt + completion + EOS, tokenized as one, in any order and with repeated prompts."""
    reward = load_reward_model(saved)
    prompts, completions = texts(17)
    tokenizer, model = tiny.tokenizer(), tiny_classifier()
    expected = own(
        model, [tokenizer(p + c + "<|end|>")["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    )
    found = reward(prompts=prompts, completions=completions, completion_ids=None, row_id=list(range(17)))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)
    # An end that is there already is not doubled.
    assert reward(["q "], ["a<|end|>"]) == reward(["q "], ["a"])
    assert reward.__name__ == saved.rsplit("/", 1)[1] and reward([], []) == []


def test_conversations_are_read_under_the_reward_model_s_template(saved):
    reward = load_reward_model(saved)
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two", "one")]
    answers = [[{"role": "assistant", "content": text}] for text in ("x", "yy", "z")]
    ids = [tiny.tokenizer()(f"<|user|>{p}<|assistant|>{a}<|end|>")["input_ids"] for p, a in
           [("one", "x"), ("two", "yy"), ("one", "z")]]  # fmt: skip
    expected = own(tiny_classifier(), ids).tolist()
    assert reward(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert reward(prompts, ["x", "yy", "z"]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="completion is a conversation and its prompt is text"):
        reward(["one"], [answers[0]])
    plain = ModelReward(tiny_classifier(), tiny.tokenizer(chat=False))
    with pytest.raises(UserError, match="has no chat template"):
        plain(prompts, answers)


def test_long_texts_lose_their_beginning_aloud(saved, caplog):
    reward = load_reward_model(saved, max_length=10)
    prompts, completions = ["long question? "] * 3, ["short", "", "a much longer answer"]
    with caplog.at_level(logging.WARNING):
        found = reward(prompts, completions)
        reward(prompts, completions)
    ids = [tiny.tokenizer()(p + c + "<|end|>")["input_ids"][-10:] for p, c in zip(prompts, completions, strict=True)]
    assert found == pytest.approx(own(tiny_classifier(), ids).tolist(), abs=1e-5)
    assert reward.truncated == 6
    assert [record.getMessage().split(" and lose")[0] for record in caplog.records] == [
        "3 of 3 sequences exceed the reward model's 10 tokens"
    ]


def test_statistics_are_measured_kept_and_applied(saved, tmp_path):
    folder = tmp_path / "copy"
    tiny_classifier().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    prompts, completions = texts(12)
    reward = load_reward_model(str(folder))
    before = torch.tensor(reward(prompts, completions))
    reward.fit(prompts, completions, folder)
    scaled = torch.tensor(reward(prompts, completions))
    assert scaled.mean() == pytest.approx(0, abs=1e-6) and scaled.std(correction=0) == pytest.approx(1, abs=1e-5)
    again = load_reward_model(str(folder))
    assert again(prompts, completions) == pytest.approx(scaled.tolist(), abs=1e-5)
    assert reward_statistics(again.model.config) == pytest.approx(
        (float(before.mean()), float(before.std(correction=0))), abs=1e-6
    )
    assert again.raw(prompts, completions).tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert load_reward_model(str(folder), normalize=False)(prompts, completions) == pytest.approx(before.tolist())
    with pytest.raises(UserError, match="cannot be normalised"):
        reward.fit(["q"] * 2, ["a"] * 2)
    with pytest.raises(UserError, match="cannot be normalised"):
        set_statistics(reward.model.config, float("nan"), 1.0)


def test_what_is_no_reward_model_is_refused(saved, tmp_path):
    language_model = tiny.save(tmp_path / "lm")
    with pytest.raises(UserError, match="lacks score.weight, which would be drawn at random"):
        load_classifier(language_model)
    labels = tmp_path / "labels"
    tiny_classifier(num_labels=3).save_pretrained(labels)
    tiny.tokenizer().save_pretrained(labels)
    with pytest.raises(UserError, match="has 3 labels"):
        load_classifier(str(labels))
    with pytest.raises(UserError, match="there is no folder .*nothing'; train a model into it"):
        load_classifier(str(tmp_path / "nothing"))
    pickled = tmp_path / "pickled"
    tiny_classifier().save_pretrained(pickled)
    torch.save(tiny_classifier().state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    tiny.tokenizer().save_pretrained(pickled)
    with pytest.raises(UserError, match="safetensors"):
        load_classifier(str(pickled))


def test_a_model_that_brings_code_is_not_run(saved, tmp_path):
    folder = tmp_path / "code"
    tiny_classifier().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="no reward model could be loaded"):
        load_classifier(str(folder))
    assert not mark.exists()


def test_an_adapter_is_merged_with_its_head(tmp_path):
    base = tiny.save(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "r": 2}
    adapted = get_peft_model(model, LoraConfig(**options, modules_to_save=["score"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    reward = load_reward_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted.eval()(torch.tensor([tiny.tokenizer()("q a<|end|>")["input_ids"]])).logits[0, 0]
    assert reward(["q "], ["a"]) == pytest.approx([float(expected)], abs=1e-4)
    headless = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="holds no score head"):
        load_classifier(str(tmp_path / "headless"))


def test_rewards_are_those_of_the_trainer_that_made_the_model(tmp_path):
    """Trained through the recipe's trainer, saved, loaded: accuracy on the same pairs is what the trainer measured."""
    from llmalign import RewardConfig, RewardTrainer

    start = tiny.save(tmp_path / "start")
    options = {
        "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "max_length": 64,
    }  # fmt: skip
    rows: Dataset = tiny.pairs(16)
    trainer = RewardTrainer(
        model=start,
        args=RewardConfig(output_dir=str(tmp_path / "out"), **options),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    reward = load_reward_model(str(tmp_path / "saved"))
    chosen, rejected = (torch.tensor(reward(rows["prompt"], rows[side])) for side in ("chosen", "rejected"))
    assert measured["eval_margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert measured["eval_accuracy"] == float((chosen > rejected).float().mean()) > 0.9
