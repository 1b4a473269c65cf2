"""Two processes with half of the batch each end at the weights, and report the numbers, of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import tiny

SCRIPT = """
import json, os, sys
from llmalign import CoPGConfig, CoPGTrainer, RPOConfig, RPOTrainer
from llmalign.processes import end_processes, load_group_users
from tests.trainers import tiny

def run(model, reference, folder, method):
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer, config, rows = {
        "rpo": (RPOTrainer, RPOConfig, tiny.pairs), "copg": (CoPGTrainer, CoPGConfig, tiny.groups)
    }[method]
    built = trainer(
        model=model,
        args=config(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=8 // world, max_steps=3, beta=0.1,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            alarm_prompts=0, ref_model_name_or_path=reference, per_device_eval_batch_size=2,
        ),
        train_dataset=rows(16),
        eval_dataset=rows(5, seed=5),
        processing_class=tiny.tokenizer(),
    )
    assert built.accelerator.num_processes == world, "the processes do not know each other"
    built.train()
    assert type(built.model_wrapped).__name__ == ("DistributedDataParallel" if world > 1 else "LlamaForCausalLM")
    measured = built.evaluate()
    built.save_model(folder)
    if built.is_world_process_zero():
        with open(os.path.join(folder, "measured.json"), "w") as file:
            json.dump({"train": built.state.log_history[:3], "eval": measured}, file)

load_group_users()
run(*sys.argv[1:5])
end_processes(together=True)
if sys.platform == "linux":
    threads = {open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")}
    assert not [name for name in threads if "gloo" in name], f"the process group is alive: {threads}"
"""


def launch(folder: Path, processes: int, *arguments: str) -> dict:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    out = folder / str(processes)
    done = subprocess.run(
        [*command, str(script), *arguments[:2], str(out), arguments[2]],
        env=environment, capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "measured.json").read_text()) | {"weights": load_file(out / "model.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rpo", "copg"])
def test_two_processes_equal_one(tmp_path, method):
    start, reference = tiny.save(tmp_path / "start", seed=0), tiny.save(tmp_path / "reference", seed=1)
    one, two = (launch(tmp_path, processes, start, reference, method) for processes in (1, 2))
    for alone, together in zip(one["train"], two["train"], strict=True):
        for key in ("loss", "grad_norm", "rewards/accuracies", "drift/chosen"):
            assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-4), key
    for key, value in one["eval"].items():
        if not key.endswith(("_runtime", "_per_second", "_time")):
            assert two["eval"][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
