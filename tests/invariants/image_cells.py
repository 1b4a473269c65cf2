"""Runs of the image trainers, one after another, in however many processes the launcher started.

`python tests/invariants/image_cells.py OUT WRAPPER CELL ...`: each cell is METHOD-lora or METHOD-whole. It trains four
steps and writes what they measured, then goes on from the checkpoint of step 2 in a folder of its own.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from llmalign.diffusion.tiny import build_tiny
from llmalign.processes import end_processes, load_group_users
from tests.diffusion import drawing, training
from tests.diffusion.test_pso_offline import distilled, pso
from tests.diffusion.test_seppo_trainer import seppo

#: With its epsilon Adam would blow a difference of 1e-9 between two tiny gradients up to the learning rate; with this
#: one it is gradient descent with momentum, and has a state that a resumed run needs.
SHARED = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "adam_epsilon": 1.0, "max_grad_norm": 1.0,
    "use_cpu": True,
}  # fmt: skip
CHECKPOINT = "checkpoint-2"


def build(method: str, folder: Path, adapted: bool, world: int) -> Any:
    size = {"per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 2}
    given: dict[str, Any] = {**SHARED, **size, "learning_rate": 0.02}
    pipe = build_tiny("sd")
    rows = training.pairs(3, seed=1)
    if method == "diffusion_dpo":
        changes = {**given, "beta": 200.0, "caption_dropout": 0.3, "random_flip": "image", "eval_timesteps": 2}
        return training.trainer(pipe, folder, peft=adapted, evaluation=rows, **changes)
    if method == "seppo":
        winners = rows.remove_columns(["rejected", "label"]).rename_column("chosen", "image")
        return seppo(pipe, folder, evaluation=winners, **given)
    if method == "pso_offline":
        return pso(distilled(pipe), folder, peft=adapted, evaluation=rows, **given)
    per_round = 12 if method == "pso" else 16
    given |= {"rounds": 4, "per_device_train_batch_size": per_round // world, "per_device_eval_batch_size": 2}
    given |= {"learning_rate": 1.0 if adapted else 0.01, "beta": 5.0, "pairs_per_round": 4}
    if method == "d3po":  # five pairs: one process draws three of them and the other two, of two at a time
        given |= {"pairs_per_round": 5, "per_device_train_batch_size": 10 // world, "sampling_batch_size": 4}
    return drawing.online(
        pipe, folder, peft=adapted, pso=method == "pso", evaluation=drawing.captions(3, first=9), **given
    )


def is_sharded(weight: Any) -> bool:
    return isinstance(weight, DTensor) or weight.numel() == 0


def run(method: str, kind: str, out: Path, world: int, wrapper: str) -> dict[str, Any]:
    folder = out / f"{method}-{kind}"
    trainer = build(method, folder, kind == "lora", world)
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None:  # which would keep weights as small as these whole on every process
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    assert trainer.accelerator.num_processes == world, "the processes do not know each other"
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped).__name__
    spread = [is_sharded(weight) for weight in trainer.model.parameters()]
    expected = wrapper == "FSDPDenoiser" or (plugin is not None and plugin.zero_stage == 3)
    if not expected:
        assert not any(spread)
    else:
        assert all(spread), "the weights are not sharded"
    measured = trainer.evaluate()
    trainer.save_model()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    resumed = go_on(method, kind, folder, world, trainer.accelerator)
    return {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in entries],
        "eval": {k: v for k, v in measured.items() if not k.endswith(("_runtime", "_per_second", "_time"))},
        "resumed_apart": resumed,
    }


def go_on(method: str, kind: str, folder: Path, world: int, accelerator: Any) -> float:
    """The largest difference of a weight to that of a run that goes on from the middle."""
    again = folder / "again"
    if accelerator.is_main_process:
        shutil.copytree(folder / "out" / CHECKPOINT, again / "out" / CHECKPOINT)
    accelerator.wait_for_everyone()
    trainer = build(method, again, kind == "lora", world)
    trainer.train(resume_from_checkpoint=str(again / "out" / CHECKPOINT))
    trainer.save_model()
    accelerator.wait_for_everyone()
    pairs = [(path, again / "out" / path.relative_to(folder / "out")) for path in weights(folder / "out")]
    assert pairs
    return max(apart(load_file(one), load_file(other)) for one, other in pairs)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def weights(folder: Path) -> list[Path]:
    """The files that a run leaves its trained weights in: LoRA's or those of the network."""
    return [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("unet/*.safetensors")]


def main(out: Path, wrapper: str, cells: list[str]) -> None:
    load_group_users()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for cell in cells:
        method, kind = cell.rsplit("-", 1)
        results[cell] = run(method, kind, out, world, wrapper)
        print(cell, json.dumps(results[cell]["steps"]), results[cell]["resumed_apart"], flush=True)
    if int(os.environ.get("RANK", 0)) == 0:
        (out / "results.json").write_text(json.dumps(results))
    end_processes(together=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
