"""Adapters merged into their base: the same answers without PEFT, and sentences for what cannot be merged."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.export.files import file_aside, folder_aside
from llmalign.export.merge import load_whole, merge_adapter
from llmalign.inference import load_for_inference
from tests.export import models

IDS = torch.tensor([[5, 9, 40, 41, 42, 7]])
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
Adapters = Callable[..., Path]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Makes the folder of an adapter on a base of its own, as a run leaves it."""

    def make(config: Any, kind: str = "llama", dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("runs")
        tokenizer = models.byte_level("gpt-2")
        base = models.model_of(kind, tokenizer).to(getattr(torch, dtype))
        base.generation_config.eos_token_id = [tokenizer.eos_token_id, 6]
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        torch.manual_seed(1)
        loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        get_peft_model(loaded, config).save_pretrained(folder / "lora")
        tokenizer.save_pretrained(folder / "lora")
        return folder / "lora"

    return make


@pytest.fixture(scope="module")
def lora(adapters: Adapters) -> Path:
    return adapters(LoraConfig(**LORA, target_modules="all-linear"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Input and output embeddings are no longer")
@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_merged_answers_as_beside_its_base(
    kind: str, options: dict[str, Any], adapters: Adapters, tmp_path: Path
) -> None:
    folder = adapters(LoraConfig(**LORA, **options), kind)
    if options.get("modules_to_save"):  # as training would change it
        _change_saved_module(folder)
    merged = merge_adapter(str(folder), tmp_path / "merged")
    beside, _ = load_for_inference(str(folder), dtype="float32", device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert whole.dtype == torch.float32 and merged.gap < 1e-4
    assert (logits(whole) - logits(beside)).abs().max() < 1e-5 * logits(beside).abs().max()
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    assert (logits(whole) - logits(base)).abs().max() > 0.1


def _change_saved_module(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    (name,) = [name for name in weights if "lm_head" in name]
    weights[name] = weights[name] + 0.3 * torch.randn_like(weights[name])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_what_is_written(lora: Path, tmp_path: Path) -> None:
    merge_adapter(str(lora), tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names) and [p.name for p in tmp_path.iterdir()] == ["merged"]
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as weights:
        assert not any("lora" in name or "base_layer" in name for name in weights.keys())
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, 6] and tokenizer.pad_token == "<pad>"


def test_rounded_once_to_the_dtype_of_the_base(adapters: Adapters, tmp_path: Path) -> None:
    folder = adapters(LoraConfig(**LORA, target_modules="all-linear"), dtype="bfloat16")
    assert merge_adapter(str(folder), tmp_path / "merged").dtype == "bfloat16"
    whole, _ = load_whole(str(folder))
    assert whole.dtype == torch.float32
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, weight in whole.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight.bfloat16()), name
    assert merge_adapter(str(folder), tmp_path / "other", dtype="float16").dtype == "float16"


def test_another_base_can_be_named(lora: Path, tmp_path: Path) -> None:
    moved = tmp_path / "base"
    shutil.copytree(lora.parent / "base", moved)
    whole, _ = load_whole(str(lora), base=str(moved))
    assert torch.equal(logits(whole), logits(load_whole(str(lora))[0]))


def test_what_cannot_be_merged_is_said(lora: Path, adapters: Adapters, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    for source, said in (
        (lora.parent / "base", "a whole model: there is no adapter to merge"),
        (adapters(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "kind PROMPT_TUNING"),
        (tmp_path, "holds no model"),
    ):
        with pytest.raises(UserError, match=said):
            merge_adapter(str(source), out)
    with pytest.raises(UserError, match="float32, bfloat16, float16, not 'int8'"):
        merge_adapter(str(lora), out, dtype="int8")
    assert not out.exists()


def test_an_adapter_for_another_task_is_refused(lora: Path, tmp_path: Path) -> None:
    scorer = tmp_path / "scorer"
    shutil.copytree(lora, scorer)
    config = json.loads((scorer / "adapter_config.json").read_text())
    (scorer / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="for SEQ_CLS, not for a model that answers"):
        merge_adapter(str(scorer), tmp_path / "merged")


def test_a_quantised_base_is_refused(lora: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(lora.parent / "base", base)
    config = json.loads((base / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(UserError, match=r"stored quantised \(bitsandbytes\).*unquantised model with --base"):
        merge_adapter(str(lora), tmp_path / "merged", base=str(base))


def test_training_beside_a_quantised_base_is_said(lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora, run / "checkpoint-3")
    (run / "run.json").write_text(json.dumps({"method": "rpo", "load_in_4bit": True}))
    load_whole(str(run / "checkpoint-3"))
    assert "4- or 8-bit weights" in caplog.text


def test_an_output_that_is_there_is_kept(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give --overwrite"):
        merge_adapter(str(lora), out)
    with pytest.raises(UserError, match="is a file; name a folder"):
        merge_adapter(str(lora), out / "mine.txt")
    with pytest.raises(UserError, match="a whole model"):
        merge_adapter(str(lora.parent / "base"), out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    merge_adapter(str(lora), out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_commands(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merge, and the same model as GGUF from the adapter and from what was merged: byte for byte, but for the name."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'llmalign[gguf]'")
    merged, one, two = tmp_path / "merged", tmp_path / "one.gguf", tmp_path / "two.gguf"
    assert main(["merge", str(lora), "--out", str(merged)]) == 0
    assert "its logits are those of the adapter" in capsys.readouterr().out
    for source, path in ((lora, one), (merged, two)):
        assert main(["gguf", str(source), "--out", str(path), "--dtype", "f32", "--context", "99"]) == 0
    assert "llama, f32" in capsys.readouterr().out
    for left, right in zip(gguf.GGUFReader(one).tensors, gguf.GGUFReader(two).tensors, strict=True):
        assert left.name == right.name and (left.data == right.data).all()
    assert main(["merge", str(lora), "--out", str(merged)]) == 2
    assert main(["merge", str(lora), "--out", str(merged), "--wrong"]) == 2
    assert "merge does not know --wrong" in capsys.readouterr().err
    assert main(["gguf", str(lora), "--out", str(one), "--context", "0"]) == 2
    assert main(["gguf", str(lora), "--out", str(one), "--chat_template", str(tmp_path / "none")]) == 2


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the log is seen after a command has set it up."""
    monkeypatch.setattr(logging.getLogger("llmalign"), "propagate", True)


def test_what_a_result_is_made_from_is_never_replaced(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "x"
    shutil.copytree(lora, run)
    (tmp_path / "link").symlink_to(run)
    for out in (run, run.parent, tmp_path / "link", lora.parent / "base"):
        assert main(["merge", str(run), "--out", str(out), "--overwrite"]) == 2
        assert "which the result is made from" in capsys.readouterr().err
    monkeypatch.chdir(run.parent)
    for out in (".", "..", str(run.parent)):
        assert main(["merge", "x", "--out", out, "--overwrite"]) == 2
        assert "holds the folder that this command runs in" in capsys.readouterr().err
    assert (run / "adapter_model.safetensors").is_file() and (lora.parent / "base" / "config.json").is_file()
    assert main(["merge", "x", "--out", "merged"]) == 0


def test_only_what_cannot_be_written_is_called_so(tmp_path: Path) -> None:
    for aside_of in (folder_aside, file_aside):
        with pytest.raises(FileNotFoundError, match="elsewhere"), aside_of(tmp_path / "out"):
            (tmp_path / "elsewhere").read_text()
        with pytest.raises(UserError, match="out cannot be written: No such"), aside_of(tmp_path / "out") as aside:
            (aside / "no" / "folder").write_text("")
        with pytest.raises(UserError, match="out cannot be written: full"), aside_of(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "full")
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written"), aside_of(tmp_path / "file" / "out"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_gguf_says_at_once_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package: pip install 'llmalign[gguf]'")
    arguments = ["gguf", "./nowhere", "--out", str(tmp_path / "m.gguf")]
    assert main([*arguments, "--dtype", "q4"]) == 2 and "one of f32" in capsys.readouterr().err
    assert main(["gguf", "./nowhere", "--out", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*arguments, "--check"]) == 2 and "pip install xllamacpp" in capsys.readouterr().err
