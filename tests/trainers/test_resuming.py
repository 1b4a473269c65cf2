"""Going on from a checkpoint: what is missing or damaged is named, and an output folder keeps to one run."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from llmalign.errors import UserError
from llmalign.trainers.manifest import MANIFEST, files_of, write_manifest
from llmalign.trainers.resuming import check_whole, find_resumable, resolve_resume
from llmalign.trainers.run_folder import guard_output_dir, record_run
from llmalign.trainers.soundness import fault
from tests.trainers.toy_runs import make, small_llama


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


def remove_manifests(run: Path) -> Path:
    """What an older version would have left."""
    for manifest in run.glob(f"*/{MANIFEST}"):
        manifest.unlink()
    return run


def remade(folder: Path, processes: int = 1) -> None:
    """Give a checkpoint whose files were put there by hand the manifest that it would have been written with."""
    write_manifest(folder, files_of(folder), step=6, processes=processes, rows_per_step=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.pt", "the optimizer state (optimizer.pt) is missing"),
        ("scheduler.pt", "the scheduler state (scheduler.pt) is missing"),
        ("rng_state.pth", "the random state (rng_state.pth) is missing"),
        ("trainer_state.json", "trainer_state.json, without which no checkpoint is complete, is missing"),
        ("model.safetensors", "the weights (model.safetensors, adapter_model.safetensors or a pipeline's) are missing"),
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


@pytest.mark.parametrize("place, value", [(8, 1), (10, 99)])
def test_a_flipped_byte_that_calls_an_archive_encrypted_or_newer_is_damage(place: int, value: int, run: Path) -> None:
    """In the entry of the archive's directory, whose flags are at 8 and whose method is at 10."""
    file = remove_manifests(run) / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x01\x02") + place] = value
    file.write_bytes(bytes(content))
    assert "optimizer.pt is cut off or damaged" in fault(run / "checkpoint-4", 1)


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
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(run / "checkpoint-4").save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    check_whole(remove_manifests(run) / "checkpoint-6")
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-4])
    with pytest.raises(UserError, match=f"{shards[1].name} is cut off or damaged"):
        check_whole(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"the weights {shards[1].name}, named by model.safetensors.index.json"):
        check_whole(folder)


def test_the_random_state_of_every_process_is_needed(run: Path) -> None:
    folder = run / "checkpoint-6"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    remade(folder, processes=2)
    for world_size in (1, 2):  # how many go on changes nothing: the manifest tells how many there were
        with pytest.raises(UserError, match=r"the random state \(rng_state_1.pth\) is missing"):
            check_whole(folder, world_size=world_size)
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    remade(folder, processes=2)
    for world_size in (1, 2):
        check_whole(folder, world_size=world_size)
    (folder / "rollout_0.pt").write_bytes((folder / "optimizer.pt").read_bytes())
    remade(folder, processes=2)
    check_whole(folder, world_size=2)
    with pytest.raises(UserError, match="2 process.* wrote it, each with a rollout of its own, and this run has 1; st"):
        check_whole(folder, world_size=1)


def test_sharded_layouts_are_not_refused(run: Path) -> None:
    fsdp, deepspeed = run / "checkpoint-4", remove_manifests(run) / "checkpoint-6"
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


def test_tied_weights_are_loaded_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tied() -> LlamaForCausalLM:
        model = small_llama()
        return LlamaForCausalLM(type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": True}))

    torch.manual_seed(1)
    whole = make(tmp_path / "run", model=tied(), max_steps=4)
    whole.train()
    caplog.clear()
    caplog.set_level(logging.WARNING, logger="transformers")  # which the command line sets to another
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    resumed = make(tmp_path / "run", model=tied(), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "missing keys" not in caplog.text
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(weight, other[1]), name
    untied = make(tmp_path / "other", model=small_llama())
    untied._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert "missing keys" in caplog.text
