"""Memory, disk and rights that run out for real: the sentence, what is left of the run, and that it goes on."""

import errno
import os
import resource
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from llmalign import OnlineCoPGConfig, RPOConfig, SFTConfig
from llmalign.errors import OneProcessError, UserError
from llmalign.trainers.less_memory import advice
from llmalign.trainers.resuming import ASIDE, find_resumable
from llmalign.trainers.running_out import (
    FULL,
    LOST,
    MEMORY,
    Resources,
    estimated_checkpoint,
    remove_half_written,
    require_writable,
    shortage,
    where_to_go_on,
)
from tests.trainers.toy_runs import make, names

HUGE = 1 << 60
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False}


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.what()


def run(trainer):
    """Train as `llmalign train` does; what it says where something runs out."""
    with pytest.raises(OneProcessError) as told, Resources(trainer.args, peft=False) as resources:
        resources.expect(trainer)
        trainer.train()
    return str(told.value)


@pytest.fixture
def file_size():
    """Sets the largest file that this process may write, and takes that back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Not the weights; the weights and not the optimizer, which fails among other tests for a reason not yet found.
@pytest.mark.parametrize("limit", [12_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, file_size, limit):
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path / "run", callbacks=[At(4, lambda: file_size(limit))])
    said = run(trainer)
    file_size(resource.RLIM_INFINITY)
    for words in (str(tmp_path / "run"), "save_total_limit: 1", "save_only_model: true", "half-written is removed",
                  "goes on from checkpoint-2"):  # fmt: skip
        assert words in said
    assert not (tmp_path / "run" / ASIDE).exists()
    assert find_resumable(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", [])
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])


def test_a_folder_that_became_a_file(tmp_path):
    def replace_folder():
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        (tmp_path / "run").write_text("")

    said = run(make(tmp_path / "run", callbacks=[At(4, replace_folder)]))
    assert "cannot be written" in said and "see to the disk" in said
    assert find_resumable(tmp_path / "elsewhere")[0] == tmp_path / "elsewhere" / "checkpoint-2"


def test_memory_that_no_machine_has(tmp_path):
    said = run(make(tmp_path, callbacks=[At(4, lambda: torch.empty(HUGE))], gradient_accumulation_steps=3))
    for words in ("Memory ran out after step 3 (", "allocate", "activation_checkpointing: true",
                  "per_device_train_batch_size: 1 with gradient_accumulation_steps: 6", "goes on from checkpoint-2",
                  "--accelerate zero3"):  # fmt: skip
        assert words in said


def test_the_checkpointing_that_is_advised_goes_on_to_the_same_weights(tmp_path):
    """Bit by bit, dropout included: what is computed again draws the same random numbers."""
    whole = make(tmp_path / "whole")
    whole.train()
    run(make(tmp_path / "run", callbacks=[At(4, lambda: torch.empty(HUGE))]))
    resumed = make(tmp_path / "run", gradient_checkpointing=True)
    assert not whole.model.is_gradient_checkpointing
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.is_gradient_checkpointing
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])


def full_disk():
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def full_disk_by_torch():
    torch.save({"weights": torch.zeros(100_000)}, "/dev/full")


def full_disk_for_reasons_of_its_own():
    try:
        full_disk()
    except OSError as error:
        raise ValueError("the trainer could not be built") from error


def no_memory():
    torch.empty(HUGE)


def no_memory_of_numpy():
    import numpy

    numpy.empty(1 << 47)  # a pebibyte


def no_memory_of_python():
    bytes(1 << 62)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (full_disk, FULL), (full_disk_by_torch, LOST), (full_disk_for_reasons_of_its_own, FULL), (no_memory, MEMORY),
        (no_memory_of_numpy, MEMORY), (no_memory_of_python, MEMORY),
    ],
)  # fmt: skip
def test_what_libraries_raise_is_known(tmp_path, cause, kind):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        cause()
    found = shortage(raised.value, tmp_path)
    assert found is not None and found.kind == kind and found.reason and "\n" not in found.reason


def test_safetensors_and_its_number(tmp_path, file_size):
    file_size(1000)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        save_file({"weights": torch.zeros(10_000)}, tmp_path / "model.safetensors")
    file_size(resource.RLIM_INFINITY)
    assert shortage(raised.value, tmp_path).kind == FULL


def test_another_process_that_is_gone(tmp_path):
    words = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45703."
    with pytest.raises(OneProcessError, match="Another process of this run has ended") as told:
        with Resources(make(tmp_path).args, peft=False):
            raise RuntimeError(words)
    assert "--resume auto" in str(told.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"), RuntimeError("shapes do not match"), KeyError("No space left"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/somewhere/else.txt"),
    ],
)  # fmt: skip
def test_other_errors_stay_what_they_are(tmp_path, error):
    assert shortage(error, tmp_path) is None
    with pytest.raises(type(error)) as raised, Resources(make(tmp_path).args, peft=False):
        raise error
    assert raised.value is error


def test_a_refusal_stays_a_refusal(tmp_path):
    with pytest.raises(UserError) as raised, Resources(make(tmp_path).args, peft=False):
        raise UserError("the reference is given twice")
    assert not isinstance(raised.value, OneProcessError)


def test_only_what_the_run_began_to_write_is_removed(tmp_path):
    began = time.time()
    for name in ("notes.json", "model.ggml.bin", "own.tmp", "config.json", "model.tmp"):
        (tmp_path / name).write_text("cut off")
    for name in ("notes.json", "model.ggml.bin", "own.tmp"):
        os.utime(tmp_path / name, (began - 60,) * 2)
    (tmp_path / ASIDE).mkdir()
    assert remove_half_written(tmp_path, began)
    assert names(tmp_path) == ["model.ggml.bin", "notes.json", "own.tmp"]


def test_where_to_go_on_promises_what_is_kept(tmp_path):
    assert where_to_go_on(str(tmp_path)) == "--resume auto starts from the beginning (there is no checkpoint yet)"
    make(tmp_path, max_steps=4).train()
    assert where_to_go_on(str(tmp_path)) == "--resume auto goes on from checkpoint-4"
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert where_to_go_on(str(tmp_path)) == "--resume auto goes on from checkpoint-2"
    (tmp_path / "checkpoint-2" / "scheduler.pt").write_bytes(b"")
    assert "can be gone on from" in where_to_go_on(str(tmp_path)) and find_resumable(tmp_path)[0] is None
    make(tmp_path / "alone", max_steps=2, save_only_model=True).train()
    assert where_to_go_on(str(tmp_path / "alone")).startswith("a new run can start from the weights in checkpoint-2")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    require_writable(str(tmp_path / "a" / "b"))
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        require_writable(str(tmp_path / "file" / "run"))


def test_a_disk_that_is_too_small_is_said_before_training(tmp_path, caplog):
    trainer = make(tmp_path)
    needed = estimated_checkpoint(trainer)
    trainer.train()
    written = sum((tmp_path / "checkpoint-6" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert needed < written < 1.3 * needed  # the weights are few, so that headers count
    trainer.args = replace(trainer.args, save_total_limit=HUGE)  # more than any disk holds
    with caplog.at_level("WARNING"), Resources(trainer.args, peft=False) as resources:
        resources.expect(trainer)
    assert "a checkpoint takes about" in caplog.text and "make room for" in caplog.text


def test_advice_follows_from_the_values(tmp_path):
    rpo = RPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=6, gradient_accumulation_steps=2,
                    max_length=512, per_device_eval_batch_size=8, **QUIET)  # fmt: skip
    found = advice(rpo, peft=False)
    assert found.same == [
        "activation_checkpointing: true", "per_device_train_batch_size: 3 with gradient_accumulation_steps: 4",
    ]  # fmt: skip
    assert found.other[:3] == [
        "use_peft: true", "precompute_ref_log_probs: true (no second model beside the policy)", "max_length: 256",
    ]  # fmt: skip
    assert advice(rpo, peft=False, running=["evaluation_loop"]).same[0] == "per_device_eval_batch_size: 4"
    by_tokens = RPOConfig(output_dir=str(tmp_path), tokens_per_batch=4096, activation_checkpointing=True, **QUIET)
    assert advice(by_tokens, peft=True).same == [] and "tokens_per_batch: 2048" in advice(by_tokens, peft=True).other
    sampled = OnlineCoPGConfig(output_dir=str(tmp_path), per_device_train_batch_size=12, num_generations=4, **QUIET)
    found = advice(sampled, peft=True, any_split=False)
    assert "per_device_train_batch_size: 4 with gradient_accumulation_steps: 3" in found.other
    assert "num_generations: 2" in found.other and "max_completion_length: 256" in found.other
    assert advice(sampled, peft=True, running=["_generate_single_turn"]).other[0] == "sampling_batch_size: 6"
    sft = advice(SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=1, **QUIET), peft=True)
    assert sft.same == ["activation_checkpointing: true"]
    assert advice(rpo, peft=False, running=["from_pretrained"]).other[0] == "dtype: bfloat16"
