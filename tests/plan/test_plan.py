"""Whole plans of every kind of run, through the command line: what is told, what is refused, and nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from llmalign.cli import main
from llmalign.plan.facts import Target, text_facts
from llmalign.plan.run import plan
from llmalign.plan.text import TextPlan
from llmalign.recipe import load_recipe
from tests.plan import measuring

SHAPE = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
LENIENT = ["--max_truncated", "1", "--max_identical", "1", "--use_cpu", "true", "--report_to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("plans")
    measuring.save_model(found / "model", num_key_value_heads=2, max_position_embeddings=512, **SHAPE)
    measuring.write_pairs(found / "pairs.jsonl", [(20 + i, 10 + i, 8) for i in range(12)])
    (found / "rpo.yaml").write_text(
        f"method: rpo\nmodel_name_or_path: {found / 'model'}\ndataset_name: {found / 'pairs.jsonl'}\n"
        f"output_dir: {found / 'run'}\nper_device_train_batch_size: 4\n"
    )
    return found


def planned(folder: Path, *words: str) -> dict[str, Any]:
    file = folder / "plan.json"
    assert main(["plan", str(folder / "rpo.yaml"), "--json", str(file), "--no-calibrate", *LENIENT, *words]) == 0
    return json.loads(file.read_text())


def test_a_plan_is_told_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(folder)
    weights = sum(weight.numel() for weight in load_file(folder / "model" / "model.safetensors").values())
    assert made["parameters"] == made["trained_parameters"] == weights
    parts = made["configs"]["single"]["parts"]
    assert parts["weights"] == 4 * weights and parts["optimizer"] == 8 * weights
    assert "reference" not in parts  # three epochs: looked up
    assert made["data"]["rows"] == 12
    assert made["data"]["tokens"] == sum(20 + i + 10 + i + 8 for i in range(12))
    assert made["steps"] == 9  # twelve rows, four at a time, three epochs
    shown = capsys.readouterr().out
    assert "rpo on" in shown and "activations" in shown and "together" in shown
    assert not (folder / "run").exists()


def test_the_reference_beside_the_policy(folder: Path) -> None:
    parts = planned(folder, "--precompute_ref_log_probs", "false")["configs"]["single"]["parts"]
    assert parts["reference"] == parts["weights"]


def test_gpus_have_configs_and_a_line_to_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(folder, "--gpus", "2", "--memory", "80", "--gradient_accumulation_steps", "4")
    assert set(made["configs"]) == {"ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2"}
    assert all(config["fits"] for config in made["configs"].values())
    assert made["suggestion"]["config"] == "ddp"
    assert made["batch"]["gradient_accumulation_steps"] == 2  # sixteen rows a step, as on one device
    assert "--accelerate ddp --num_processes 2" in made["suggestion"]["command"]
    assert "--accelerate ddp" in capsys.readouterr().out


def test_steps_are_those_of_the_line_that_is_suggested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four rows on one device; on eight devices one row each is eight, and 60 rows in three epochs make 24 steps."""
    made = planned(folder, "--gpus", "8", "--memory", "80", "--rows", "60")
    batch = made["batch"]
    assert (batch["per_device_train_batch_size"], batch["gradient_accumulation_steps"]) == (1, 1)
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 1" in made["suggestion"]["command"]
    assert batch["rows_a_step"] == 8 and made["steps"] == 24
    assert "A step then has 8 rows in place of 4" in capsys.readouterr().out


def test_steps_of_a_run_that_samples_follow_the_suggestion(folder: Path) -> None:
    (folder / "mdpo.yaml").write_text(f"method: mdpo\nmodel_name_or_path: {folder / 'model'}\n")
    words = ["--dataset_name", "never-read", "--use_cpu", "true", "--reward_funcs", "x:y", "--num_generations", "8",
             "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8", "--num_iterations", "2",
             "--num_train_epochs", "1"]  # fmt: skip
    recipe = load_recipe(folder / "mdpo.yaml", words)
    one = plan(recipe, Target(), rows=640, calibrate=False)
    assert one.steps == 640 // 8 * 2  # 64 completions of 8 prompts a step, twice
    eight = plan(recipe, Target(8, 80e9, cuda=True), rows=640, calibrate=False)
    assert (eight.choice.size, eight.choice.accumulation, eight.total) == (8, 1, 64)
    assert eight.steps == one.steps


@pytest.mark.parametrize(
    "method, words, left_out",
    [
        ("rpo", ["--optim", "adafactor"], {"zero2_offload"}),
        ("rpo", ["--use_peft", "true", "--load_in_4bit", "true"], {"zero3", "fsdp2"}),
        (
            "fdpg",
            ["--reward_funcs", "x:y", "--proposal", "offline"],
            {"zero1", "zero2", "zero2_offload", "zero3", "fsdp2"},
        ),
    ],
)
def test_what_a_trainer_refuses_is_not_suggested(
    folder: Path, method: str, words: list[str], left_out: set[str]
) -> None:
    (folder / "one.yaml").write_text(f"method: {method}\nmodel_name_or_path: {folder / 'model'}\n")
    recipe = load_recipe(folder / "one.yaml", ["--dataset_name", "never-read", "--use_cpu", "true", *words])
    made = plan(recipe, Target(2, 80e9, cuda=True), rows=50, calibrate=False)
    assert {"ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2"} - set(made.table) == left_out


def test_where_nothing_fits_it_says_what_would(folder: Path) -> None:
    made = planned(folder, "--gpus", "2", "--memory", "0.5")
    assert made["suggestion"] is None  # CUDA alone takes more
    assert any("max_length" in way for way in made["ways_out"])
    made = planned(folder, "--gpus", "2", "--memory", "0.5", "--optim", "adafactor")
    assert len(set(made["notes"])) == len(made["notes"])  # looking at more devices says nothing twice


def test_whether_the_reference_is_looked_up_follows_the_rows_a_step(folder: Path) -> None:
    """Ten steps of 128 rows, on any number of devices, see 1,280: all of 1,200 rows and a part of 2,000."""
    words = ["--gpus", "8", "--memory", "80", "--gradient_accumulation_steps", "32", "--max_steps", "10"]
    for rows, beside in ((1200, False), (2000, True)):
        made = planned(folder, *words, "--rows", str(rows))
        assert made["batch"]["rows_a_step"] == 128
        assert ("reference" in made["configs"]["ddp"]["parts"]) is beside


@pytest.mark.slow
def test_seventy_billion_from_a_config_alone(tmp_path: Path) -> None:
    """Weights, tokenizer and data are not needed, and sharding is what makes it fit."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    config = AutoConfig.for_model("llama", num_attention_heads=64, num_key_value_heads=8, **shape)
    config.save_pretrained(tmp_path / "large")
    (tmp_path / "r.yaml").write_text(
        f"method: rpo\nmodel_name_or_path: {tmp_path / 'large'}\ndataset_name: never-read\nmax_length: 128\n"
        "per_device_train_batch_size: 1\noverlong: drop\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    facts = text_facts(recipe, Target(64, 80e9, cuda=True), str(tmp_path / "large"), 1000)
    assert facts.weights.count == 70_553_706_496  # as Meta counts it
    device, _ = TextPlan(facts).device("zero3", 1, 2, checkpointing=True)
    states = sum(device.parts[name] for name in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx(16 * 70_553_706_496 / 64)
    assert device.total < 80e9


def test_what_is_missing_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LENIENT, "--rows", "10", "--model_name_or_path"]
    assert main(["plan", str(folder / "rpo.yaml"), *words, "some-owner/no-such-model"]) == 2
    said = capsys.readouterr().err
    assert "no config of a model could be found" in said and "--model_name_or_path" in said
    for number in ("-1", "nan", "inf"):
        assert main(["plan", str(folder / "rpo.yaml"), "--memory", number]) == 2
        assert "--memory is a number above 0" in capsys.readouterr().err
    assert main(["plan", str(folder / "rpo.yaml"), "--json", str(folder / "none" / "plan.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_an_unknown_optimizer_is_said_to_be_missing(folder: Path) -> None:
    made = planned(folder, "--optim", "galore_adamw")
    assert any("galore_adamw" in note and "not modelled" in note for note in made["notes"])
    assert "optimizer" not in made["configs"]["single"]["parts"]


@pytest.mark.parametrize(
    "method, extra",
    [
        ("sft", []),
        ("dpo", []),
        pytest.param("reward", [], marks=pytest.mark.slow),
        pytest.param("preference", [], marks=pytest.mark.slow),
        pytest.param("copg", [], marks=pytest.mark.slow),
        pytest.param("inpo", [], marks=pytest.mark.slow),
        pytest.param("pair", ["--loss", "ipo", "--tau", "0.1", "--tokens_per_batch", "2048"], marks=pytest.mark.slow),
        ("mdpo", ["--reward_funcs", "x:y"]),
        pytest.param("fdpg", ["--reward_funcs", "x:y"], marks=pytest.mark.slow),
        pytest.param("copg_online", ["--reward_funcs", "x:y"], marks=pytest.mark.slow),
        pytest.param(
            "pf_ppo", ["--reward_funcs", "x:y", "--critic", "model", "--strategy", "none"], marks=pytest.mark.slow
        ),
    ],
)
def test_every_method_has_a_plan(folder: Path, method: str, extra: list[str]) -> None:
    (folder / f"{method}.yaml").write_text(f"method: {method}\nmodel_name_or_path: {folder / 'model'}\n")
    recipe = load_recipe(folder / f"{method}.yaml", ["--dataset_name", "never-read", "--use_cpu", "true", *extra])
    made = plan(recipe, Target(), rows=50, calibrate=False)
    parts = made.device.parts
    assert parts["weights"] > 0 and parts["activations"] > 0 and made.steps > 0
    assert ("critic" in parts) == (method == "pf_ppo")
    assert any("were not read" in note for note in made.notes)


def test_images_have_a_plan(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: diffusion_dpo\nmodel_name_or_path: embedded:tiny\ndataset_name: never-read\nresolution: 8\n"
        "per_device_train_batch_size: 2\nmax_steps: 3\nuse_cpu: true\n"
    )
    made = plan(load_recipe(tmp_path / "r.yaml"), Target(), rows=20, calibrate=False)
    parts = made.device.parts
    assert parts["reference"] == parts["weights"] == 4 * made.parameters
    assert made.steps == 3 and parts["activations"] > 0
    words = ["--max_steps", "-1", "--num_train_epochs", "3", "--per_device_train_batch_size", "4"]
    made = plan(load_recipe(tmp_path / "r.yaml", words), Target(), rows=10, calibrate=False)
    assert made.steps == 9  # three steps an epoch, whose last has two rows
    made = plan(load_recipe(tmp_path / "r.yaml", ["--optim", "sgd"]), Target(2), rows=10, calibrate=False)
    assert "zero2_offload" not in made.table and "zero2" in made.table


def test_calibration_runs_real_steps(folder: Path) -> None:
    recipe = load_recipe(folder / "rpo.yaml", [*LENIENT, "--reference_cache_dir", str(folder / "cache")])
    made = plan(recipe, Target(), calibrate=True)
    found = made.calibration
    assert found is not None and found.typical > 0 and found.longest is not None
    assert made.seconds == pytest.approx(9 * (found.typical + found.optimizer))
    assert not (folder / "run").exists() and not (folder / "cache").exists()


@pytest.mark.slow
def test_stable_diffusion_from_configs_alone(tmp_path: Path) -> None:
    """The released UNet has 859,520,964 numbers; AdamW on all, beside a frozen copy, takes 20 bytes a number."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    unet.save_config(tmp_path / "sd" / "unet")
    vae.save_config(tmp_path / "sd" / "vae")
    DDIMScheduler().save_config(tmp_path / "sd" / "scheduler")
    CLIPTextConfig().save_pretrained(tmp_path / "sd" / "text_encoder")
    parts = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }  # fmt: skip
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(parts))
    (tmp_path / "r.yaml").write_text(
        f"method: diffusion_dpo\nmodel_name_or_path: {tmp_path / 'sd'}\ndataset_name: never-read\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\nuse_cpu: true\nresolution: 256\n"
    )
    made = plan(load_recipe(tmp_path / "r.yaml"), Target(), rows=20, calibrate=False)
    states = sum(made.device.parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    assert states == 20 * 859_520_964


def test_what_cannot_be_told_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture of experts in float32: what an expert computes depends on the numbers."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    AutoConfig.for_model("mixtral", **experts, **SHAPE).save_pretrained(tmp_path / "experts")
    words = ["--rows", "9", "--model_name_or_path", str(tmp_path / "experts"), "--bf16", "false"]
    made = planned(folder, *words, "--gpus", "2", "--memory", "80")
    assert any("not modelled: activations and logits" in note for note in made["notes"])
    assert all(config["fits"] is None for config in made["configs"].values())
    assert made["suggestion"] is None
    assert "unknown" in capsys.readouterr().out
