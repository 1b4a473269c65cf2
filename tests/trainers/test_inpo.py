"""INPO's trainer: where the previous iterate comes from, and that it stays what it is."""

import copy

import pytest
import torch

from llmalign import INPOConfig, INPOTrainer
from llmalign.errors import UserError
from tests.trainers import tiny
from tests.trainers.building import LORA, batch, build, independent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def adapter(start, tmp_path_factory):
    """A LoRA adapter that has moved away from its base model."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = make(folder / "run", start, peft=copy.deepcopy(LORA), learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(folder))
    return str(folder)


def aim(trainer, inputs, policy, reference, last, ratio):
    lp, rp, tp = (independent(p, trainer, inputs["row_id"]) for p in (policy, reference, last))
    return (lp[0] - lp[1]) - ratio * (rp[0] - rp[1]) - (1 - ratio) * (tp[0] - tp[1])


def check(trainer, policy, reference, last):
    inputs = batch(trainer)
    h = aim(trainer, inputs, policy, reference, last, ratio=0.25)
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(((h - 1 / (2 * 0.1)) ** 2).mean().item(), rel=1e-4)


def make(folder, model, **options):
    return build(INPOTrainer, INPOConfig, model, folder, eta=0.1, tau=0.025, **options)


def test_first_iteration_last_is_the_reference(start, tmp_path):
    trainer = make(tmp_path, start)
    assert trainer.last_source == "reference"
    check(trainer, start, start, start)
    trainer.train()  # passes its start check


def test_last_is_the_start_where_the_reference_is_another(start, other, tmp_path):
    trainer = make(tmp_path, other, ref_model_name_or_path=start)
    assert trainer.last_source == "start"
    check(trainer, other, start, other)
    trainer.train()


def test_last_from_a_model_path(start, other, tmp_path):
    trainer = make(tmp_path, start, last_model_name_or_path=other)
    assert trainer.last_source == "model"
    check(trainer, start, start, other)
    trainer.train()


def test_last_from_columns(start, tmp_path):
    data = tiny.pairs(4, last_chosen_logps=lambda i: -5.0 * i, last_rejected_logps=lambda i: -3.0 * i)
    trainer = make(tmp_path, start, data=data)
    scores = trainer.scores(trainer.model, inputs := batch(trainer))
    assert scores.last_chosen.tolist() == [-5.0 * i for i in inputs["row_id"].tolist()]
    trainer.train()


def test_last_from_a_frozen_adapter_and_the_reference_without_it(start, adapter, tmp_path):
    trainer = make(tmp_path, start, last_adapter=adapter, learning_rate=1e-2)
    assert trainer.last_source == "adapter" and trainer.ref_model is None
    stays_what_it_is(trainer, start)


def test_a_second_iteration_with_its_reference_named(start, other, adapter, tmp_path):
    trainer = make(tmp_path, start, last_adapter=adapter, ref_model_name_or_path=other, learning_rate=1e-2)
    assert trainer.last_source == "adapter" and trainer.ref_model is not None
    stays_what_it_is(trainer, other)


def test_a_new_adapter_with_another_reference_starts_at_the_base(start, other, tmp_path):
    trainer = make(tmp_path, start, peft=copy.deepcopy(LORA), ref_model_name_or_path=other)
    assert trainer.last_source == "start"
    check(trainer, start, other, start)
    trainer.train()


def test_the_reference_computed_ahead_is_not_the_previous_iterate(start, adapter, tmp_path):
    trainer = make(tmp_path, start, last_adapter=adapter, precompute_ref_log_probs=True)
    inputs = batch(trainer)
    scores = trainer.scores(trainer.model.eval(), inputs)
    expected = independent(start, trainer, inputs["row_id"])
    torch.testing.assert_close(scores.ref_chosen, expected[0], rtol=0, atol=1e-4)


def test_an_adapter_that_is_not_there_is_one_sentence(start, tmp_path):
    with pytest.raises(UserError, match="no adapter could be loaded from 'nowhere'"):
        make(tmp_path, start, last_adapter="nowhere")


def stays_what_it_is(trainer, reference):
    """Reference and previous iterate are right at the start and the same after training; the policy moves."""
    inputs = batch(trainer)
    trainer.model.eval()
    scores = trainer.scores(trainer.model, inputs)
    expected = independent(reference, trainer, inputs["row_id"])
    torch.testing.assert_close(scores.ref_chosen, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.chosen.detach(), scores.last_chosen, rtol=0, atol=1e-5)
    assert (scores.last_chosen - scores.ref_chosen).abs().max() > 1e-3
    trainer.train()
    after = trainer.scores(trainer.model.eval(), inputs)
    torch.testing.assert_close(after.last_chosen, scores.last_chosen, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.ref_chosen, scores.ref_chosen, rtol=0, atol=1e-5)
    assert (after.chosen - after.last_chosen).abs().max() > 1e-3
