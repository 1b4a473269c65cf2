"""Writing checkpoints: whole or not there, the same files as the Trainer's own, and rotated after the rename."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

import llmalign.trainers.checkpoint as checkpoint
from llmalign.errors import UserError
from llmalign.trainers.checkpoint import SafeCheckpointMixin
from llmalign.trainers.resuming import check_whole, find_resumable, resolve_resume
from tests.trainers.toy_runs import SafeTrainer, make, names


class ScriptedTrainer(SafeTrainer):
    """Evaluation gives the numbers it was told, so that the best step is known."""

    eval_losses = {2: 3.0, 4: 1.0, 6: 2.0}

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.eval_losses[self.state.global_step]}
        self.log(dict(metrics))
        return metrics


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


def test_a_run_leaves_whole_checkpoints_and_nothing_else(finished: Path) -> None:
    assert names(finished) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        check_whole(finished / f"checkpoint-{step}")
        assert json.loads((finished / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step


def test_a_checkpoint_holds_the_same_files_as_the_trainers_own(finished: Path, tmp_path: Path) -> None:
    make(tmp_path / "plain", Trainer).train()
    plain = tmp_path / "plain" / "checkpoint-6"
    assert names(finished / "checkpoint-6") == sorted([*names(plain), "manifest.json"])
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
    assert "optimizer.pt" in seen and seen[-2:] == ["trainer_state.json", "manifest.json"]
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


TWO_PROCESSES = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from llmalign.processes import end_processes, load_group_users
from tests.trainers.toy_runs import make

load_group_users()
trainer = make(Path(sys.argv[2]), save_total_limit=2)
assert trainer.args.world_size == 2, trainer.args.world_size
trainer.train(resume_from_checkpoint=True)
del trainer
end_processes(together=True)
"""


@pytest.mark.slow
def test_two_processes_write_one_whole_checkpoint_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(Path(__file__).parents[2]), str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=300)
    assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    check_whole(tmp_path / "run" / "checkpoint-6", world_size=2)
    weights = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    uninterrupted = weights.read_bytes()
    weights.write_bytes(uninterrupted[:-1])
    subprocess.run(command, check=True, timeout=300)
    assert weights.read_bytes() == uninterrupted
    with pytest.raises(UserError, match="written by 2 process.* and this run has 1.*because dropout .* draws random"):
        make(tmp_path / "run", per_device_train_batch_size=4).train(resume_from_checkpoint=True)
