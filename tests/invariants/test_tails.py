"""The last step of an epoch, with fewer rows than the ranks have room for, is the same for any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import tiny

ROWS = 19  # two steps of 8 and a tail of 3: of two ranks with room for 4 each, the second has fillers alone
BALANCED = {"train_sampling_strategy": "batch_rebalance"}
SPLITS = {  # what one process may do on its own, and what two have to, to be compared with one padded batch
    "random": {"one": {}, "two": {}, "accumulated": {"gradient_accumulation_steps": 2}},
    "balanced": {
        "one": BALANCED,
        "two": BALANCED,
        "accumulated": BALANCED | {"gradient_accumulation_steps": 4},
        "tokens": {"tokens_per_batch": 93},
    },
}
SCRIPT = """
import os, sys
from pathlib import Path

from llmalign.processes import end_processes, load_group_users
from tests.invariants.test_tails import SPLITS, train

load_group_users()
for order, splits in SPLITS.items():
    for name in list(splits)[1:]:
        train(sys.argv[1], Path(sys.argv[2]) / order / name, **splits[name])
end_processes(together=True)
"""


def train(model: str, folder: Path, **options) -> None:
    """Two epochs in steps of 8 rows; leaves the weights and what was logged."""
    from llmalign import RPOConfig, RPOTrainer

    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = 8 // world // options.get("gradient_accumulation_steps", 1)
    config = RPOConfig(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=rows, num_train_epochs=2, optim="sgd",
        learning_rate=0.01, beta=0.1, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        alarm_prompts=0, precompute_ref_log_probs=False, **options,
    )  # fmt: skip
    trainer = RPOTrainer(
        model=model, args=config, train_dataset=tiny.pairs(ROWS), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.accelerator.num_processes == world
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "logged.json").write_text(json.dumps([e for e in trainer.state.log_history if "loss" in e]))


def outcome(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return json.loads((folder / "logged.json").read_text()), load_file(folder / "model.safetensors")


def assert_alike(folder: Path, expected: Path) -> None:
    (logged, weights), (wanted, wanted_weights) = outcome(folder), outcome(expected)
    assert len(logged) == len(wanted) == 6
    for step, (entry, other) in enumerate(zip(logged, wanted, strict=True)):
        for key in ("loss", "grad_norm", "rewards/chosen", "logps/chosen", "length/longer_wins"):
            assert entry[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (folder.name, step, key)
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=f"{folder.name} {name}")


def test_one_process_with_more_micro_batches_than_rows(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    train(start, tmp_path / "one", scoring="padded", **BALANCED)
    train(start, tmp_path / "four", gradient_accumulation_steps=4, **BALANCED)
    assert_alike(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    for order, splits in SPLITS.items():
        train(start, tmp_path / order / "one", scoring="padded", **splits["one"])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), start,
         str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=root,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for order, splits in SPLITS.items():
        for name in list(splits)[1:]:
            assert_alike(tmp_path / order / name, tmp_path / order / "one")
