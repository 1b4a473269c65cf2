"""Training in every layout, with references from every source, is the padded training that looks nothing up."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmalign import (
    CoPGConfig,
    CoPGTrainer,
    INPOConfig,
    INPOTrainer,
    PairConfig,
    PairTrainer,
    RDPOConfig,
    RDPOTrainer,
    RPOConfig,
    RPOTrainer,
)
from llmalign.errors import UserError
from llmalign.scores.scoring import Scorer
from llmalign.trainers.text_scores import short_groups
from llmalign.types import PromptGroups
from tests.slow import all_but
from tests.trainers import tiny
from tests.trainers.building import LORA, batch, build

METHODS = {
    "dpo": (PairTrainer, PairConfig, {"loss": "dpo"}),
    "rpo": (RPOTrainer, RPOConfig, {"base": "column", "eta": 0.1, "beta": 0.1}),
    "rdpo": (RDPOTrainer, RDPOConfig, {}),
    "inpo": (INPOTrainer, INPOConfig, {}),
    "copg": (CoPGTrainer, CoPGConfig, {}),
}


def rows(method):
    """Groups have short completions: a sum of 100 nats is rounded to 1e-5, and CoPG multiplies that by rewards."""
    if method == "copg":
        return tiny.groups(8).map(lambda row: {"completions": [text[:3] for text in row["completions"]]})
    return tiny.pairs(8, base=lambda i: f"base {i}")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("other"), seed=1)


def outcome(trainer):
    """The losses of all steps and the weights after them."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, weights


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5) and set(found[1]) == set(expected[1])
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", all_but(["rpo"], METHODS))
def test_losses_and_updates_do_not_depend_on_layout_checkpointing_or_cache(method, peft, start, tmp_path):
    trainer, config, options = METHODS[method]
    # Plain gradient descent: Adam would blow a difference of 1e-9 between two tiny gradients up to the learning rate.
    options = options | {"optim": "sgd", "learning_rate": 0.01, "max_steps": 3}

    def run(name, **more):
        made = build(trainer, config, start, tmp_path / name, data=rows(method), peft=peft, **(options | more))
        assert made.scorer.kind == ("shared_prompt" if "scoring" not in more else more["scoring"])
        return outcome(made)

    expected = run("padded", scoring="padded")
    assert_same(run("free", scoring="padding_free"), expected)
    assert_same(run("shared"), expected)
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    assert_same(run("cached", activation_checkpointing=True, **cached), expected)


def test_inpo_s_previous_iterate_is_cached_too(start, other, tmp_path):
    options = {"last_model_name_or_path": other, "optim": "sgd", "learning_rate": 0.01}
    fly = build(INPOTrainer, INPOConfig, start, tmp_path / "fly", **options)
    cache = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    kept = build(INPOTrainer, INPOConfig, start, tmp_path / "kept", **options, **cache)
    assert kept.ref_model is None and "last_chosen_logps" in kept.train_dataset.column_names
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the reference's folder and the previous iterate's
    assert_same(outcome(kept), outcome(fly))


def said(caplog, name):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"{name}:")]


def test_a_second_run_computes_no_reference(start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    build(PairTrainer, PairConfig, start, tmp_path / "a", evaluation=tiny.pairs(3, seed=9), **cache)
    assert said(caplog, "train")[0].startswith("train: 0 log-probs found in the cache, 16 computed")
    caplog.clear()
    build(RPOTrainer, RPOConfig, start, tmp_path / "b", evaluation=tiny.pairs(3, seed=9), learning_rate=1e-5, **cache)
    assert said(caplog, "train")[0].startswith("train: 16 log-probs found in the cache, 0 computed")
    assert said(caplog, "eval")[0].startswith("eval: 6 log-probs found in the cache, 0 computed")
    caplog.clear()
    build(PairTrainer, PairConfig, start, tmp_path / "c", max_length=12, **cache)  # TRL's key would be hit
    assert said(caplog, "train")[0].startswith("train: 0 log-probs found")


@pytest.mark.parametrize(
    ("peft", "options", "ahead"),
    [
        (None, {"max_steps": -1, "num_train_epochs": 1}, True),  # at equal cost without a second model
        (LORA, {"max_steps": -1, "num_train_epochs": 1}, False),  # the adapter is switched off for nothing
        (LORA, {"max_steps": -1, "num_train_epochs": 2}, True),
        (None, {"max_steps": 1}, False),  # fewer rows are visited than the set has
    ],
)
def test_cost_chooses_and_is_said(peft, options, ahead, start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options |= {"precompute_ref_log_probs": None, "reference_cache_dir": str(tmp_path / "cache")}
    trainer = build(PairTrainer, PairConfig, start, tmp_path / "run", peft=peft, **options)
    assert ("ref_chosen_logps" in trainer.train_dataset.column_names) == ahead == trainer.precompute_ref_logps
    assert f"References of train: {'looked up' if ahead else 'scored during training'} (8 rows" in caplog.text
    assert (trainer.ref_model is None) == (ahead or peft is not None)
    trainer.train()


def test_a_resumed_run_keeps_its_choice(start, tmp_path):
    """Another run has filled the cache meanwhile; looking up would change the last bits of the result."""
    cache = {"reference_cache_dir": str(tmp_path / "cache"), "precompute_ref_log_probs": None}
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    first = build(PairTrainer, PairConfig, start, tmp_path / "run", **cache, **options)
    first.train()
    assert json.loads((tmp_path / "run" / "references.json").read_text()) == {"train": False}
    build(PairTrainer, PairConfig, start, tmp_path / "b", **(cache | {"precompute_ref_log_probs": True}))
    again = build(PairTrainer, PairConfig, start, tmp_path / "run", **cache, **options)
    assert "ref_chosen_logps" not in again.train_dataset.column_names
    fresh = build(PairTrainer, PairConfig, start, tmp_path / "fresh", **cache, **options)
    assert "ref_chosen_logps" in fresh.train_dataset.column_names


@pytest.mark.parametrize("method", ["dpo", "copg"])
def test_a_stream_looks_up_what_the_cache_has(method, start, tmp_path):
    trainer, config, options = METHODS[method]
    options = options | {"optim": "sgd", "learning_rate": 0.01, "reference_cache_dir": str(tmp_path / "cache")}
    data = rows(method)
    build(trainer, config, start, tmp_path / "a", data=data.select(range(5)), **options, precompute_ref_log_probs=True)
    stream = build(
        trainer, config, start, tmp_path / "b", data=data.to_iterable_dataset(), **options,
        precompute_ref_log_probs=None,
    )  # fmt: skip
    column = trainer.reference_columns[0]
    found = [torch.tensor(row[column]).isfinite().all().item() for row in stream.train_dataset]
    assert found == [True] * 5 + [False] * 3
    fly = build(trainer, config, start, tmp_path / "c", data=data.to_iterable_dataset(), **options)
    assert_same(outcome(stream), outcome(fly))


def test_a_stream_looks_up_the_previous_iterate_too(start, other, tmp_path):
    options = {"last_model_name_or_path": other, "optim": "sgd", "learning_rate": 1e-4}
    cache = {"reference_cache_dir": str(tmp_path / "cache")}
    data = tiny.pairs(8)
    build(
        INPOTrainer, INPOConfig, start, tmp_path / "a", data=data.select(range(5)), precompute_ref_log_probs=True,
        **options, **cache,
    )  # fmt: skip
    stream = build(
        INPOTrainer, INPOConfig, start, tmp_path / "b", data=data.to_iterable_dataset(), precompute_ref_log_probs=None,
        **options, **cache,
    )  # fmt: skip
    for column in ("ref_chosen_logps", "last_chosen_logps", "last_rejected_logps"):
        assert np.isfinite([row[column] for row in stream.train_dataset]).tolist() == [True] * 5 + [False] * 3, column
    fly = build(INPOTrainer, INPOConfig, start, tmp_path / "c", data=data.to_iterable_dataset(), **options)
    assert_same(outcome(stream), outcome(fly))


def test_prompt_learning_is_refused(start, tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(UserError, match="virtual tokens"):
        build(
            PairTrainer, PairConfig, start, tmp_path,
            peft=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        )  # fmt: skip


def test_padding_to_a_multiple_is_padded(start, tmp_path):
    trainer = build(PairTrainer, PairConfig, start, tmp_path, pad_to_multiple_of=8)
    assert trainer.scorer.kind == "padded"
    groups = trainer.data_collator.groups(list(trainer.train_dataset))
    assert trainer.scorer.lay_out(groups, torch.device("cpu")).inputs["input_ids"].shape[1] % 8 == 0
    with pytest.raises(UserError, match="pad_to_multiple_of asks for padded rows"):
        build(PairTrainer, PairConfig, start, tmp_path, pad_to_multiple_of=8, scoring="shared_prompt")


def test_the_layout_is_checked_on_the_first_batch_and_said(start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = build(PairTrainer, PairConfig, start, tmp_path)
    trainer.train()
    assert "Scoring: shared_prompt (proven for llama); its first batch is" in caplog.text


def test_a_wrong_layout_falls_back_aloud_and_trains_right(start, tmp_path, caplog):
    """The model's attention is swapped for one that does not know about trees."""
    options = {"optim": "sgd", "learning_rate": 0.01}
    trainer = build(PairTrainer, PairConfig, start, tmp_path / "a", **options)
    trainer.model.set_attn_implementation("sdpa")
    found = outcome(trainer)
    assert trainer.scorer.kind == "padded" and "falling back on padding_free" in caplog.text
    assert_same(found, outcome(build(PairTrainer, PairConfig, start, tmp_path / "b", scoring="padded", **options)))


def test_a_resumed_run_keeps_its_layout(start, tmp_path, caplog):
    """Begun in padded rows, because the first batch failed its check; the next one would pass."""
    caplog.set_level(logging.INFO)
    options = {"save_strategy": "steps", "save_steps": 1, "tokens_per_batch": 250}
    first = build(PairTrainer, PairConfig, start, tmp_path / "run", **options)
    first.model.set_attn_implementation("sdpa")  # does not know about trees
    first.train()
    assert first.scorer.kind == "padded"
    assert json.loads((tmp_path / "run/checkpoint-1/scoring.json").read_text()) == {
        "scoring": "padded", "shared_out_for": "shared_prompt"
    }  # fmt: skip
    again = build(PairTrainer, PairConfig, start, tmp_path / "again", **options)
    assert again.scorer.kind == "shared_prompt"
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert again.scorer.kind == "padded" and "Scoring: padded, as the run began." in caplog.text
    for (name, weight), other in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_layout_that_the_model_cannot_score_is_not_kept(start, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    build(PairTrainer, PairConfig, start, tmp_path / "run", **options).train()
    eager = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    again = build(PairTrainer, PairConfig, eager, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert again.scorer.kind == "padded"


def test_the_layout_is_checked_on_short_rows_alone(start, tmp_path, monkeypatch):
    checked = []
    gaps = Scorer.gaps

    def spy(self, model, groups, **options):
        checked.append(groups)
        return gaps(self, model, groups, **options)

    monkeypatch.setattr(Scorer, "gaps", spy)
    trainer = build(CoPGTrainer, CoPGConfig, start, tmp_path, data=tiny.groups(8), per_device_train_batch_size=8)
    inputs = batch(trainer)
    trainer.scores(trainer.model, inputs)
    (groups,) = checked
    assert sorted(groups.unique_tokens()) == sorted(inputs["groups"].unique_tokens())[:2]
    one_first = PromptGroups([[1], [1, 2], [1, 2, 3]], [[[4]], [[5], [6]], [[7], [8]]])
    assert short_groups(one_first, 2).counts() == [2, 2]


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_a_set_given_later_is_scored_by_the_reference_that_was_given(peft, start, other, tmp_path):
    later = tiny.pairs(4, seed=5)
    drifts = []
    for name, ahead in (("fly", False), ("kept", True)):
        trainer = build(
            PairTrainer, PairConfig, start, tmp_path / name, peft=peft, ref_model_name_or_path=other,
            precompute_ref_log_probs=ahead, reference_cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        assert trainer.args.precompute_ref_log_probs is ahead
        drifts.append(trainer.evaluate(later)["eval_drift/chosen"])
    assert drifts[0] == pytest.approx(drifts[1], abs=1e-4) and abs(drifts[0]) > 0.1


def test_rpo_draws_its_base_from_the_reference_that_was_given(start, other, tmp_path):
    drawn = []
    for name, ahead in (("fly", False), ("kept", True)):
        trainer = build(
            RPOTrainer, RPOConfig, start, tmp_path / name, ref_model_name_or_path=other, base="reference",
            base_new_tokens=4, precompute_ref_log_probs=ahead, reference_cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        drawn.append(trainer.train_dataset["base_ids"][:])
    assert drawn[0] == drawn[1]


def test_a_streamed_evaluation_set_beside_a_loaded_training_set(start, tmp_path):
    options = {"reference_cache_dir": str(tmp_path / "cache")}
    stream = tiny.pairs(3, seed=9).to_iterable_dataset()
    looked_up = build(
        PairTrainer, PairConfig, start, tmp_path / "a", evaluation=stream, precompute_ref_log_probs=True, **options
    )
    fly = build(PairTrainer, PairConfig, start, tmp_path / "b", evaluation=stream)
    assert looked_up.evaluate()["eval_loss"] == pytest.approx(fly.evaluate()["eval_loss"], abs=1e-6)


def test_two_trainers_on_one_model_and_a_copy_of_it(start, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    first = build(PairTrainer, PairConfig, model, tmp_path / "a", optim="sgd")
    losses = outcome(first)[0]
    ids = torch.tensor([[5, 6, 7]])
    twin = copy.deepcopy(model)
    before = twin(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(input_ids=ids).logits, before)
    again = build(PairTrainer, PairConfig, twin, tmp_path / "b", reference=model, optim="sgd")
    assert again.scorer.kind == "shared_prompt" and losses[0] == pytest.approx(0.6931, abs=1e-3)
    again.train()
