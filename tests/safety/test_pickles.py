"""Weights that are pickles are refused wherever a model is read, and the code in them never runs."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.inference import load_for_inference
from llmalign.pickles import ALLOW
from llmalign.rewards.classifiers import load_classifier


class Bomb:
    """What a pickle runs when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def pickled(tiny_model_dir: Path, tmp_path: Path, mark: Path) -> Path:
    """The tiny model with a pickle that runs code in the place of its weights."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def adapter(tiny_model, tiny_model_dir: Path, tmp_path: Path, mark: Path) -> Path:
    """An adapter of the tiny model with such a pickle; a whole model's safetensors beside it do not help."""
    folder = tmp_path / "adapter"
    get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    shutil.copy(tiny_model_dir / "tokenizer.json", folder)
    shutil.copy(tiny_model_dir / "tokenizer_config.json", folder)
    shutil.move(folder / "adapter_model.safetensors", folder / "other.safetensors")
    torch.save({"weight": Bomb(mark)}, folder / "adapter_model.bin")
    return folder


def test_the_pickle_would_run(pickled: Path, mark: Path) -> None:
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "trainers/rpo/smoke.yaml", "--model_name_or_path", "BAD"],
        ["train", "trainers/rpo/smoke.yaml", "--model_name_or_path", "GOOD", "--ref_model_name_or_path", "BAD"],
        ["train", "trainers/sft/smoke.yaml", "--model_name_or_path", "BAD"],
        ["train", "trainers/mdpo/smoke.yaml", "--model_name_or_path", "GOOD", "--reward_funcs", "[]",
         "--reward_models", "[BAD]"],
        ["generate", "BAD", "--prompts", "sample:prompts", "--out", "OUT"],
        ["merge", "BAD", "--out", "OUT"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pickled", "adapter"])
def test_every_command_refuses_it(words, kind, request, tiny_model_dir, tmp_path, mark, capsys) -> None:
    bad = request.getfixturevalue(kind)
    put = {"BAD": str(bad), "GOOD": str(tiny_model_dir), "[BAD]": f"[{bad}]", "OUT": str(tmp_path / "out")}
    words = [put.get(word, word) for word in words]
    if words[0] == "train":
        words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert not mark.exists()
    if kind == "pickled" and words[0] != "merge":
        assert "pickle" in said and ALLOW in said and "safetensors" in said, said
    assert "Traceback" not in said


def test_a_reward_model_and_an_adapter_are_refused(pickled: Path, adapter: Path, mark: Path) -> None:
    with pytest.raises(UserError, match="pickle .pytorch_model.bin., which can run code"):
        load_classifier(str(pickled))
    with pytest.raises(UserError, match="pickle can run code"):
        load_for_inference(str(adapter))
    assert not mark.exists()


def test_allowed_pickles_are_read_without_running_code(tiny_model, pickled, mark, monkeypatch) -> None:
    """Allowed, a plain state dict is read; torch still refuses to run what is not a tensor."""
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(UserError, match="no text model can be loaded"):
        load_for_inference(str(pickled))
    assert not mark.exists()
    torch.save(tiny_model.state_dict(), pickled / "pytorch_model.bin")
    loaded, _ = load_for_inference(str(pickled))
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_pickled_classifier_is_refused_beside_a_whole_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    scorer.save_pretrained(tmp_path / "scorer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, tmp_path / "scorer")
    load_classifier(str(tmp_path / "scorer"))
    (tmp_path / "scorer" / "model.safetensors").unlink()
    torch.save(scorer.state_dict(), tmp_path / "scorer" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_classifier(str(tmp_path / "scorer"))
