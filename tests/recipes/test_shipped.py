"""Every shipped recipe is parsed into its config; every smoke recipe is run."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main
from llmalign.loop import LoopConfig
from llmalign.methods import METHODS
from llmalign.recipe import Recipe, load_recipe
from llmalign.rewards.functions import load_function
from llmalign.train import summary
from llmalign.trainers.loading import ModelConfig
from tests.slow import all_but

ROOT = Path(__file__).resolve().parents[2] / "trainers"
RECIPES = sorted(path.relative_to(ROOT.parent).as_posix() for path in ROOT.glob("*/*.yaml"))
OF_ROUNDS = [recipe for recipe in RECIPES if "/iterate" in recipe]
PAPER_VALUES = {
    "rpo": {"beta": 0.01, "eta": 0.005, "learning_rate": 5e-7, "num_train_epochs": 1, "max_length": 1024},
    "rdpo": {"beta": 0.01, "flip_rate": 0.1, "max_length": 512},
    "inpo": {"eta": 0.005, "learning_rate": 5e-7, "warmup_steps": 0.03, "max_grad_norm": 1.0},
    "copg": {"beta": 0.06, "learning_rate": 1e-6, "num_train_epochs": 2, "warmup_steps": 0.1},
}
PAPER_BATCH = {"rpo": 128, "rdpo": 16, "inpo": 128, "copg": 128}


SMOKE = {"copg_online": "trainers/copg/online_smoke.yaml", "pso_offline": "trainers/pso/offline_smoke.yaml"}
OF_TEXT = [name for name, method in METHODS.items() if not method.of_images]
OF_IMAGES = [name for name, method in METHODS.items() if method.of_images]


def folder_of(method: str) -> str:
    """Methods that share an equation share a page."""
    return method.removesuffix("_online").removesuffix("_offline")


def loaded(recipe: str) -> Recipe:
    """A recipe as the command that it is for reads it."""
    return load_recipe(recipe, loop=LoopConfig if recipe in OF_ROUNDS else None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses_into_its_config(recipe: str) -> None:
    read = loaded(recipe)
    config, model = read.training_config(), read.model_config()
    assert isinstance(config, read.method.config) and isinstance(model, ModelConfig)
    assert read.data.train_sources()
    read.data.eval_sources()
    assert recipe.split("/")[1] == folder_of(read.method.name)
    assert config.output_dir.startswith(f"runs/{read.method.name}")


@pytest.mark.parametrize("recipe", OF_ROUNDS)
def test_recipe_of_rounds_has_an_oracle_and_fits_its_lengths(recipe: str) -> None:
    read = loaded(recipe)
    loop, config = LoopConfig(**read.loop), read.training_config()
    assert config.max_length > loop.max_new_tokens
    assert loop.eval_prompts > 0, "no round would be measured"
    for name in [loop.preference_function, *(loop.reward_funcs or ())]:
        assert name is None or callable(load_function(name))
    train_alone = ["eval_datasets", "dataset_test_split", "holdout_rows"]
    assert not any(getattr(read.data, key) for key in train_alone)


def test_rounds_with_the_paper_s_values() -> None:
    """INPO's appendix B: three rounds, eight answers at temperature one, 20k fresh prompts each, batch 128.

    The rate is ten times the paper's, since an adapter is trained and not all weights.
    """
    read = loaded("trainers/inpo/iterate_paper.yaml")
    loop, config = LoopConfig(**read.loop), read.training_config()
    assert (loop.rounds, loop.samples_per_prompt, loop.select, loop.temperature) == (3, 8, "best_worst", 1.0)
    values = {**PAPER_VALUES["inpo"], "learning_rate": 10 * PAPER_VALUES["inpo"]["learning_rate"]}
    assert {key: getattr(config, key) for key in values} == pytest.approx(values)
    assert config.tau == pytest.approx(config.eta / 3) and not loop.reuse_prompts
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == PAPER_BATCH["inpo"]


@pytest.mark.slow
def test_smoke_recipe_of_rounds_runs(tmp_path: Path) -> None:
    output = tmp_path / "run"
    smoke = ["iterate", "trainers/inpo/iterate_smoke.yaml", "--output_dir", str(output), "--disable_tqdm", "true"]
    assert main(smoke) == 0
    result = json.loads((output / "rounds.json").read_text())
    assert [one["round"] for one in result["rounds"]] == [0, 1, 2]
    for one in result["rounds"][1:]:
        assert one["counts"]["pair"]["pairs"] > 8 and math.isfinite(one["kl"]["mean"])
        assert {"against_start", "against_previous", "duality_gap", "length"} <= set(one)
    assert (output / "rounds.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["rpo", "rdpo", "inpo", "copg"])
def test_every_method_of_the_papers_has_its_four_recipes_and_page(method: str) -> None:
    names = {path.name for path in (ROOT / method).iterdir()}
    assert {"README.md", "recipe.yaml", "lora.yaml", "qlora.yaml", "smoke.yaml"} <= names
    config = load_recipe(f"trainers/{method}/recipe.yaml").training_config()
    assert {key: getattr(config, key) for key in PAPER_VALUES[method]} == PAPER_VALUES[method]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == PAPER_BATCH[method]


@pytest.mark.parametrize("method", ["rpo", "rdpo", "inpo", "copg"])
def test_lora_and_qlora_recipes_differ_from_the_full_one_only_where_they_say(method: str) -> None:
    full, lora, qlora = (load_recipe(f"trainers/{method}/{name}.yaml") for name in ("recipe", "lora", "qlora"))
    assert not full.model.get("use_peft") and lora.model["use_peft"]
    assert not lora.model.get("load_in_4bit") and qlora.model["load_in_4bit"]
    assert full.data == lora.data == qlora.data
    differing = {key for key in full.config if full.config[key] != lora.config[key]}
    assert differing == {"learning_rate", "output_dir"}
    assert full.config["learning_rate"] < lora.config["learning_rate"]


def test_every_method_has_a_page_and_a_smoke_recipe() -> None:
    assert {path.parent.name for path in ROOT.glob("*/smoke.yaml")} == set(map(folder_of, METHODS))
    assert {path.parent.name for path in ROOT.glob("*/README.md")} == set(map(folder_of, METHODS))


def smoke_run(method: str, output: Path) -> dict[str, Any]:
    """What the smoke recipe of a method measured; what holds for all methods is checked."""
    smoke = SMOKE.get(method, f"trainers/{method}/smoke.yaml")
    assert main(["train", smoke, "--output_dir", str(output), "--disable_tqdm", "true"]) == 0
    result = json.loads((output / "metrics.json").read_text())
    assert (result["method"], result["steps"], result["processes"]) == (method, 6, 1)
    assert result["before"] and set(result["before"]) <= set(result["after"])
    assert all(math.isfinite(value) for value in result["after"].values())
    moved = [key for key in result["before"] if result["before"][key] != result["after"][key]]
    rewarded = METHODS[method].kind in ("prompts", "captions")
    assert any(key.endswith("reward" if rewarded else "loss") for key in moved)
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("run.json", "trainer_state.json"):
        assert (output / name).is_file()
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    return result


@pytest.mark.parametrize("method", all_but(["rpo", "inpo", "mdpo", "pf_ppo", "sft", "reward"], OF_TEXT))
def test_smoke_recipe_runs(method: str, tmp_path: Path) -> None:
    result = smoke_run(method, tmp_path / "run")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "run" / name).is_file()
    assert set(result["data"]) == {"train", "heldout"}


@pytest.mark.parametrize("method", all_but(["diffusion_dpo", "d3po"], OF_IMAGES))
def test_smoke_recipe_of_images_runs_and_so_does_the_command_that_it_names(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = smoke_run(method, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"Next:\n  {result['next']}\n" in said
    if METHODS[method].kind == "captions":
        assert "heldout_reward " in said
    else:  # Wilson's interval of 9 in 18
        assert "heldout_error/chosen" in said and "0.500 [0.290, 0.710]" in said
    whole = method == "diffusion_dpo"  # the others train an adapter
    assert (tmp_path / "run" / ("model_index.json" if whole else "pytorch_lora_weights.safetensors")).is_file()
    assert set(result["data"]) == (set() if METHODS[method].kind == "captions" else {"train", "heldout"})
    program, *words = shlex.split(result["next"])
    assert program == "llmalign" and main([*words, "--steps", "2"]) == 0
    drawn = tmp_path / "run-samples"
    assert len(list(drawn.glob("0*.png"))) == len(list((drawn / "start").glob("0*.png"))) == 8


def test_a_run_without_an_evaluation_set_says_so() -> None:
    result = {"method": "rpo", "model": "m", "steps": 1, "seconds": 1.0, "output_dir": "o", "before": {}, "after": {}}
    table = summary(result)
    assert table.row_count == 1 and "no evaluation set" in next(iter(table.columns[0].cells))
