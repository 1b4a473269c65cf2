"""Runs to a Hub on the loopback and back, with the real client."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.server import READER, WRITER, LocalHub, Repository

Drive = Callable[..., list[tuple[int, str, str]]]
LOADS = """
import torch
from transformers import AutoModelForCausalLM
ours, back = (AutoModelForCausalLM.from_pretrained(path) for path in ({ours!r}, {back!r}))
assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))
"""


def test_there_and_back(hub: LocalHub, drive: Drive, trained: Path, tmp_path: Path) -> None:
    push, out = ["push", str(trained), "--repo", "me/rpo", "--license", "apache-2.0"], str(tmp_path / "back")
    loads = LOADS.format(ours=str(trained), back="me/rpo")
    first, again, pulled, _ = drive(push, push, ["pull", "me/rpo", "--out", out], loads)
    assert first[0] == again[0] == pulled[0] == 0, (first, again, pulled)
    assert "private" in first[1] and "has all of it already" in again[1] and "as they were pushed" in pulled[1]
    assert hub.repositories["me/rpo"].private and hub.repositories["me/rpo"].commits == 1
    files = hub.files("me/rpo")
    assert {"model.safetensors", "tokenizer.json", "config.json", "README.md", "run.json", "curves.png"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt")) or "annot" in name]
    for name, data in files.items():
        if not name.endswith((".safetensors", ".png")):
            assert b"verysecret" not in data and b"secret-place" not in data, name
            assert WRITER.encode() not in data
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and "2405.16436" in card and "log\\sigma(\\beta m)" in card
    assert "| loss | 2 | 1.5 |" in card and "trl-lib/some-pairs" in card and "base_model" not in card
    # The same repository may come again, another may not, and what has no manifest is said to be unchecked.
    hub.repositories["me/bare"] = Repository(private=True)
    hub.files("me/bare")["config.json"] = b"{}"
    same, other, bare = drive(
        ["pull", "me/rpo", "--out", out], ["pull", "me/bare", "--out", out],
        ["pull", "me/bare", "--out", str(tmp_path / "bare")],
    )  # fmt: skip
    assert same[0] == 0 and other[0] == 2 and "no earlier pull of me/bare" in other[2], (same, other)
    assert bare[0] == 0 and "not checked" in bare[1] and "as they were" not in bare[1], bare
    # A file that is another than was pushed is named.
    files["config.json"] = files["config.json"].replace(b"llama", b"LLAMA")
    ((status, _, said),) = drive(["pull", "me/rpo", "--out", str(tmp_path / "broken")])
    assert status == 2 and "config.json of me/rpo is not what was pushed" in said


ADAPTER = """
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained({base!r})
config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
get_peft_model(base, config).save_pretrained({folder!r})
"""
ADAPTER_BACK = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})
back = AutoPeftModelForCausalLM.from_pretrained("me/lora")
ids = torch.tensor([[3, 4, 5]])
assert torch.equal(ours(input_ids=ids).logits, back(input_ids=ids).logits)
"""
PICTURES = """
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from llmalign.diffusion.tiny import build_tiny
pipe = build_tiny("sd")
pipe.save_pretrained({pipeline!r})
torch.manual_seed(0)
pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
StableDiffusionPipeline.save_lora_weights({lora!r}, get_peft_model_state_dict(pipe.unet))
"""
PICTURES_BACK = """
import torch
from diffusers import DiffusionPipeline
def draw(pipeline, lora=None):
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    if lora:
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    return pipe("digit", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert torch.equal(draw({pipeline!r}), draw("me/pictures"))
with_lora = draw({pipeline!r}, {lora!r})
assert torch.equal(with_lora, draw("me/pictures", "me/pictures-lora"))
assert not torch.equal(with_lora, draw({pipeline!r}))
"""


@pytest.mark.slow
def test_an_adapter_on_its_base(hub: LocalHub, drive: Drive, trained: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "lora")
    names = {"base": str(trained), "folder": folder}
    base, _, lora, _ = drive(
        ["push", str(trained), "--repo", "me/base"], ADAPTER.format(**names),
        ["push", folder, "--repo", "me/lora", "--base", "me/base"], ADAPTER_BACK.format(**names),
    )  # fmt: skip
    assert base[0] == lora[0] == 0, (base, lora)
    assert "base_model: me/base" in hub.files("me/lora")["README.md"].decode()


@pytest.mark.slow
def test_a_pipeline_and_its_lora_file(hub: LocalHub, drive: Drive, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    names = {"pipeline": str(tmp_path / "pipeline"), "lora": str(tmp_path / "pictures-lora")}
    _, pipeline, lora, _ = drive(
        PICTURES.format(**names), ["push", names["pipeline"], "--repo", "me/pictures"],
        ["push", names["lora"], "--repo", "me/pictures-lora", "--base", "me/pictures"], PICTURES_BACK.format(**names),
    )  # fmt: skip
    assert pipeline[0] == lora[0] == 0, (pipeline, lora)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files("me/pictures")


def test_what_changed_is_sent_and_what_is_gone_is_deleted(hub: LocalHub, drive: Drive, trained: Path) -> None:
    push = ["push", str(trained), "--repo", "me/rpo"]
    change = (
        f"import pathlib; run = pathlib.Path({str(trained)!r}); (run / 'curves.png').unlink(); "
        "(run / 'generation_config.json').write_text('{\"eos_token_id\": 1}')"
    )
    first, _, second = drive(push, change, push)
    assert first[0] == second[0] == 0, second
    assert "1 deleted" in second[1] and hub.repositories["me/rpo"].commits == 2
    assert "curves.png" not in hub.files("me/rpo")
    large = [oid for oid in hub.puts if oid == hashlib.sha256((trained / "model.safetensors").read_bytes()).hexdigest()]
    assert len(large) == 1


@pytest.mark.slow
def test_cut_off_and_gone_on(hub: LocalHub, drive: Drive, trained: Path) -> None:
    weights = hashlib.sha256((trained / "model.safetensors").read_bytes()).hexdigest()
    tokenizer = hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest()
    hub.cut = {weights}
    push = ["push", str(trained), "--repo", "me/rpo"]
    ((status, _, said),) = drive(push)
    assert status == 2 and "The same command goes on where it stopped" in said and "Traceback" not in said
    assert hub.repositories["me/rpo"].commits == 0 and tokenizer in hub.puts
    hub.cut = set()
    sent = hub.puts.count(tokenizer)
    ((status, _, _),) = drive(push)
    assert status == 0 and hub.puts.count(tokenizer) == sent
    assert hub.files("me/rpo")["model.safetensors"] == (trained / "model.safetensors").read_bytes()


def test_tokens_that_do_not_serve(hub: LocalHub, drive: Drive, trained: Path) -> None:
    hub.repositories["me/public"] = Repository(private=False)
    push = ["push", str(trained), "--repo"]
    for token, said in (("hf_" + "x" * 34, "HTTP 401"), (READER, "HTTP 403")):
        ((status, out, err),) = drive([*push, "me/new"], token=token)
        assert status == 2 and said in err and "write access" in err
        assert token not in out + err and "Traceback" not in err
    none, pulled = drive([*push, "me/new"], ["pull", "me/none"], token=None)
    assert none[0] == 2 and "there is no token" in none[2]
    assert pulled[0] == 2 and "no repository me/none" in pulled[2]
    ((status, _, err),) = drive([*push, "me/public"])
    assert status == 2 and "me/public is public" in err and not hub.files("me/public")


def test_a_hub_that_is_not_there(hub: LocalHub, drive: Drive, trained: Path) -> None:
    hub.close()
    ((status, _, err),) = drive(["push", str(trained), "--repo", "me/rpo"])
    assert status == 2 and "the Hub was lost on the way" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_a_trainer_pushes_as_transformers_does(hub: LocalHub, drive: Drive, tmp_path: Path, strategy: str) -> None:
    recipe = Path(__file__).resolve().parents[2] / "trainers" / "rpo" / "smoke.yaml"
    train = [
        "train", str(recipe), "--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", "me/t",
        "--hub_strategy", strategy, "--hub_private_repo", "true",
    ]  # fmt: skip
    ((status, _, err),) = drive(train)
    assert status == 0, err[-2000:]
    files = hub.files("me/t")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(files) and hub.repositories["me/t"].private
    assert (strategy == "checkpoint") == any(name.startswith("last-checkpoint/") for name in files)
    assert not [name for name in files if name.startswith(("checkpoint-", "_incomplete"))]
    assert all(WRITER.encode() not in data for data in files.values())
