"""On the same recorded completions two processes end an on-policy step at the weights and the numbers of one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import sampled_runs, tiny

#: replayed prompts are drawn by each rank from what it sampled itself
METHODS = sorted(name for name in sampled_runs.METHODS if "replay" not in name)
KEYS = ("loss", "grad_norm", "reward", "kl_to_reference", "entropy")
SCRIPT = """
import json, os, sys
from llmalign.processes import end_processes, load_group_users
from tests.trainers import sampled_runs, tiny

def some_without(prompts, completions, **columns):
    values = sampled_runs.checksum(prompts, completions)
    return [None if value == 0.25 else value for value in values]

load_group_users()
world = int(os.environ.get("WORLD_SIZE", 1))
out, start, *methods = sys.argv[1:]
for method in methods:
    folder = os.path.join(out, method)
    trainer = sampled_runs.build(
        method, folder, model=start, record=True, reward=some_without, max_steps=3,
        per_device_train_batch_size=16 // world,
    )
    assert trainer.accelerator.num_processes == world, "the processes do not know each other"
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == ("DistributedDataParallel" if world > 1 else "LlamaForCausalLM")
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        with open(os.path.join(folder, "history.json"), "w") as file:
            json.dump([entry for entry in trainer.state.log_history if "loss" in entry], file)
end_processes(together=True)
"""


FAULTS = """
import os, sys
from pathlib import Path
from llmalign.errors import UserError
from llmalign.processes import load_group_users
from tests.trainers import sampled_runs

def half(prompts, **columns):
    return [0.5 if rank == 1 else 1.0 for _ in prompts]

def refuses(prompts, **columns):
    if rank == 1:
        raise UserError("there is no sandbox here")
    return [1.0 for _ in prompts]

def hungry(prompts, **columns):
    if rank == 1:
        raise MemoryError("no more")
    return [1.0 for _ in prompts]

load_group_users()
rank, folder = int(os.environ["RANK"]), sys.argv[1]
constraint = {"target": "pointwise", "beta": 0.1, "baseline": "auto"}
whole = sampled_runs.build("mdpo", folder, max_steps=1, save_strategy="steps", save_steps=1, record=True)
whole.train()
checkpoint = Path(folder) / "checkpoint-1"
if rank == 1:
    (checkpoint / "rollout_1.pt").unlink()
whole.accelerator.wait_for_everyone()
for name, run in {
    "constraint": lambda: sampled_runs.build("fdpg", folder, reward=half, **constraint).train(),
    "refused": lambda: sampled_runs.build("mdpo", folder, reward=refuses).train(),
    "memory": lambda: sampled_runs.build("copg", folder, reward=hungry).train(),
    "rollout": lambda: sampled_runs.build("mdpo", folder, max_steps=2).train(str(checkpoint)),
}.items():
    try:
        run()
    except (UserError, MemoryError) as error:
        print(f"<{name} {rank} {type(error).__name__}: {error}>", flush=True)
"""


@pytest.mark.slow
def test_what_one_process_cannot_go_on_after_stops_all_of_them(tmp_path: Path) -> None:
    """None is left waiting: every process of the same run comes to the end of all four."""
    (tmp_path / "script.py").write_text(FAULTS)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(tmp_path / "script.py"), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=root, check=False, timeout=300,
    )  # fmt: skip
    said = {
        "constraint": ["UserError: process 1: .*a constraint is 0 or 1"] * 2,
        "refused": ("UserError: process 1: there is no sandbox", "UserError: there is no sandbox here"),
        "memory": ("UserError: process 1: MemoryError: no more", "MemoryError: no more"),
        "rollout": ["UserError: .*cannot be resumed from: rollout_1.pt is missing"] * 2,
    }
    for name, words in said.items():
        for rank, expected in enumerate(words):
            assert re.search(f"<{name} {rank} {expected}", done.stdout), (name, rank, done.stdout, done.stderr[-2000:])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    start = tiny.save(folder / "start")
    (folder / "script.py").write_text(SCRIPT)
    for processes in (1, 2):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [*command, str(folder / "script.py"), str(folder / str(processes)), start, *METHODS],
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, cwd=root, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return {processes: folder / str(processes) for processes in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, runs: dict[int, Path]) -> None:
    one, two = (json.loads((runs[processes] / method / "history.json").read_text()) for processes in (1, 2))
    assert len(one) == len(two) == 3 and any(entry["grad_norm"] > 0 for entry in one)
    for alone, together in zip(one, two, strict=True):
        for key in set(KEYS) & set(alone):
            assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key
    weights = load_file(runs[1] / method / "model.safetensors")
    start = load_file(runs[1].parent / "start" / "model.safetensors")
    assert any(not torch.equal(weight, start[name]) for name, weight in weights.items())
    for name, weight in load_file(runs[2] / method / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-5, msg=name)
