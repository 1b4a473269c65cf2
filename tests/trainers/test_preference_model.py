"""The trainer of pair-preference models: its loss, a cycle that no score explains, and scoring as it was trained."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from llmalign import PreferenceModelConfig, PreferenceModelTrainer
from llmalign.errors import UserError
from llmalign.rewards.pair_model import PairText, load_preference_model
from llmalign.trainers.preference_model import pair_loss
from tests.trainers import tiny

COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "logging_steps": 1, "max_length": 160,
}  # fmt: skip
BEATS = {"a": "b", "b": "c", "c": "a"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"))


def build(start, folder, rows=None, evaluation=None, peft=None, **options):
    return PreferenceModelTrainer(
        model=start,
        args=PreferenceModelConfig(output_dir=str(folder), **(COMMON | options)),
        train_dataset=tiny.pairs(8) if rows is None else rows,
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def test_the_loss_is_the_cross_entropy_of_both_orders():
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(logits)
    sigmoid = [1 / (1 + math.exp(-value)) for value in logits.tolist()]
    expected = -(math.log(sigmoid[0]) + math.log(sigmoid[1]) + math.log(1 - sigmoid[2]) + math.log(1 - sigmoid[3])) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (found,) = torch.autograd.grad(loss, logits)
    wanted = [(sigmoid[0] - 1) / 4, (sigmoid[1] - 1) / 4, sigmoid[2] / 4, sigmoid[3] / 4]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    assert pair_loss(torch.zeros(6)).item() == pytest.approx(math.log(2))


def test_rows_become_both_orders_and_the_loss_is_the_model_s(start, tmp_path):
    trainer = build(start, tmp_path)
    text = PairText(tiny.tokenizer(), 160)
    rows = list(trainer.train_dataset)
    for row, raw in zip(rows, tiny.pairs(8), strict=True):
        assert row["chosen_ids"] == text.ids(raw["prompt"], raw["chosen"], raw["rejected"])
        assert row["rejected_ids"] == text.ids(raw["prompt"], raw["rejected"], raw["chosen"])
    batch = trainer.data_collator(rows)
    found = trainer.compute_loss(trainer.model, dict(batch))
    each = [
        trainer.model(torch.tensor([row[side]])).logits[0, 0] for side in ("chosen_ids", "rejected_ids") for row in rows
    ]
    assert found.item() == pytest.approx(pair_loss(torch.stack(each)).item(), rel=1e-5)


def test_it_learns_a_cycle_that_no_score_explains_and_scores_as_it_was_measured(start, tmp_path):
    """a beats b, b beats c, c beats a."""
    cycle = [{"prompt": "q?", "chosen": better * 3, "rejected": worse * 3} for better, worse in BEATS.items()]
    rows = Dataset.from_list(cycle * 8)
    trainer = build(start, tmp_path, rows, Dataset.from_list(cycle), max_steps=60, learning_rate=3e-3)
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    model = load_preference_model(str(tmp_path / "saved"))
    better, worse = ([side * 3 for side in sides] for sides in (BEATS, BEATS.values()))
    assert min(model.score(["q?"] * 3, better, worse)) > 0.8
    assert measured["eval_accuracy"] == 1.0
    assert measured["eval_margin"] == pytest.approx(2 * float(model.logits(["q?"] * 3, better, worse).mean()), rel=1e-3)
    again = trainer.evaluate(Dataset.from_list(cycle))  # raw rows are written as those of the start were
    assert again["eval_loss"] == pytest.approx(measured["eval_loss"], rel=1e-5)


def test_evaluation_sets_keep_their_names(start, tmp_path):
    sets = {"first": tiny.pairs(4, 1), "second": tiny.pairs(6, 2)}
    measured = build(start, tmp_path, evaluation=sets).evaluate()
    assert {"eval_first_loss", "eval_second_accuracy"} <= set(measured)


def test_an_adapter_trains_and_is_loaded_with_its_head(start, tmp_path):
    adapter = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj"])
    trainer = build(start, tmp_path, peft=adapter, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([PairText(tiny.tokenizer(), 160).ids("q", *order) for order in (("a", "b"), ("b", "a"))])
    with torch.no_grad():
        first, second = trainer.model.eval()(ids).logits[:, 0].tolist()
    found = load_preference_model(str(tmp_path / "saved")).logits(["q"], ["a"], ["b"])
    assert float(found) == pytest.approx((first - second) / 2, abs=1e-4)


def test_streams_are_written_as_they_come(start, tmp_path):
    trainer = build(start, tmp_path, tiny.pairs(8).to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_is_not_honoured_is_refused(start, tmp_path):
    with pytest.raises(UserError, match="center_rewards_coefficient=0.1 is not honoured"):
        PreferenceModelConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.1)
    with pytest.raises(UserError, match="rows with a prompt"):
        build(start, tmp_path, tiny.pairs(4).remove_columns("prompt"))
    with pytest.raises(UserError, match="leaves no room"):
        build(start, tmp_path, max_length=20)
