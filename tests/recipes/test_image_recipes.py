"""Recipes of the image methods hold what papers and authors' code say; the pages explain every key."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmalign
from llmalign.diffusion.configs import DiffusionPreferenceConfig, ImageConfig
from llmalign.diffusion.online_configs import D3POConfig, PSOConfig
from llmalign.diffusion.pso import PSOOfflineConfig
from llmalign.diffusion.seppo import SePPOConfig
from llmalign.methods import METHODS
from llmalign.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2] / "trainers"
OF_IMAGES = [method for method in METHODS.values() if method.of_images]
RATE_A_PAIR = 1e-8  # Diffusion-DPO's code, with --scale_lr
LORA = {"use_peft": True}
# A recipe: the rows of an optimizer step, keys of the config, keys of the model.
VALUES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "diffusion_dpo/recipe.yaml": (
        2048,
        {"beta": 2000, "warmup_steps": 500, "max_steps": 2000, "weight_decay": 0.01, "resolution": 512},
        {},
    ),
    "diffusion_dpo/recipe_sdxl.yaml": (
        2048,
        {"beta": 5000, "warmup_steps": 200, "max_steps": 2000, "optim": "adafactor", "resolution": 1024},
        {},
    ),
    "diffusion_dpo/lora.yaml": (32, {"beta": 2000, "learning_rate": 1e-5}, {**LORA, "lora_r": 8, "lora_alpha": 8}),
    "diffusion_dpo/lora_sd3.yaml": (32, {"beta": 100, "learning_rate": 3e-4, "resolution": 512}, LORA),
    "diffusion_dpo/lora_flux.yaml": (32, {"beta": 1000, "learning_rate": 1e-4}, LORA),
    "d3po/recipe.yaml": (
        20,
        {
            "beta": 0.1, "ratio_clip": 0.1, "rounds": 400, "pairs_per_round": 20, "sampling_steps": 20,
            "sampling_eta": 1.0, "guidance_scale": 5.0, "learning_rate": 3e-5, "weight_decay": 1e-4,
            "share_initial": True, "reference": "initial",
        },
        {**LORA, "lora_r": 4, "lora_alpha": 4},
    ),
    "pso/recipe.yaml": (
        48,
        {
            "beta": 50, "ratio_clip": 0.1, "sampling_steps": 4, "guidance_scale": 1.0, "learning_rate": 1e-5,
            "weight_decay": 1e-6, "inner_epochs": 1, "share_initial": False, "combine_rewards": "random",
        },
        {**LORA, "lora_r": 32, "lora_alpha": 32},
    ),
    "pso/offline.yaml": (
        4,
        {
            "beta": 5, "learning_rate": 2e-4, "negative_factor": 0.1, "prior_weight": 0.5, "max_steps": 600,
            "sampling_steps": 4,
        },
        {**LORA, "lora_r": 16, "lora_alpha": 16},
    ),
    "seppo/recipe.yaml": (
        2048,
        {
            "beta": 5000, "checkpoint_every": 30, "max_steps": 7 * 30, "sampling_steps": 50, "guidance_scale": 7.5,
            "flip_rule": "sign",
        },
        LORA,
    ),
}  # fmt: skip
PAGES = {
    ImageConfig: "diffusion_dpo",
    DiffusionPreferenceConfig: "diffusion_dpo",
    D3POConfig: "d3po",
    PSOConfig: "pso",
    PSOOfflineConfig: "pso",
    SePPOConfig: "seppo",
}


def test_every_recipe_of_images_is_looked_at() -> None:
    folders = set(PAGES.values())
    shipped = {f"{path.parent.name}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.yaml")}
    assert set(VALUES) == {name for name in shipped if "smoke" not in name}


@pytest.mark.parametrize("recipe", list(VALUES))
def test_recipe_has_the_values_of_paper_and_code(recipe: str) -> None:
    rows, values, model = VALUES[recipe]
    read = load_recipe(f"trainers/{recipe}")
    config = read.training_config()
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == rows
    assert {key: getattr(config, key) for key in values} == pytest.approx(values)
    assert {key: read.model.get(key) for key in model} == model
    assert config.max_grad_norm == 1.0 and ("constant" in config.lr_scheduler_type)


@pytest.mark.parametrize("name", ["recipe", "recipe_sdxl"])
def test_diffusion_dpo_with_all_weights(name: str) -> None:
    """The rate is the code's a pair of the batch; pictures are mirrored and captions dropped as there."""
    read = load_recipe(f"trainers/diffusion_dpo/{name}.yaml")
    config = read.training_config()
    assert config.learning_rate == pytest.approx(RATE_A_PAIR * VALUES[f"diffusion_dpo/{name}.yaml"][0])
    assert (config.caption_dropout, config.random_flip, config.ties) == (0.2, "image", "drop")
    assert not read.model.get("use_peft")


@pytest.mark.parametrize("method, steps_with_noise", [("d3po", 20), ("pso", 3)])
def test_rounds_are_whole_optimizer_steps(method: str, steps_with_noise: int) -> None:
    config = load_recipe(f"trainers/{method}/recipe.yaml").training_config()
    rows = config.pairs_per_round * steps_with_noise * config.inner_epochs
    assert rows % (config.per_device_train_batch_size * config.gradient_accumulation_steps) == 0


@pytest.mark.parametrize("config", list(PAGES), ids=lambda config: config.__name__)
def test_the_page_explains_every_key_that_a_config_introduces(config: type) -> None:
    page = (ROOT / PAGES[config] / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`(\w+)(?:: [^`]*)?`", page))
    own = [entry.name for entry in fields(config) if entry.name in vars(config)["__annotations__"]]
    assert own and not set(own) - words


def test_smoke_recipes_need_no_download() -> None:
    smokes = [path for folder in set(PAGES.values()) for path in (ROOT / folder).glob("*smoke.yaml")]
    assert len(smokes) == len(OF_IMAGES)
    for path in smokes:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert recipe["model_name_or_path"] == "embedded:tiny" and recipe["dataset_name"].startswith("sample:")


def test_trainers_and_configs_of_images_are_importable_from_the_top() -> None:
    for method in OF_IMAGES:
        assert getattr(llmalign, method.trainer.__name__) is method.trainer
        assert getattr(llmalign, method.config.__name__) is method.config
        assert {method.trainer.__name__, method.config.__name__} <= set(llmalign.__all__)
