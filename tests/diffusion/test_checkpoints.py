"""What a run leaves on the disk, going on from it, and what it lets go of."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.errors import UserError
from llmalign.sigterm import Preempted, saving_on_sigterm
from llmalign.trainers.resuming import find_resumable, resolve_resume
from llmalign.trainers.run_folder import guard_output_dir
from tests.diffusion import training
from tests.diffusion.training import pairs, trainer
from tests.trainers.forked import Signalled

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA, WHOLE = (pytest.mark.parametrize("finished", [kind], indirect=True) for kind in ("lora", "whole"))
PASSING = ("_runtime", "_second", "_time")


def run(source: Any, folder: Path, **changes: Any) -> DiffusionPreferenceTrainer:
    """Four steps in two epochs with a checkpoint at every other one, every draw in use; nothing is trained yet."""
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "random_flip": "image", "caption_dropout": 0.3,
        "evaluation": pairs(3, seed=1), "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    return trainer(source, folder, rows=pairs(12), **{**options, **changes})


def weights(built: DiffusionPreferenceTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in built.model.named_parameters() if value.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def history(built: DiffusionPreferenceTrainer) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not k.endswith(PASSING)} for entry in built.state.log_history]


@pytest.fixture(scope="module", params=["lora", "whole"])
def finished(request, tiny_folder, tmp_path_factory):
    """A finished run and its folder, of a pipeline given by its path."""
    folder = tmp_path_factory.mktemp("finished")
    source = str(tiny_folder("sd"))
    peft = training.lora(DiffusionPipeline.from_pretrained(source)) if request.param == "lora" else False
    built = run(source, folder, peft=peft)
    built.train()
    built.save_model()
    return built, folder, peft


# Going on


@pytest.mark.parametrize("step", [1, 3])  # in the middle of the first epoch and at the end of it
def test_resumed_equals_uninterrupted(step, finished, tiny_folder, tmp_path):
    built, folder, peft = finished
    again = run(str(tiny_folder("sd")), tmp_path, peft=peft)
    again.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{step}"))
    assert again.state.global_step == 4
    assert_equal(weights(again), weights(built))
    assert history(again)[:-1] == history(built)[:-1]  # the last one is of the whole run: its time, its mean loss
    assert {entry["step"] for entry in history(again)} == {1, 2, 3, 4}


def test_sigterm_saves_the_running_step(finished, tiny_folder, tmp_path):
    built, _, peft = finished
    stopped = run(str(tiny_folder("sd")), tmp_path, peft=peft, save_strategy="no")
    stopped.add_callback(Signalled("on_step_begin", 2))
    with pytest.raises(Preempted) as ended, saving_on_sigterm():
        stopped.train()
    assert ended.value.checkpoint == tmp_path / "out" / "checkpoint-3"
    again = run(str(tiny_folder("sd")), tmp_path, peft=peft, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(built))


@LORA
def test_the_adapter_that_training_went_on_from_comes_back(finished, tiny_folder, tmp_path):
    _, folder, _ = finished
    options = {"peft": False, "start_adapter": str(folder / "out"), "max_steps": 3}
    whole = run(str(tiny_folder("sd")), tmp_path / "whole", **options)
    copied = {name: value.clone() for name, value in whole.model.adapter_state("ref").items()}
    whole.train()
    kept = tmp_path / "whole" / "out" / "checkpoint-1"
    assert load_file(kept / "adapters" / "ref" / LORA_FILE).keys() == load_file(kept / LORA_FILE).keys()
    again = run(str(tiny_folder("sd")), tmp_path / "again", **options)
    with torch.no_grad():
        for value in again.model.adapter_state("ref").values():
            value += 1  # as if the file had changed since
    again.train(resume_from_checkpoint=str(kept))
    assert_equal(weights(again), weights(whole))
    assert_equal(again.model.adapter_state("ref"), copied)


@pytest.mark.parametrize("lora", [True, False])
def test_the_best_checkpoint_is_loaded(lora, tiny_pipeline, tmp_path):
    built = run(
        tiny_pipeline("sd"), tmp_path, peft=lora, load_best_model_at_end=True, eval_steps=1, max_steps=3,
        metric_for_best_model="eval_error/rejected", greater_is_better=False, learning_rate=3e-2,
    )  # fmt: skip
    built.train()
    measured = {entry["step"]: entry["eval_error/rejected"] for entry in history(built) if "eval_loss" in entry}
    best = min(measured, key=lambda step: measured[step])
    assert best < 3
    assert built.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}") and len(measured) == 3
    saved = load_file(tmp_path / "out" / f"checkpoint-{best}" / (LORA_FILE if lora else UNET))
    if lora:
        assert_equal({f"unet.{name}": value for name, value in built.model.adapter_state().items()}, saved)
    else:
        assert_equal(dict(built.model.network.state_dict()), saved)
    assert built.evaluate()["eval_error/rejected"] == pytest.approx(measured[best], rel=1e-6)


# What is written


def test_a_checkpoint_of_an_adapter_holds_the_adapter_alone(finished):
    built, folder, peft = finished
    checkpoint = folder / "out" / "checkpoint-2"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    rest = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    trained, tensors = sum(value.numel() for value in weights(built).values()), len(weights(built))
    if peft:
        assert files == {LORA_FILE} | rest
        assert 4 * trained < (checkpoint / LORA_FILE).stat().st_size < 4 * trained + 40_000
    else:
        assert files == {UNET, "unet/config.json"} | rest
    # AdamW's two moments, and no state of what is frozen
    assert (checkpoint / "optimizer.pt").stat().st_size < 8 * trained + 1_500 * tensors


def test_the_result_is_what_plain_diffusers_loads(finished, tiny_folder):
    built, folder, peft = finished
    out, source = folder / "out", tiny_folder("sd")
    plain = DiffusionPipeline.from_pretrained(source if peft else out)
    if peft:
        assert not (out / "unet").exists()
        plain.load_lora_weights(out)
    else:
        assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    ours = DiffusionPipeline.from_pretrained(source)
    ours.register_modules(unet=built.model.network)
    start = DiffusionPipeline.from_pretrained(source)
    images = []
    for pipe in (plain, ours, start):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe("digit seven", num_inference_steps=3, generator=generator, output_type="pt").images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert not torch.allclose(images[0], images[2], atol=1e-3)


def test_a_pipeline_made_in_memory_is_written_whole(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd3")
    encoder = pipe.text_encoder_3.state_dict()
    built = trainer(pipe, tmp_path, peft=False, max_steps=1)
    built.train()
    built.save_model()
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_equal(dict(plain.transformer.state_dict()), dict(built.model.network.state_dict()))
    assert_equal(dict(plain.text_encoder_3.state_dict()), dict(encoder))


# Broken ones


@pytest.mark.parametrize("file", ["weights", "optimizer.pt", "no weights"])
def test_a_broken_checkpoint_is_refused_and_skipped(file, finished, tmp_path):
    _, folder, peft = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    weight_file = LORA_FILE if peft else UNET
    newest = tmp_path / "out" / "checkpoint-4"
    broken = newest / (weight_file if "weights" in file else file)
    if file == "no weights":
        broken.unlink()
        fault = "the weights .* are missing"
    else:
        broken.write_bytes(broken.read_bytes()[:-100])
        fault = f"{broken.relative_to(newest)} is cut off or damaged"
    with pytest.raises(UserError, match=f"checkpoint-4 cannot be resumed from: {fault}"):
        resolve_resume(str(newest), str(tmp_path / "out"))
    found, skipped = find_resumable(tmp_path / "out")
    assert found is not None and found.name == "checkpoint-3" and [path.name for path, _ in skipped] == ["checkpoint-4"]


@WHOLE
def test_a_shard_that_is_missing_is_named(finished, tmp_path):
    built, folder, _ = finished
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "out" / "checkpoint-4", checkpoint)
    shutil.rmtree(checkpoint / "unet")
    (checkpoint / "manifest.json").unlink()
    built.model.network.save_pretrained(checkpoint / "unet", max_shard_size="100KB")
    shards = sorted((checkpoint / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and resolve_resume(str(checkpoint), str(tmp_path)) == str(checkpoint)
    shards[0].unlink()
    with pytest.raises(UserError, match=f"the weights {shards[0].name}, named by .* are missing"):
        resolve_resume(str(checkpoint), str(tmp_path))


def test_a_folder_with_a_result_is_not_trained_into(finished, tmp_path):
    _, folder, peft = finished
    for path in (folder / "out").iterdir():
        if path.is_file():
            (tmp_path / "out").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "out")
    left = LORA_FILE if peft else "model_index.json"
    with pytest.raises(UserError, match=rf"holds another run \({left}\)"):
        guard_output_dir(tmp_path / "out", None, {})


def test_a_checkpoint_of_another_kind_is_refused(finished, tiny_pipeline, tmp_path):
    _, folder, peft = finished
    other = run(tiny_pipeline("sd"), tmp_path, peft=not peft)
    with pytest.raises(UserError, match="holds no (weights of the unet|pytorch_lora.*); resume with the recipe that"):
        other.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))


@LORA
def test_a_checkpoint_of_another_rank_is_refused(finished, tiny_pipeline, tmp_path):
    _, folder, _ = finished
    pipe = tiny_pipeline("sd")
    other = run(pipe, tmp_path, peft=training.lora(pipe, rank=3))
    with pytest.raises(UserError, match="do not fit this network .*; resume with the recipe that wrote them"):
        other.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))


# Memory


@pytest.mark.parametrize("lora", [True, False])
def test_what_encoded_leaves_memory(lora, tiny_folder, tmp_path, monkeypatch):
    made: dict[str, weakref.ref] = {}
    load = DiffusionPipeline.from_pretrained.__func__

    def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        pipe = load(cls, *args, **kwargs)
        made.update({name: weakref.ref(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)})
        return pipe

    peft = training.lora(DiffusionPipeline.from_pretrained(tiny_folder("sd"))) if lora else False
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(watched))
    built = run(str(tiny_folder("sd")), tmp_path, peft=peft)
    gc.collect()
    assert made.keys() == {"vae", "text_encoder", "unet"}
    assert {name for name, part in made.items() if part() is not None} == {"unet"}
    assert built.model.network is made["unet"]() and (built.reference is None) == lora
