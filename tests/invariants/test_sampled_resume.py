"""Killed with SIGKILL inside a rollout and resumed, an on-policy run ends at the bytes of an undisturbed one."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from llmalign.trainers.resuming import find_resumable
from tests.invariants.test_resume import Run

STEPS = 12
LAST = f"checkpoint-{STEPS}"
CASES = {
    "copg_online": {"replay_prompts": 2, "replay_capacity": 6},
    "mdpo": {},
    "mdpo-lora": {"use_peft": True, "lora_r": 4},
    "pf_ppo": {"strategy": "best_random", "critic_learning_rate": 1e-2},
    "pf_ppo-model": {
        "strategy": "best_worst",
        "critic": "model",
        "critic_learning_rate": 1e-3,
        "reward_models": ["rewards"],
    },
    "fdpg": {
        "target": "distributional",
        "moments": [2.5],
        "moment_samples": 32,
        "baseline": "window",
        "proposal": "offline",
        "proposal_update_interval": 2,
    },
    "fdpg-reward": {"target": "reward", "beta": 2.0},
}
#: what a checkpoint holds beside the model: a critic, an offline proposal
BESIDE = {"pf_ppo": "critic", "pf_ppo-model": "critic", "fdpg": "proposal"}


def parity(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 7 / 3 + float(tag) for ids, tag in zip(completion_ids, columns["tag"], strict=True)]


def reward_model(folder: Path, model: Path) -> Path:
    config = AutoConfig.from_pretrained(model, num_labels=1)
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path, name: str, output_dir: Path) -> Path:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n} ", "tag": n % 3}) + "\n" for n in range(10)))
    recipe = {
        "method": name.split("-")[0],
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "reward_funcs": [f"{__file__}:parity"],
        "reward_columns": ["tag"],
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": str(output_dir),
        **CASES[name],
    }
    if "reward_models" in recipe:
        recipe["reward_models"] = [str(reward_model(folder / name, model)) for name in recipe["reward_models"]]
    path = folder / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow  # test_kills.py has quick ones
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_ends_at_the_same_bytes(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    recipes = [write_recipe(tmp_path, tiny_model_dir, name, folder) for folder in (whole, torn)]
    reference, victim = Run(recipes[0]), Run(recipes[1], "--resume", "auto")
    victim.kill_when((torn / "_incomplete" / "checkpoint-6").exists)  # ten prompts are an epoch of ten steps
    newest, skipped = find_resumable(torn)
    assert newest is not None and newest.name in ("checkpoint-5", "checkpoint-6") and not skipped
    resumed = Run(recipes[1], "--resume", "auto")
    reference.finish()
    resumed.finish()
    # The model as it was saved, and all of the last checkpoint, a critic too.
    files = sorted(str(path.relative_to(whole)) for path in whole.glob("**/*.safetensors"))
    files = [file for file in files if file in ("model.safetensors", "adapter_model.safetensors") or LAST in file]
    assert len(files) == (3 if name in BESIDE else 2)
    assert name not in BESIDE or f"{LAST}/{BESIDE[name]}.safetensors" in files
    for file in files:
        assert (torn / file).read_bytes() == (whole / file).read_bytes(), file
    last = [json.loads((run / LAST / "trainer_state.json").read_text()) for run in (whole, torn)]
    logged = [
        [(entry["step"], entry["loss"], entry["reward"]) for entry in state["log_history"] if "reward" in entry]
        for state in last
    ]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS // 2
