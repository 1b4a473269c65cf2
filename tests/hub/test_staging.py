"""What goes to the Hub, by kind of run, without a Hub."""

import json
import shutil
from pathlib import Path

import pytest

from llmalign.assets import file_digest
from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.hub.card import write_card
from llmalign.hub.cleaning import cleaned
from llmalign.hub.staging import MANIFEST, kind_of, stage


def test_two_times_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    one = stage(trained, tmp_path / "one", write_card(trained, "me/x"))
    two = stage(trained, tmp_path / "two", write_card(trained, "me/x"))
    assert one.files == two.files and one.kind == "model"
    manifest = json.loads((one.folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_digest(one.folder / name) and entry["size"] == (one.folder / name).stat().st_size


def test_dry_run_writes_and_sends_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(trained), "--repo", "me/x", "--dry-run", "--out", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "README.md").is_file() and "not sent" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["push", str(trained), "--repo", "me/x", "--dry-run", "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "letter.txt").is_file()


def test_an_adapters_base_loses_its_path(tmp_path: Path) -> None:
    run = tmp_path / "lora"
    run.mkdir()
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/models/base", "r": 4}))
    (run / "adapter_model.safetensors").write_bytes(b"weights")
    staged = stage(run, tmp_path / "o", "card")
    assert json.loads((staged.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    staged = stage(run, tmp_path / "o", "card", base="org/base")
    assert json.loads((staged.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    card = write_card(run, "me/lora", base="org/base")
    assert staged.kind == "adapter" and "base_model: org/base" in card and "library_name: peft" in card


def test_a_checkpoint_has_its_runs_recipe_and_local_names_are_no_hub_names(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoint-4"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    recipe = {"method": "dpo", "model_name_or_path": "runs/sft", "dataset_name": "mine/pairs.jsonl", "beta": 0.3}
    (run.parent / "run.json").write_text(json.dumps(recipe))
    card = write_card(run, "me/x")
    assert "| beta | 0.3 |" in card and "2305.18290" in card
    assert "base_model" not in card and "datasets:" not in card


def test_cleaned() -> None:
    nested = {"wandb_api_key": "z", "path": "~/data/pairs.jsonl", "text": "a / b /c"}
    dirty = {"hub_token": "x", "api_key": "y", "tokens": 5, "output_dir": "/home/me/run", "nested": [nested]}
    assert cleaned(dirty) == {
        "tokens": 5, "nested": [{"path": "pairs.jsonl", "text": "a / b /c"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "files, said",
    [
        ([], "holds no model"),
        (["checkpoint-2/x", "checkpoint-10/x"], "has not ended; .*checkpoint-10"),
        (["config.json", "pytorch_model.bin"], "are pickles \\(pytorch_model.bin\\)"),
        (["config.json"], "no weights"),
    ],
)
def test_what_cannot_go(tmp_path: Path, files: list[str], said: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in files:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        stage(run, tmp_path / "o", "card")


@pytest.mark.parametrize("lora", [False, True])
def test_image_models(tmp_path: Path, lora: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    from llmalign.diffusion.tiny import ensure_tiny_pipeline

    run = tmp_path / "run"
    if lora:
        run.mkdir()
        (run / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
        (run / "run.json").write_text(json.dumps({"method": "diffusion_dpo", "model_name_or_path": "org/sd"}))
    else:
        shutil.copytree(ensure_tiny_pipeline(), run)
    assert kind_of(run) == ("image_adapter" if lora else "pipeline")
    card = write_card(run, "me/pictures")
    staged = stage(run, tmp_path / "o", card)
    assert "library_name: diffusers" in card and "text-to-image" in card
    if lora:
        assert 'load_lora_weights("me/pictures")' in card and "base_model: org/sd" in card
        return
    back = diffusers.DiffusionPipeline.from_pretrained(staged.folder)
    assert type(back).__name__ == json.loads((run / "model_index.json").read_text())["_class_name"]
