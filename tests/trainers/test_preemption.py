"""SIGTERM: a checkpoint at the end of the step, on all processes together, and nothing changed for anybody else."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from llmalign import SFTConfig, sigterm
from llmalign.errors import UserError
from llmalign.processes import end_processes, load_group_users
from llmalign.sigterm import Preempted, saving_on_sigterm
from llmalign.trainers.preemption import PreemptionMixin
from llmalign.trainers.resuming import check_whole
from tests.trainers.forked import FORKING, Signalled, in_a_child, on_two
from tests.trainers.toy_runs import make, names

STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class StoppableTrainer(PreemptionMixin, Trainer):
    """The plainest trainer that SIGTERM can stop."""


def stopped(folder: Path, event: str, step: int, **options: Any) -> tuple[Preempted, Trainer]:
    """A run that got the signal at an event after a number of steps, and what it ended with."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(folder, StoppableTrainer, callbacks=[Signalled(event, step)], **options)
    with pytest.raises(Preempted) as raised, saving_on_sigterm():
        trainer.train()
    assert raised.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    return raised.value, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    make(folder, StoppableTrainer).train()
    return folder


@pytest.mark.parametrize("event, taken", [("on_step_begin", 2), ("on_pre_optimizer_step", 2), ("on_step_end", 3)])
def test_the_running_step_is_ended_and_saved(event: str, taken: int, whole: Path, tmp_path: Path) -> None:
    ended, trainer = stopped(tmp_path / "run", event, taken)
    assert ended.checkpoint == tmp_path / "run" / "checkpoint-3" and trainer.state.global_step == 3
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    check_whole(ended.checkpoint)
    make(tmp_path / "run", StoppableTrainer).train(resume_from_checkpoint=True)
    for name in STATES:
        last = Path("checkpoint-6", name)
        assert (tmp_path / "run" / last).read_bytes() == (whole / last).read_bytes(), name


@pytest.mark.parametrize("options", [{"save_only_model": True}, {"save_strategy": "no"}, {"save_strategy": "epoch"}])
def test_it_is_saved_whole_however_checkpoints_are_saved(options: dict[str, Any], tmp_path: Path) -> None:
    ended, trainer = stopped(tmp_path / "run", "on_step_begin", 3, **options)
    assert ended.checkpoint == tmp_path / "run" / "checkpoint-4"
    check_whole(ended.checkpoint)
    assert trainer.args.save_only_model == options.get("save_only_model", False)


def test_an_evaluation_is_ended_first_and_the_step_saved_once(tmp_path: Path) -> None:
    saves = []

    class Count(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves.append(state.global_step)

    folder, trains = tmp_path / "run", {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make(folder, StoppableTrainer, callbacks=[Signalled("on_prediction_step", 4), Count()], **trains)
    with pytest.raises(Preempted), saving_on_sigterm():
        trainer.train()
    assert saves == [2, 4] and names(folder) == ["checkpoint-2", "checkpoint-4"]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4]


@pytest.mark.parametrize("event", ["on_train_begin", "on_prediction_step", "on_epoch_begin"])
def test_before_the_first_step_there_is_nothing_to_save(event: str, tmp_path: Path) -> None:
    ended, _ = stopped(tmp_path / "run", event, 0, eval_strategy="steps", eval_on_start=True)
    assert ended.checkpoint is None and names(tmp_path / "run") == []


def test_after_the_last_step_its_checkpoint_is_named(tmp_path: Path) -> None:
    ended, _ = stopped(tmp_path / "run", "on_train_end", 6)
    assert ended.checkpoint == tmp_path / "run" / "checkpoint-6"
    # With nothing saved of it there is only the way on, to the model's own folder.
    with saving_on_sigterm():
        callbacks = [Signalled("on_train_end", 6)]
        make(tmp_path / "other", StoppableTrainer, callbacks=callbacks, save_strategy="no").train()


def test_a_word_that_comes_from_two_sides_is_one(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", StoppableTrainer, callbacks=[Signalled("on_step_begin", 2, times=3)])
    with pytest.raises(Preempted) as ended, saving_on_sigterm():
        trainer.train()
    assert ended.value.checkpoint == tmp_path / "run" / "checkpoint-3"


def test_only_the_main_thread_can_look_out_for_it() -> None:
    found = []

    def inside() -> None:
        with saving_on_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def unasked(folder: Path) -> None:
    make(folder, StoppableTrainer, callbacks=[Signalled("on_step_begin", 3)]).train()


def twice(folder: Path) -> None:
    sigterm.ONE_WORD = 0.0
    with saving_on_sigterm():
        make(folder, StoppableTrainer, callbacks=[Signalled("on_step_begin", 3, times=2)]).train()


def with_a_helper(folder: Path) -> None:
    """A process forked in the block, as those that read data are, can be ended by its parent."""
    with saving_on_sigterm():
        begun = FORKING.Event()
        helper = FORKING.Process(target=lambda: (begun.set(), threading.Event().wait()), daemon=True)
        helper.start()
        assert begun.wait(60)
        helper.terminate()
        helper.join(20)
        assert helper.exitcode == -signal.SIGTERM, helper.exitcode


@pytest.mark.parametrize("work, code", [(unasked, -signal.SIGTERM), (twice, -signal.SIGTERM), (with_a_helper, 0)])
def test_who_did_not_ask_and_who_is_told_twice_ends_at_once(work: Any, code: int, tmp_path: Path) -> None:
    child = in_a_child(work, tmp_path / "run")
    child.join(120)
    assert child.exitcode == code
    assert work is with_a_helper or names(tmp_path / "run") == ["checkpoint-2"]


def as_one_of_two(folder: Path, event: str, step: int) -> None:
    """One rank alone gets the signal; whichever step they agree on, both end there."""
    load_group_users()
    callbacks = [Signalled(event, step)] if os.environ["RANK"] == "1" else []
    trainer = make(folder, StoppableTrainer, callbacks=callbacks, max_steps=8)
    assert trainer.args.world_size == 2
    checkpoint = "none"
    try:
        with saving_on_sigterm():
            trainer.train()
    except Preempted as ended:
        checkpoint = ended.checkpoint.name if ended.checkpoint else "nothing"
    (folder.parent / f"ended-{os.environ['RANK']}").write_text(f"{trainer.state.global_step} {checkpoint}")
    del trainer
    end_processes(together=True)


def ends(folder: Path, *given: Any) -> list[str]:
    """What each of two processes left in writing."""
    on_two(folder / "log", as_one_of_two, folder / "run", *given)
    return [(folder / f"ended-{rank}").read_text() for rank in range(2)]


def test_two_processes_save_and_end_together_where_one_got_the_signal(tmp_path: Path) -> None:
    ended = ends(tmp_path, "on_step_begin", 2)
    assert ended == ["4 checkpoint-4"] * 2  # one step after the running one, by when all know
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    check_whole(tmp_path / "run" / "checkpoint-4", world_size=2)


@pytest.mark.parametrize(
    "event, step, found", [("on_train_begin", 0, "0 nothing"), ("on_step_end", 8, "8 checkpoint-8")]
)
def test_two_processes_end_together_at_the_edges(event: str, step: int, found: str, tmp_path: Path) -> None:
    assert ends(tmp_path, event, step) == [found] * 2


def test_transformers_own_way_of_saving_on_sigterm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="enable_jit_checkpoint=True is not honoured by SFTConfig: SIGTERM saves"):
        SFTConfig(output_dir=str(tmp_path), enable_jit_checkpoint=True)
