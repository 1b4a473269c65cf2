"""PF-PPO with each kind of critic on two processes, under DDP and ZeRO, against one."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.invariants.launching import NEEDS_DEEPSPEED, ROOT, environment
from tests.trainers import tiny

SCRIPT = """
import json, os, sys
from llmalign.errors import UserError
from llmalign.processes import end_processes, load_group_users
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny

load_group_users()
start, out, wrapper, methods = *sys.argv[1:4], json.loads(sys.argv[4])
world = int(os.environ.get("WORLD_SIZE", 1))
if wrapper == "DeepSpeedEngine":
    try:
        runs.build("pf_ppo-model", out, model=start)
        raise SystemExit("critic: model was not refused")
    except UserError as error:
        assert "critic: model is a second network" in str(error), error
for method in methods:
    folder = os.path.join(out, method)
    trainer = runs.build(
        method, folder, model=start, record=True, per_device_train_batch_size=16 // world,
        max_steps=4, num_iterations=2, save_strategy="steps", save_steps=4, optim="sgd", learning_rate=1e-3,
        lr_scheduler_type="constant", max_grad_norm=1e9,  # DeepSpeed clips policy and critic as one
    )
    trainer.train()
    assert trainer.accelerator.num_processes == world
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped).__name__
    if trainer.is_world_process_zero():
        with open(os.path.join(folder, "log.json"), "w") as file:
            json.dump(trainer.state.log_history[:4], file)
end_processes(together=True)
"""


def launch(folder, start, wrapper, methods, launcher=()):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), start, str(folder / wrapper), wrapper, json.dumps(methods)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / wrapper


def weights_of(folder):
    checkpoint = folder / "checkpoint-4"
    return load_file(checkpoint / "model.safetensors") | {
        f"critic {name}": weight for name, weight in load_file(checkpoint / "critic.safetensors").items()
    }


@pytest.mark.parametrize(
    ("wrapper", "launcher", "methods"),
    [
        pytest.param(
            "DistributedDataParallel",
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            ["pf_ppo", "pf_ppo-model"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "DeepSpeedEngine",
            ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/zero3.yaml"],
            ["pf_ppo"],
            marks=NEEDS_DEEPSPEED,
        ),
    ],
)
def test_two_processes_equal_one(wrapper, launcher, methods, tmp_path):
    start = tiny.save(tmp_path / "start")
    alone = launch(tmp_path, start, "LlamaForCausalLM", methods)
    together = launch(tmp_path, start, wrapper, methods, launcher)
    before = LlamaForCausalLM.from_pretrained(start).state_dict()
    for method in methods:
        logs = [json.loads((folder / method / "log.json").read_text()) for folder in (alone, together)]
        for one, other in zip(*logs, strict=True):
            if wrapper == "DeepSpeedEngine":  # which has one norm for both
                one["grad_norm"] = math.hypot(one["grad_norm"], one.pop("critic/grad_norm"))
            for name in one:
                if name.startswith(("critic/", "kl_")) or name in ("loss", "grad_norm", "kept"):
                    assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (method, name)
        one, other = (weights_of(folder / method) for folder in (alone, together))
        assert any(not torch.equal(one[name], weight) for name, weight in before.items() if name in one)
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5, msg=name)
