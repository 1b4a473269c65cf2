"""Loading what was trained: adapters beside their base, runs, and sentences for what is none."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForSequenceClassification

from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.inference import load_for_inference, model_identity, model_name

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes something, with its tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    model, tokenizer = load_for_inference("embedded:tiny", dtype="float32", device="cpu")
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    wrapped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_lies_beside_its_base(adapter: Path) -> None:
    base, _ = load_for_inference("embedded:tiny", dtype="float32", device="cpu")
    model, tokenizer = load_for_inference(str(adapter), dtype="float32", device="cpu")
    assert not model.training and tokenizer.pad_token is not None
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_a_base_can_be_named(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in adapter.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(UserError, match="/gone/model, which is not there: name its base with --base"):
        load_for_inference(str(moved))
    model, _ = load_for_inference(str(moved), base="embedded:tiny", dtype="float32", device="cpu")
    assert torch.equal(
        logits(model), logits(load_for_inference(str(adapter), base=str(ensure_tiny()), device="cpu")[0])
    )


@pytest.mark.parametrize(
    "files, said",
    [
        ([], "holds no model"),
        (["checkpoint-2/config.json", "checkpoint-10/config.json"], "has not ended; .*checkpoint-10"),
        (["model_index.json"], "is an image model"),
        (["config.json"], "no text model can be loaded"),
    ],
)
def test_what_is_no_model_is_said(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        load_for_inference(str(tmp_path))


def test_a_whole_model_has_no_base() -> None:
    with pytest.raises(UserError, match="leave --base out"):
        load_for_inference("embedded:tiny", base="embedded:tiny")
    with pytest.raises(UserError, match="there is no folder"):
        load_for_inference("./nowhere")


def test_names(tmp_path: Path) -> None:
    (tmp_path / "rpo" / "checkpoint-4").mkdir(parents=True)
    assert model_name("org/model") == "org/model"
    assert model_name(f"{tmp_path}/rpo/") == "rpo"
    assert model_name(f"{tmp_path}/rpo/checkpoint-4") == "rpo/checkpoint-4"


def test_dtypes_are_checked_first() -> None:
    with pytest.raises(UserError, match="one of float32, bfloat16, float16, auto, not 'fp16'"):
        load_for_inference("./nowhere", dtype="fp16")


def test_weights_that_are_broken_are_said(tmp_path: Path) -> None:
    shutil.copytree(ensure_tiny(), tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not it.")
    with pytest.raises(UserError, match="no text model can be loaded from"):
        load_for_inference(str(tmp_path / "broken"))


def test_a_reward_model_writes_no_texts(adapter: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(ensure_tiny(), num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="writes none .LlamaForSequenceClassification.; a judge takes it"):
        load_for_inference(str(tmp_path / "reward"))
    shutil.copytree(adapter, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="is an adapter for SEQ_CLS"):
        load_for_inference(str(tmp_path / "lora"))


def test_an_identity_is_of_the_place_and_of_the_base(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(ensure_tiny(), base)
    shutil.copytree(adapter, lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    monkeypatch.chdir(tmp_path)
    before = model_identity("lora")
    assert before == model_identity("./lora") == model_identity(str(lora)) == model_identity("lora", "./base")
    assert before != model_identity("lora", "embedded:tiny")
    os.utime(base / "model.safetensors", (1, 1))
    assert model_identity("lora") != before
