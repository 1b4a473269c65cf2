"""Every file of the newest checkpoint cut off, emptied, changed or gone: the one before is used, which is said."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmalign.errors import UserError
from llmalign.trainers.manifest import MANIFEST, files_of, write_manifest
from llmalign.trainers.resuming import check_whole, find_resumable, resolve_resume
from llmalign.verify import verify
from tests.invariants.every_trainer import TRAINERS

OLDER, NEWEST = "checkpoint-1", "checkpoint-2"


def changed(content: bytes) -> bytes:
    """One bit, in the middle, is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "one bit changed": changed,
    "missing": lambda content: None,
}


def of_fsdp(folder: Path) -> None:
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(b"where each part of a tensor lies")
        (folder / name / "__0_0.distcp").write_bytes(bytes(range(200)))
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")


def of_deepspeed(folder: Path) -> None:
    states = folder / "global_step2"
    states.mkdir()
    (folder / "latest").write_text(states.name)
    torch.save({"module": torch.arange(8)}, states / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"optimizer": torch.arange(8)}, states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def by_hand(fill: Callable[[Path], None], run: Path) -> None:
    """Two checkpoints as sharded training leaves them."""
    for step, name in ((1, OLDER), (2, NEWEST)):
        folder = run / name
        folder.mkdir(parents=True)
        fill(folder)
        torch.save({"cpu": torch.arange(8)}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        write_manifest(folder, files_of(folder), step=step, processes=1, rows_per_step=4)


def trained(kind: str, run: Path) -> None:
    trainer = TRAINERS[kind](run)
    trainer.args.max_steps = 2
    trainer.train()


KINDS: dict[str, Callable[[Path], None]] = {
    **{kind: lambda run, kind=kind: trained(kind, run) for kind in ("pairs", "pairs-lora", "pf_ppo", "images")},
    "fsdp": lambda run: by_hand(of_fsdp, run),
    "deepspeed": lambda run: by_hand(of_deepspeed, run),
}


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, which a test leaves as it was."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    KINDS[request.param](folder)
    if request.param == "pf_ppo":  # in the middle of a rollout, with a critic
        assert {"rollout_0.pt", "critic.safetensors"} <= set(files_of(folder / NEWEST))
    return folder


def hurt(file: Path, damage: str) -> bool:
    """Damage a file; whether there was something to damage."""
    content = DAMAGES[damage](file.read_bytes()) if file.stat().st_size else None
    if content is None and damage != "missing":
        return False
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return True


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_used(run: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    names = [*files_of(run / NEWEST), MANIFEST]
    assert len(names) >= 6
    for name in names:
        file = run / NEWEST / name
        content = file.read_bytes()
        if not hurt(file, damage):
            continue
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert resolve_resume("auto", run) == str(run / OLDER), name
        said = [message for message in caplog.messages if message.startswith(f"Skipped {run / NEWEST}: ")]
        assert len(said) == 1 and (Path(name).name in said[0] or damage == "missing"), (name, caplog.messages)
        assert f"Resuming from {run / OLDER}, the newest whole checkpoint." in caplog.messages
        with pytest.raises(UserError, match="cannot be resumed from"):
            check_whole(run / NEWEST)
        broken = {one.name: one.faults for one in verify(run) if one.faults}
        assert list(broken) == [NEWEST] and (name in broken[NEWEST][0] or name == MANIFEST), (name, broken)
        file.write_bytes(content)
    assert find_resumable(run) == (run / NEWEST, [])


def test_with_none_left_each_is_named_with_its_fault(run: Path) -> None:
    kept = {name: (run / name / "trainer_state.json").read_bytes() for name in (OLDER, NEWEST)}
    for name, content in kept.items():
        (run / name / "trainer_state.json").write_bytes(changed(content))
    with pytest.raises(UserError) as error:
        resolve_resume("auto", run)
    for name in kept:
        assert f"{name}: trainer_state.json is cut off or damaged: its SHA-256 is" in str(error.value)
    assert str(error.value).endswith("start again in a new output_dir, or delete these checkpoints.")
    for name, content in kept.items():
        (run / name / "trainer_state.json").write_bytes(content)


def test_without_manifests_the_structure_is_checked_and_that_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = tmp_path / "run"
    shutil.copytree(run, older)
    for manifest in older.rglob(MANIFEST):
        manifest.unlink()
    with caplog.at_level(logging.INFO):
        assert resolve_resume("auto", older) == str(older / NEWEST)
    assert any(
        "has no manifest.json: the structure of its files was checked, not their bytes" in m for m in caplog.messages
    )
    assert {one.verdict for one in verify(older)} >= {"whole in structure (no manifest)"}
    state = older / NEWEST / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-3])
    assert find_resumable(older)[0] == older / OLDER
