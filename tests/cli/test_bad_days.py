"""`llmalign train` on a disk that fills up or goes read-only, and without memory: a sentence, and a run that goes on.

In a mount namespace of its own, where the tests may mount small disks: that takes root.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmalign.trainers.resuming import find_resumable

ROOT = Path(__file__).parents[2]
TINY = [
    "train", "trainers/rpo/smoke.yaml", "--alarm_prompts", "0", "--max_steps", "4", "--report_to", "none",
    "--eval_strategy", "no", "--holdout_rows", "0",
]  # fmt: skip
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

MOUNTED = """
import contextlib, io, json, os, resource, subprocess, sys
from pathlib import Path

from safetensors.torch import load_file
import torch
from llmalign.cli import main
from llmalign.trainers.resuming import ASIDE, find_resumable
from llmalign.trainers.running_out import Resources
from tests.cli.test_bad_days import TINY
from tests.trainers.test_running_out import At
from tests.trainers.toy_runs import make

disk, out = Path(sys.argv[1]), Path(sys.argv[2])

def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)

def run(*more, saving=("steps", "--save_steps", "1")):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([*TINY, "--save_strategy", *saving, *more])
    return {"status": status, "said": [line for line in said.getvalue().splitlines() if line.startswith("llmalign:")]}

def whole(folder):
    found, broken = find_resumable(folder)
    return [None if found is None else found.name, len(broken), (folder / ASIDE).exists()]

results = {}
mount("-t", "tmpfs", "-o", "size=24m", "tmpfs")
full = disk / "run"
results["full"] = run("--output_dir", str(full)) | {"left": whole(full)}
mount("-o", "remount,size=200m")
results["resumed"] = run("--output_dir", str(full), "--resume", "auto")
results["uninterrupted"] = run("--output_dir", str(out / "whole"))
weights = [load_file(folder / "model.safetensors") for folder in (full, out / "whole")]
results["equal"] = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
subprocess.run(["umount", "-l", str(disk)], check=True)

mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
results["model"] = run("--output_dir", str(disk / "run"), saving=["no"])
results["model"]["left"] = sorted(path.name for path in (disk / "run").glob("*.safetensors"))
subprocess.run(["umount", "-l", str(disk)], check=True)

mount("-t", "tmpfs", "-o", "size=24m", "tmpfs")
trainer = make(disk / "run", callbacks=[At(4, lambda: mount("-o", "remount,ro"))])
try:
    with Resources(trainer.args, peft=False) as resources:
        resources.expect(trainer)
        trainer.train()
except ValueError as error:
    results["read-only"] = {"said": [str(error)], "left": whole(disk / "run")}
results["refused"] = run("--output_dir", str(disk / "other"))
cache = ["--reference_cache_dir", str(disk / "cache"), "--precompute_ref_log_probs", "true"]
results["cache"] = run("--output_dir", str(out / "cached"), *cache)
(out / "results.json").write_text(json.dumps(results))
"""
SHORT_OF_MEMORY = """
import os, re, resource, sys
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from llmalign.cli import main
from tests.cli.test_bad_days import TINY

folder, step, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == step and os.environ.get("RANK", "1") == "1":
            own = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (own + megabytes * 2**20, resource.RLIM_INFINITY))

DEFAULT_CALLBACKS.append(Limit)
large = ["--per_device_train_batch_size", "32", "--scoring", "padded"]
sys.exit(main([*TINY, *large, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", folder]))
"""


def script(folder, text, *arguments, launcher=(), before=()):
    path = folder / "script.py"
    path.write_text(text)
    # Large tensors straight from the system, whose limit is to be met.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(
        [*before, sys.executable, *launcher, str(path), *map(str, arguments)],
        env=environment, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def may_mount():
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs root and unshare, to mount a disk that nobody else sees")
def test_disks_that_fill_up_and_go_read_only(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = script(tmp_path, MOUNTED, disk, tmp_path, before=["unshare", "-m"])
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    (said,) = results["full"]["said"]
    assert results["full"]["status"] == 2 and results["full"]["left"] == ["checkpoint-2", 0, False]
    assert said.startswith(f"llmalign: No room is left to write {disk}") and "goes on from checkpoint-2." in said
    assert results["resumed"] == results["uninterrupted"] == {"status": 0, "said": []} and results["equal"]
    assert results["model"]["status"] == 2 and results["model"]["left"] == []
    assert "No room is left" in results["model"]["said"][0] and "no checkpoint yet" in results["model"]["said"][0]
    assert "Read-only file system" in results["read-only"]["said"][0]
    assert results["read-only"]["left"][:2] == ["checkpoint-2", 0]
    assert results["refused"]["status"] == results["cache"]["status"] == 2
    assert "output_dir" in results["refused"]["said"][0] and "Read-only" in results["refused"]["said"][0]
    assert "reference_cache_dir" in results["cache"]["said"][0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], LAUNCH], ids=["alone", "one-of-two"])
def test_a_process_that_may_have_no_more_memory(tmp_path, launcher):
    """Of two processes only the second; the first, which waits for it, is ended by the launcher."""
    done = script(tmp_path, SHORT_OF_MEMORY, tmp_path / "run", 3, 0, launcher=launcher)
    said = [line for line in done.stderr.splitlines() if line.startswith("llmalign: Memory ran out after step 2 (")]
    assert done.returncode == (1 if launcher else 2) and len(said) == 1, done.stderr[-4000:]
    assert "activation_checkpointing: true" in said[0] and "--resume auto goes on from checkpoint-2" in said[0]
    assert find_resumable(tmp_path / "run", 2 if launcher else 1)[0] == tmp_path / "run" / "checkpoint-2"
