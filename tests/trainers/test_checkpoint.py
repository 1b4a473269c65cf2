"""Checkpoints: whole or not there, refused when something is missing, and rotated after the rename."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import llmalign.trainers.checkpoint as checkpoint
from llmalign.errors import UserError
from llmalign.trainers.checkpoint import (
    SafeCheckpointMixin,
    check_whole,
    find_resumable,
    guard_output_dir,
    record_run,
    resolve_resume,
)


class Texts(Dataset):
    """Sixteen rows of eight token ids."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * (row + 1)) % 31 + 1
        return {"input_ids": ids, "labels": ids}


class SafeTrainer(SafeCheckpointMixin, Trainer):
    """The plainest trainer under the mixin."""


class ScriptedTrainer(SafeTrainer):
    """Evaluation gives the numbers it was told, so that the best step is known."""

    eval_losses = {2: 3.0, 4: 1.0, 6: 2.0}

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.eval_losses[self.state.global_step]}
        self.log(dict(metrics))
        return metrics


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def make(
    output_dir: Path, trainer_class: type[Trainer] = SafeTrainer, model=None, callbacks=None, **options
) -> Trainer:
    fields = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **options}
    args = TrainingArguments(
        output_dir=str(output_dir), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **fields
    )
    model = small_llama() if model is None else model
    return trainer_class(model, args, train_dataset=Texts(), eval_dataset=Texts(), callbacks=callbacks)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make(folder).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_whole_checkpoints_and_nothing_else(finished: Path) -> None:
    assert names(finished) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        check_whole(finished / f"checkpoint-{step}")
        assert json.loads((finished / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step


def test_a_checkpoint_holds_the_same_files_as_the_trainers_own(finished: Path, tmp_path: Path) -> None:
    make(tmp_path / "plain", Trainer).train()
    plain = tmp_path / "plain" / "checkpoint-6"
    assert names(finished / "checkpoint-6") == names(plain)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (finished / "checkpoint-6" / name).read_bytes() == (plain / name).read_bytes(), name
    kept = torch.load(finished / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert kept.save_total_limit is None and kept.push_to_hub is False


class PowerCut(Exception):
    """The process ends here."""


@pytest.mark.parametrize(
    ("when", "stage"),
    [("before", "save_model"), ("before", "_save_optimizer_and_scheduler"), ("after", "_save_rng_state")],
)
def test_a_save_cut_off_shows_no_checkpoint(when: str, stage: str, finished: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run")
    original = getattr(trainer, stage)

    def cut(output_dir: str, *args, **kwargs) -> None:
        if trainer.state.global_step == 4:
            if when == "after":
                original(output_dir, *args, **kwargs)
            raise PowerCut
        original(output_dir, *args, **kwargs)

    setattr(trainer, stage, cut)
    with pytest.raises(PowerCut):
        trainer.train()
    assert [name for name in names(tmp_path / "run") if name != "_incomplete"] == ["checkpoint-2"]
    check_whole(tmp_path / "run" / "checkpoint-2")
    # The next run throws the torn one away and ends where the undisturbed one does.
    make(tmp_path / "run").train(resume_from_checkpoint=resolve_resume("auto", tmp_path / "run"))
    assert names(tmp_path / "run") == names(finished)
    weights = Path("checkpoint-6", "model.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_cut_before_the_rename_shows_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename
    seen: list[str] = []

    def cut(source: Path, target: Path) -> None:
        if Path(target).name == "checkpoint-4":
            seen.extend(path.name for path in sorted(Path(source).iterdir(), key=lambda path: path.stat().st_mtime_ns))
            raise PowerCut
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", cut)
    with pytest.raises(PowerCut):
        make(tmp_path / "run").train()
    assert "optimizer.pt" in seen and seen[-1] == "trainer_state.json"
    assert find_resumable(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", [])


def test_rotation_comes_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename
    renames: list[tuple[str, list[str]]] = []

    def watched(source: Path, target: Path) -> None:
        renames.append((Path(target).parent.name + "/" + Path(target).name, names(tmp_path / "run")))
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", watched)
    make(tmp_path / "run", save_total_limit=1).train()
    assert [target for target, _ in renames] == [
        "run/checkpoint-2",
        "run/checkpoint-4",
        "_incomplete/checkpoint-2",
        "run/checkpoint-6",
        "_incomplete/checkpoint-4",
    ]
    # While the new one is put in its place the old one is still there.
    assert "checkpoint-2" in renames[1][1] and "checkpoint-4" in renames[3][1]
    assert names(tmp_path / "run") == ["checkpoint-6"]


def test_rotation_keeps_what_was_just_saved_beside_a_broken_later_step(run: Path) -> None:
    (run / "checkpoint-6").rename(run / "checkpoint-8")
    (run / "checkpoint-8" / "optimizer.pt").unlink()
    seen: list[list[str]] = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            seen.append(names(run))

    trainer = make(run, save_total_limit=2, callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=resolve_resume("auto", run))
    assert seen == [["checkpoint-4", "checkpoint-6"]]
    check_whole(run / "checkpoint-6")


def test_a_step_saved_again_replaces_the_old_one(run: Path, finished: Path) -> None:
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
    (run / "checkpoint-6" / "leftover").touch()
    make(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert names(run) == names(finished)
    assert names(run / "checkpoint-6") == names(finished / "checkpoint-6")
    check_whole(run / "checkpoint-6")


def test_resumed_by_the_trainer_it_ends_at_the_same_bytes(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "checkpoint-6")
    make(run).train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        assert (run / "checkpoint-6" / name).read_bytes() == (finished / "checkpoint-6" / name).read_bytes()


@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_checkpoint_is_named_where_it_ends_up(strategy: str, limit: int | None, tmp_path: Path) -> None:
    trainer = make(
        tmp_path / "run",
        ScriptedTrainer,
        save_strategy=strategy,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=limit,
        load_best_model_at_end=True,
    )
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs) -> None:
            kept[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer.add_callback(Keep())
    trainer.train()
    best = tmp_path / "run" / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        step = int(folder.name.split("-")[1])
        expected = str(tmp_path / "run" / f"checkpoint-{min(step, 4)}")
        assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] == expected
    loaded = trainer.model.state_dict()
    assert all(torch.equal(loaded[name], kept[4][name]) for name in loaded)
    assert not all(torch.equal(loaded[name], kept[6][name]) for name in loaded)
    if limit == 1:
        assert names(tmp_path / "run") == ["checkpoint-4"]


def test_the_push_to_the_hub_sees_the_final_folder(tmp_path: Path) -> None:
    pushed: list[tuple[str, bool]] = []

    class Base(Trainer):
        def _push_from_checkpoint(self, folder: str) -> None:
            pushed.append(
                (Path(folder).relative_to(tmp_path).as_posix(), (Path(folder) / "trainer_state.json").exists())
            )

    class Pushing(SafeCheckpointMixin, Base):
        pass

    trainer = make(tmp_path / "run", Pushing, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [("run/checkpoint-2", True)]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.pt", "the optimizer state (optimizer.pt) is missing"),
        ("scheduler.pt", "the scheduler state (scheduler.pt) is missing"),
        ("rng_state.pth", "the random state (rng_state.pth) is missing"),
        ("trainer_state.json", "trainer_state.json, which is written last, is missing"),
        ("model.safetensors", "the weights (model.safetensors or adapter_model.safetensors) are missing"),
    ],
)
def test_a_missing_file_is_an_error_that_names_it(name: str, said: str, run: Path) -> None:
    (run / "checkpoint-6" / name).unlink()
    with pytest.raises(UserError) as error:
        check_whole(run / "checkpoint-6")
    assert str(error.value) == (
        f"{run / 'checkpoint-6'} cannot be resumed from: {said}; "
        "resume from another checkpoint, or start again in a new output_dir."
    )
    # The Trainer alone would go on without most of these.
    with pytest.raises(UserError, match="cannot be resumed from"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["half", "one byte short", "empty", "a hole"])
def test_a_damaged_file_is_an_error_that_names_it(name: str, damage: str, run: Path) -> None:
    path = run / "checkpoint-6" / name
    content = path.read_bytes()
    if damage == "one byte short" and name == "trainer_state.json":
        content = content.rstrip()
    middle = len(content) // 2
    damaged = {
        "half": content[:middle],
        "one byte short": content[:-1],
        "empty": b"",
        "a hole": content[: middle - 40] + content[middle + 40 :],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=f"{name} is cut off or damaged"):
        check_whole(run / "checkpoint-6")


def test_weights_longer_than_their_header_says_are_damaged(run: Path) -> None:
    with (run / "checkpoint-6" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="model.safetensors is cut off or damaged"):
        check_whole(run / "checkpoint-6")


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    # Times mislead after a copy; the step in the name does not.
    os.utime(run / "checkpoint-2")
    (run / "_incomplete" / "checkpoint-8").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        assert resolve_resume("auto", run) == str(run / "checkpoint-4")
    assert f"Skipped {run / 'checkpoint-6'}: the optimizer state (optimizer.pt) is missing." in caplog.messages
    assert f"Resuming from {run / 'checkpoint-4'}, the newest whole checkpoint." in caplog.messages
    assert f"{run / '_incomplete'} holds a checkpoint whose writing was cut off; it is not used." in caplog.messages
    assert find_resumable(run)[1] == [(run / "checkpoint-6", "the optimizer state (optimizer.pt) is missing")]


def test_steps_are_ordered_as_numbers(run: Path) -> None:
    (run / "checkpoint-6").rename(run / "checkpoint-10")
    assert resolve_resume("auto", run) == str(run / "checkpoint-10")


def test_auto_starts_from_the_beginning_where_there_is_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert resolve_resume("auto", tmp_path / "new") is None
    assert caplog.messages == [f"{tmp_path / 'new'} holds no checkpoint: starting from the beginning."]
    assert resolve_resume(None, tmp_path / "new") is None


def test_auto_refuses_when_no_checkpoint_is_whole(run: Path) -> None:
    for step, name in ((2, "scheduler.pt"), (4, "rng_state.pth"), (6, "optimizer.pt")):
        (run / f"checkpoint-{step}" / name).unlink()
    with pytest.raises(UserError) as error:
        resolve_resume("auto", run)
    for part in ("checkpoint-2: the scheduler", "checkpoint-4: the random", "checkpoint-6: the optimizer"):
        assert part in str(error.value)


def test_a_named_checkpoint_is_checked(run: Path) -> None:
    assert resolve_resume(str(run / "checkpoint-2"), run) == str(run / "checkpoint-2")
    with pytest.raises(UserError, match="there is no such folder"):
        resolve_resume(str(run / "checkpoint-3"), run)
    with pytest.raises(UserError, match="it is a run, not a checkpoint; name one of its folders, such as checkpoint-6"):
        resolve_resume(str(run), run)


def test_weights_alone_are_not_resumable(tmp_path: Path) -> None:
    make(tmp_path / "run", save_only_model=True, max_steps=2).train()
    with pytest.raises(UserError, match=r"holds weights alone \(save_only_model\)"):
        check_whole(tmp_path / "run" / "checkpoint-2")


def test_every_shard_of_an_index_must_be_there_and_whole(run: Path) -> None:
    folder = run / "checkpoint-6"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(run / "checkpoint-4").save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and len(weights) > 2
    check_whole(folder)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-4])
    with pytest.raises(UserError, match=f"{shards[1].name} is cut off or damaged"):
        check_whole(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"the weights {shards[1].name}, named by model.safetensors.index.json"):
        check_whole(folder)


def test_the_random_state_of_every_process_is_needed(run: Path) -> None:
    folder = run / "checkpoint-6"
    with pytest.raises(UserError, match="1 process.* left their random state and this run has 2"):
        check_whole(folder, world_size=2)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    with pytest.raises(UserError, match=r"the random state \(rng_state_1.pth\) is missing"):
        check_whole(folder, world_size=2)
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    check_whole(folder, world_size=2)
    with pytest.raises(UserError, match="2 process.* left their random state and this run has 1"):
        check_whole(folder)


def test_sharded_layouts_are_not_refused(run: Path) -> None:
    fsdp, deepspeed = run / "checkpoint-4", run / "checkpoint-6"
    for folder in (fsdp, deepspeed):
        (folder / "optimizer.pt").unlink()
        (folder / "model.safetensors").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
        (fsdp / name / ".metadata").touch()
        (fsdp / name / "__0_0.distcp").touch()
    check_whole(fsdp)
    (fsdp / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(UserError, match="optimizer_0/.metadata is missing"):
        check_whole(fsdp)

    (deepspeed / "scheduler.pt").unlink()
    (deepspeed / "latest").write_text("global_step6")
    states = deepspeed / "global_step6"
    states.mkdir()
    torch.save({"module": {}}, states / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"optimizer": {}}, states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    check_whole(deepspeed)
    (states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="optim_states.pt is cut off or damaged"):
        check_whole(deepspeed)


def test_an_adapter_is_weights_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def model():
        torch.manual_seed(0)
        return get_peft_model(small_llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))

    make(tmp_path / "run", model=model()).train()
    final = (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    check_whole(tmp_path / "run" / "checkpoint-4")
    make(tmp_path / "run", model=model()).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == final
    (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").write_bytes(final[:-1])
    with pytest.raises(UserError, match="adapter_model.safetensors is cut off or damaged"):
        check_whole(tmp_path / "run" / "checkpoint-6")


# --- the output folder -----------------------------------------------------------------------------------------------

RECIPE = {"method": "rpo", "beta": 0.1, "logging_steps": 10, "hub_token": "hf_secret", "betas": (0.9, 0.99)}


def test_an_empty_folder_is_free_and_a_used_one_is_not(run: Path, tmp_path: Path) -> None:
    guard_output_dir(tmp_path / "new", None, RECIPE)
    guard_output_dir(tmp_path / "new", "auto", RECIPE)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"holds another run \(checkpoint-2\); go on with it by --resume auto"):
        guard_output_dir(run, None, RECIPE)


@pytest.mark.parametrize("trace", ["run.json", "model.safetensors", "adapter_model.safetensors", "_incomplete"])
def test_each_trace_of_a_run_counts(trace: str, tmp_path: Path) -> None:
    (tmp_path / trace).touch()
    with pytest.raises(UserError, match="holds another run"):
        guard_output_dir(tmp_path, None, RECIPE)


def test_the_recipe_is_kept_without_secrets_and_may_change_where_harmless(run: Path) -> None:
    record_run(run, RECIPE)
    assert json.loads((run / "run.json").read_text()) == {
        "method": "rpo",
        "beta": 0.1,
        "logging_steps": 10,
        "betas": [0.9, 0.99],
    }
    assert not list(run.glob("*.tmp"))
    guard_output_dir(run, "auto", RECIPE)
    guard_output_dir(run, "auto", {**RECIPE, "logging_steps": 1, "hub_token": None})
    guard_output_dir(run, str(run / "checkpoint-4"), RECIPE)


def test_a_recipe_that_changes_the_result_is_refused_by_key(run: Path, tmp_path: Path) -> None:
    record_run(run, RECIPE)
    changed = {**RECIPE, "beta": 0.2, "eta": 1.0}
    del changed["method"]
    for resume in ("auto", str(run / "checkpoint-4")):
        with pytest.raises(UserError, match=r"\(beta 0.1 -> 0.2, eta None -> 1.0, method 'rpo' -> None\)"):
            guard_output_dir(run, resume, changed)
    # Going on in another folder from this run's checkpoint is the same run.
    guard_output_dir(tmp_path / "new", str(run / "checkpoint-4"), RECIPE)
    with pytest.raises(UserError, match="beta 0.1 -> 0.2"):
        guard_output_dir(tmp_path / "new", str(run / "checkpoint-4"), {**RECIPE, "beta": 0.2})
    # But not in a folder that has a run of its own.
    record_run(tmp_path / "taken", RECIPE)
    with pytest.raises(UserError, match=r"holds another run \(run.json\)"):
        guard_output_dir(tmp_path / "taken", str(run / "checkpoint-4"), RECIPE)


def test_a_run_stopped_before_its_first_checkpoint_may_start_over_changed(tmp_path: Path) -> None:
    record_run(tmp_path, RECIPE)
    guard_output_dir(tmp_path, "auto", {**RECIPE, "beta": 0.2})


def test_weights_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds weights of another origin"):
        guard_output_dir(tmp_path, "auto", RECIPE)


def test_only_the_first_rank_looks_and_writes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    guard_output_dir(run, None, RECIPE)
    record_run(run, RECIPE)
    assert not (run / "run.json").exists()


# --- several processes -----------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_checkpoint import make

trainer = make(Path(sys.argv[2]), save_total_limit=2)
assert trainer.args.world_size == 2, trainer.args.world_size
trainer.train(resume_from_checkpoint=True)
"""


@pytest.mark.slow
def test_two_processes_write_one_whole_checkpoint_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(Path(__file__).parent), str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=300)
    assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    check_whole(tmp_path / "run" / "checkpoint-6", world_size=2)
    weights = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    uninterrupted = weights.read_bytes()
    weights.write_bytes(uninterrupted[:-1])
    subprocess.run(command, check=True, timeout=300)
    assert weights.read_bytes() == uninterrupted
    with pytest.raises(UserError, match="2 process.* left their random state and this run has 1"):
        resolve_resume("auto", tmp_path / "run")
