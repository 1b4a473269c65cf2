"""Alarms: numbers worked out by hand, one sentence a crossing, and a run that is not disturbed by them."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmalign.trainers.alarms import AlarmCallback, first_prompts, missing_end, repetition

ROWS = [{"prompt_ids": [10 + row, 11, 12, 13], "input_ids": [10 + row, 11, 12, 13, 14, 15]} for row in range(6)]


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 2, 3, 4], 0.0),
        # 1111 twice: one of the two has been seen before.
        ([1, 1, 1, 1, 1], 1 / 2),
        # 1212 2121 1212 2121 1212: three of the five have.
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5),
        # 1234 2345 3451 4512 5123 1234: the last one has.
        ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6),
        # Repeated 3-grams are not counted.
        ([1, 2, 3, 9, 1, 2, 3, 8], 0.0),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share, abs=1e-12)


def test_an_answer_without_its_end_is_counted() -> None:
    assert missing_end([[5, 2], [5, 6], [], [3]], end_ids=[2, 3]) == 1 / 2


def test_prompts_are_cut_from_the_left_to_leave_room() -> None:
    assert first_prompts(ROWS, 2, None) == [[10, 11, 12, 13], [11, 11, 12, 13]]
    assert first_prompts(iter(ROWS), 1, 3) == [[11, 12, 13]]
    assert first_prompts(ROWS, 0, None) == []


def test_from_args_reads_the_evaluation_rows_and_leaves_room(caplog: pytest.LogCaptureFixture) -> None:
    args = SimpleNamespace(alarm_prompts=2, alarm_new_tokens=128, alarm_chosen_drop=5.0, max_length=6)
    with caplog.at_level(logging.INFO):
        alarms = AlarmCallback.from_args(args, {"held_out": ROWS[3:], "other": ROWS})
    assert (alarms.new_tokens, alarms.chosen_drop) == (3, 5.0)
    assert alarms.prompt_ids == [[11, 12, 13], [11, 12, 13]]
    assert caplog.messages == ["Alarms draw 3 tokens an answer, half of max_length, to leave room for prompts."]
    args.max_length = None
    assert AlarmCallback.from_args(args, ROWS).prompt_ids == [row["prompt_ids"] for row in ROWS[:2]]
    nothing_measured = AlarmCallback.from_args(args, None)
    assert (nothing_measured.prompt_ids, nothing_measured.chosen_drop) == ([], 5.0)


def log(alarms: AlarmCallback, tmp_path: Path, step: int, main: bool = True, **logs: float) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=main)
    named = {key.replace("__", "/"): value for key, value in logs.items()}
    alarms.on_log(TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl(), logs=named)


def test_falling_chosen_logps_sound_once_a_crossing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alarms = AlarmCallback([], chosen_drop=50.0, new_tokens=8)
    for step, value in enumerate([0.0, -50.0, -50.1, -80.0, -20.0, -60.0]):
        log(alarms, tmp_path, step, drift__chosen=value, loss=-1000.0)
    assert alarms.raised == [
        "Alarm at step 2: drift/chosen is -50.1 nats, below the limit of -50: the policy is unlearning the chosen "
        "responses.",
        "Alarm at step 5: drift/chosen is -60.0 nats, below the limit of -50: the policy is unlearning the chosen "
        "responses.",
    ]
    assert caplog.messages == alarms.raised


def test_every_evaluation_set_has_its_own_alarm(tmp_path: Path) -> None:
    alarms = AlarmCallback([], chosen_drop=1.0, new_tokens=8)
    log(alarms, tmp_path, 3, eval_drift__chosen=-2.0)
    log(alarms, tmp_path, 3, eval_hard_drift__chosen=-2.0, eval_hard_drift__rejected=-9.0, no_drift__chosen=-9.0)
    log(alarms, tmp_path, 4, eval_drift__chosen=-3.0, eval_hard_drift__chosen=0.0)
    log(alarms, tmp_path, 5, main=False, drift__chosen=-9.0)
    assert [sentence.split(" is ")[0] for sentence in alarms.raised] == [
        "Alarm at step 3: eval_drift/chosen",
        "Alarm at step 3: eval_hard_drift/chosen",
    ]


class Favour(TrainerCallback):
    """Makes the model say one token alone from a given step on."""

    def __init__(self, model: torch.nn.Module, tokens: dict[int, int]) -> None:
        self.tokens = tokens
        self.step = 0
        model.lm_head.register_forward_hook(self.push)

    def push(self, module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor | None:
        if module.training:
            return None
        token = self.tokens[max(step for step in self.tokens if step <= self.step)]
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step = state.global_step


def train(folder: Path, model, tokenizer, callbacks: list[TrainerCallback], resume: bool = False, **options) -> Trainer:
    fields = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, **options}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=3, **fields
    )
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows[:2], processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_policy_that_collapses_is_heard(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    alarms = AlarmCallback([[10, 11], [12, 13, 14]], chosen_drop=50.0, new_tokens=23)
    favour = Favour(tiny_model, {0: tiny_tokenizer.eos_token_id, 4: 7})
    trainer = train(tmp_path, tiny_model, tiny_tokenizer, [favour, alarms])
    drawn = [entry for entry in trainer.state.log_history if "samples/repetition" in entry]
    # From step 4 on an answer is one token 23 times: 20 4-grams, of which 19 have been seen before.
    assert [(d["step"], d["samples/repetition"], d["samples/missing_end"]) for d in drawn] == [
        (0, 0.0, 0.0),
        (2, 0.0, 0.0),
        (4, 0.95, 1.0),
        (6, 0.95, 1.0),
    ]
    assert alarms.raised == [
        "Alarm at step 4: 95% of the 4-grams of greedy answers repeat, against 0% at the start of training.",
        "Alarm at step 4: 100% of greedy answers do not end within 23 tokens, against 0% at the start of training.",
    ]
    shutil.rmtree(tmp_path / "checkpoint-6")
    # A resumed run compares with the same start, not with the collapsed policy it finds.
    again = AlarmCallback([[10, 11], [12, 13, 14]], chosen_drop=50.0, new_tokens=23)
    favour.step = 4
    resumed = train(tmp_path, tiny_model, tiny_tokenizer, [favour, again], resume=True)
    assert [e["step"] for e in resumed.state.log_history if "samples/repetition" in e] == [0, 2, 4, 6]
    assert len(again.raised) == 2 and again.raised[0].startswith("Alarm at step 6: 95%")


def test_a_policy_that_always_rambled_is_not(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    alarms = AlarmCallback([[10, 11]], chosen_drop=50.0, new_tokens=23)
    train(tmp_path, tiny_model, tiny_tokenizer, [Favour(tiny_model, {0: 7}), alarms], save_strategy="no")
    assert alarms.raised == []


def test_drawing_answers_does_not_change_the_run(tiny_model_dir: Path, tiny_tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def weights(name: str, callbacks: list[TrainerCallback]) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attention_dropout=0.3)
        train(tmp_path / name, model, tiny_tokenizer, callbacks, save_strategy="no", gradient_checkpointing=True)
        return model.state_dict()

    quiet = weights("quiet", [])
    watched = weights("watched", [AlarmCallback([[10, 11], [12]], chosen_drop=50.0, new_tokens=8)])
    assert all(torch.equal(quiet[name], watched[name]) for name in quiet)


def test_without_prompts_nothing_is_drawn(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    trainer = train(
        tmp_path, tiny_model, tiny_tokenizer, [AlarmCallback([], chosen_drop=1.0, new_tokens=8)], save_strategy="no"
    )
    assert not any("samples/repetition" in entry for entry in trainer.state.log_history)


def test_an_evaluation_outside_training_draws_nothing(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    alarms = AlarmCallback([[10]], chosen_drop=1.0, new_tokens=4)
    trainer = Trainer(tiny_model, args, eval_dataset=rows, processing_class=tiny_tokenizer, callbacks=[alarms])
    trainer.evaluate()
    assert not any("samples/repetition" in entry for entry in trainer.state.log_history)
