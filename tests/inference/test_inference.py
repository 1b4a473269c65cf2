"""Loading what was trained: adapters beside their base, runs, and sentences for what is none."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.inference import load_for_inference, model_name

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
