"""Steps whose loss or gradient is not finite: the run stops before them, or goes on as if they had not been."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from llmalign import (
    PairConfig,
    PairTrainer,
    PreferenceModelConfig,
    PreferenceModelTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from llmalign.errors import UserError
from llmalign.trainers.finite import MOST_IN_A_ROW
from llmalign.trainers.validation import ChosenHardware
from tests.trainers import sampled_runs, tiny
from tests.trainers.building import build

NAN_ROW, ROWS = 5, 8
RATE, NORM = 1e-3, 0.5  # small enough that gradients are clipped


@dataclass
class ToyConfig(ChosenHardware, TrainingArguments):
    """The plainest config with the key."""


class Watch(TrainerCallback):
    """Keeps weights and optimizer state of each step, and may spoil a weight before one."""

    def __init__(self, spoilt_step=None, weight=None):
        self.after = {}
        self.spoilt_step, self.weight = spoilt_step, weight

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.after[0] = weights(model)
        if state.global_step + 1 == self.spoilt_step:
            self.weight().data.view(-1)[0] = math.inf

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = weights(model)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(found, wanted):
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def pairs_with_nan(**extra):
    return tiny.pairs(
        ROWS,
        ref_chosen_logps=lambda row: math.nan if row == NAN_ROW else -40.0 - row,
        ref_rejected_logps=lambda row: -41.0 - row,
        **extra,
    )


def pair_trainer(folder, **options):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": RATE, "max_grad_norm": NORM} | options
    trainer = build(PairTrainer, PairConfig, tiny.model(), folder, data=pairs_with_nan(), **options)
    trainer.add_callback(Watch())
    return trainer


def rows_of_steps(trainer, steps):
    """The row numbers of each optimizer step of one epoch, from the data loader of an equal trainer."""
    batches = [batch["row_id"].tolist() for batch in trainer.get_train_dataloader()]
    each = len(batches) // steps
    return [batches[step * each : (step + 1) * each] for step in range(steps)]


def saved(folder, step):
    return [json.loads(line) for line in (Path(folder) / "non_finite" / f"step-{step}.jsonl").read_text().splitlines()]


def watch_of(trainer):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Watch))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_run_stops_before_the_step_and_writes_its_rows(tmp_path, accumulated):
    steps = 4 // accumulated
    options = {"gradient_accumulation_steps": accumulated, "max_steps": steps}
    expected = rows_of_steps(pair_trainer(tmp_path / "other", **options), steps)
    bad = next(step for step, batches in enumerate(expected, 1) if any(NAN_ROW in batch for batch in batches))
    guilty = next(batch for batch in expected[bad - 1] if NAN_ROW in batch)
    trainer = pair_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, **options)
    with pytest.raises(UserError) as stopped:
        trainer.train()
    assert trainer.state.global_step == bad - 1
    assert_same(weights(trainer.model), watch_of(trainer).after[bad - 1])
    sentence = str(stopped.value)
    for words in (f"loss of step {bad} is", f"rows {guilty[0]}, {guilty[1]};", f"step-{bad}.jsonl", "learning_rate",
                  "non_finite: skip", f"from checkpoint-{bad - 1}" if bad > 1 else "no checkpoint"):  # fmt: skip
        assert words in sentence
    lines = saved(tmp_path / "run", bad)
    assert [(line["micro_batch"], line["row"]) for line in lines] == [
        (place, row) for place, batch in enumerate(expected[bad - 1]) for row in batch
    ]
    raw = tiny.pairs(ROWS)
    for line in lines:
        assert line["prompt"] == raw[line["row"]]["prompt"]
        assert line["chosen"].startswith(raw[line["row"]]["chosen"])
        assert line["rejected"].startswith(raw[line["row"]]["rejected"])
        assert (line["loss"] == "nan") == (line["row"] in guilty)
        assert line["inputs_not_finite"] == (["ref_chosen_logps"] if line["row"] == NAN_ROW else [])
        assert line["gradients"][0] == "model.embed_tokens.weight"
        assert line["ref_rejected_logps"] == -41.0 - line["row"]


@pytest.mark.parametrize("accumulated, norm", [(1, NORM), (2, NORM), (1, 0.0)])
def test_a_skipped_step_leaves_no_trace_in_the_weights(tmp_path, accumulated, norm):
    """Beside a loop of its own, which leaves out the update of every step with the row that holds a NaN."""
    options = {"gradient_accumulation_steps": accumulated, "num_train_epochs": 2, "max_steps": -1}
    trainer = pair_trainer(tmp_path / "run", non_finite="skip", max_grad_norm=norm, logging_steps=3, **options)
    result = trainer.train()
    steps = 2 * ROWS // 2 // accumulated

    other = pair_trainer(tmp_path / "other", **options)
    model, skipped, logged = other.model, 0, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    loader = other.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += list(loader)
    model.train()
    for step in range(steps):
        step_batches = batches[step * accumulated : (step + 1) * accumulated]
        rows = [row for batch in step_batches for row in batch["row_id"].tolist()]
        losses = [other.compute_loss(model, batch, num_items_in_batch=len(rows)) for batch in step_batches]
        for loss in losses:
            loss.backward()
        if NAN_ROW in rows:
            skipped += 1
            optimizer.zero_grad()
        else:
            logged.append(sum(loss.item() for loss in losses))
            if norm:
                clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert skipped == 2 and trainer.state.global_step == steps
    assert_same(weights(trainer.model), weights(model))
    assert trainer.lr_scheduler.get_last_lr()[0] == schedule.get_last_lr()[0]
    assert result.metrics["non_finite/skipped"] == skipped
    assert result.metrics["train_loss"] == pytest.approx(sum(logged) / len(logged), rel=1e-5)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and all(math.isfinite(entry["loss"]) for entry in entries)


def test_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    trainer = pair_trainer(tmp_path, non_finite="skip", max_steps=MOST_IN_A_ROW + 5)
    trainer.model.lm_head.weight.data[0, 0] = math.inf
    before = weights(trainer.model)
    with pytest.raises(UserError, match=f"the {MOST_IN_A_ROW}th step in a row"):
        trainer.train()
    assert trainer.state.global_step == MOST_IN_A_ROW - 1
    assert_same(weights(trainer.model), before)


def test_counts_go_on_after_resuming(tmp_path):
    options = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 4}
    whole = pair_trainer(tmp_path / "whole", non_finite="skip", **options)
    whole.train()
    resumed = pair_trainer(tmp_path / "whole", non_finite="skip", **options)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert result.metrics["non_finite/skipped"] == 2
    assert_same(weights(resumed.model), weights(whole.model))


def test_an_infinite_gradient_of_a_finite_loss_is_named(tmp_path):
    trainer = pair_trainer(tmp_path, max_steps=1)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient.fill_(math.inf))
    before = weights(trainer.model)
    with pytest.raises(UserError, match=r"gradient of step 1 is not finite \(first of lm_head.weight\): rows"):
        trainer.train()
    assert_same(weights(trainer.model), before)
    assert {tuple(line["gradients"]) for line in saved(tmp_path, 1)} == {("lm_head.weight",)}


@pytest.mark.parametrize(
    ("method", "norm"),
    [("mdpo", 1.0), ("copg-replay", 0.0), ("pf_ppo", 1.0), ("pf_ppo-model", 1.0), ("pf_ppo-model", 0.0), ("fdpg", 1.0)],
)
def test_rollouts(tmp_path, method, norm):
    """A weight spoilt between two steps of a rollout, of PF-PPO's critic where it has one."""
    options = {"max_steps": 4, "max_grad_norm": norm, "steps_per_generation": 2}
    trainer = sampled_runs.build(method, tmp_path, record=True, **options)
    critic = method.startswith("pf_ppo")
    spoilt = (lambda: trainer.critic.parameters()[-1]) if critic else (lambda: trainer.model.lm_head.weight)
    trainer.add_callback(Watch(2, spoilt))
    with pytest.raises(UserError, match="of step 2 is not finite"):
        trainer.train()
    lines = saved(tmp_path, 2)
    assert len(lines) >= 2 and all(line["prompt"] == f"q{line['row']} ab" for line in lines)
    assert all(len(line["completions"]) == len(line["rewards"]) == 4 for line in lines)
    if method == "pf_ppo-model":  # a network of its own: the policy's gradient is finite
        assert lines[0]["gradients"][0].startswith("critic.")


@pytest.mark.parametrize("kind", ["sft", "sft-flat", "reward", "preference"])
def test_rows_of_trl_s_trainers_are_found_again(tmp_path, kind):
    """Every row says its number, so that what is written can be checked."""
    count = 6
    if kind.startswith("sft"):
        rows = [{"prompt": f"q{row} ", "completion": f"a{row} of {row}", "row_id": 100 + row} for row in range(count)]
    else:
        rows = [
            {"prompt": f"q{row} ", "chosen": f"c{row}", "rejected": f"r{row}", "row_id": 100 + row}
            for row in range(count)
        ]
    trainer_class, config_class = {
        "sft": (SFTTrainer, SFTConfig), "sft-flat": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig),
        "preference": (PreferenceModelTrainer, PreferenceModelConfig),
    }[kind]  # fmt: skip
    own = {"padding_free": True, "max_length": None} if kind == "sft-flat" else {}
    args = config_class(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=1, **own,
    )  # fmt: skip
    model = tiny.save(tmp_path / "start")
    trainer = trainer_class(
        model=model, args=args, train_dataset=tiny.Dataset.from_list(rows), processing_class=tiny.tokenizer()
    )
    trainer.add_callback(Watch(2, lambda: trainer.model.get_parameter("model.norm.weight")))
    with pytest.raises(UserError, match="of step 2 is not finite"):
        trainer.train()
    lines = saved(tmp_path, 2)
    assert len({line["row"] for line in lines}) == 2
    for line in lines:
        row = rows[line["row"] - 100]
        text = line["text"] if "text" in line else line["chosen"]
        assert row["prompt"] in text and row.get("completion", row.get("chosen")) in text


def test_weights_that_the_optimizer_broke_are_not_saved(tmp_path):
    """Adam without epsilon makes 0 / 0 of the tokens that no row has, from a finite gradient."""
    trainer = pair_trainer(tmp_path, save_strategy="steps", save_steps=1, adam_epsilon=0.0)
    trainer.train_dataset = trainer.train_dataset.select([row for row in range(ROWS) if row != NAN_ROW])
    with pytest.raises(UserError) as stopped:
        trainer.train()
    for words in ("Step 1 left weights that are not finite (first of model.embed_tokens.weight)", "adam_epsilon"):
        assert words in str(stopped.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["train", "evaluate"])
def test_the_last_step_s_weights_are_looked_at(tmp_path, how):
    trainer = pair_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.train_dataset = trainer.train_dataset.select([0, 1])
    if how == "train":
        trainer.args.adam_epsilon = 0.0
        with pytest.raises(UserError, match="Step 1 left weights that are not finite"):
            trainer.train()
        return
    trainer.require_finite_weights()
    trainer.model.lm_head.weight.data[3, 1] = -math.inf
    with pytest.raises(UserError, match=r"has weights that are not finite \(first of lm_head.weight\)"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize("method", ["copg", "fdpg", "pf_ppo"])
def test_weights_that_are_not_finite_are_not_sampled_from(tmp_path, method):
    again = {"num_iterations": 1} if method == "pf_ppo" else {}  # so that step 2 samples
    trainer = sampled_runs.build(method, tmp_path, max_steps=4, **again)
    trainer.add_callback(Watch(2, lambda: trainer.model.lm_head.weight))
    with pytest.raises(UserError, match=r"Step 1 left weights that are not finite \(first of lm_head.weight\)"):
        trainer.train()


def test_the_key_is_checked(tmp_path):
    with pytest.raises(UserError, match="non_finite must be stop or skip, got 'ignore'"):
        ToyConfig(output_dir=str(tmp_path), bf16=False, non_finite="ignore")
