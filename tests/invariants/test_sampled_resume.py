"""Killed with SIGKILL inside a rollout and resumed, an on-policy run ends at the bytes of an undisturbed one."""

import json
from pathlib import Path

import pytest
import yaml

from llmalign.trainers.checkpoint import find_resumable
from tests.invariants.test_resume import Run

STEPS = 12
CASES = {
    "copg_online": {"replay_prompts": 2, "replay_capacity": 6},
    "mdpo": {},
    "mdpo-lora": {"use_peft": True, "lora_r": 4},
}


def parity(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 7 / 3 + float(tag) for ids, tag in zip(completion_ids, columns["tag"], strict=True)]


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
    path = folder / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    "name", [name if name == "copg_online" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
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
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files
    for file in files:
        assert (torn / file).read_bytes() == (whole / file).read_bytes(), file
    last = [json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for run in (whole, torn)]
    logged = [
        [(entry["step"], entry["loss"], entry["reward"]) for entry in state["log_history"] if "reward" in entry]
        for state in last
    ]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS // 2
