"""A row that one of two processes reads makes a loss NaN or infinite: both stop before that step, or both leave it out.

Beside one process on the same rows of each step, by plain gradient descent.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmalign import PairConfig, PairTrainer
from llmalign.errors import UserError
from tests.invariants.launching import NEEDS_DEEPSPEED, environment
from tests.trainers import tiny

ROOT = Path(__file__).parents[2]
BAD_ROW, ROWS, STEPS = 5, 16, 4
#: a NaN that the reference brings, and a constant, which has no gradient at all
RUNS = {
    "stop-nan": {"value": math.nan, "non_finite": "stop"},
    "skip-nan": {"value": math.nan, "non_finite": "skip"},
    "skip-nan-accumulated": {"value": math.nan, "non_finite": "skip", "gradient_accumulation_steps": 2},
    "skip-constant": {"value": math.inf, "non_finite": "skip"},
}
SAVED = {"save_strategy": "steps", "save_steps": 1}
SCRIPT = """
import sys
from llmalign.processes import end_processes, load_group_users
from tests.invariants.test_finite_ranks import run_all

load_group_users()
run_all(sys.argv[1], sys.argv[2], sys.argv[3])
end_processes(together=True)
"""


class ConstantTrainer(PairTrainer):
    """Adds to a row's loss what its data say; a number alone has no gradient."""

    def loss_terms(self, scores, inputs):
        constant = torch.where(inputs["row_id"] == BAD_ROW, math.inf, 0.0)
        return super().loss_terms(scores, inputs) | {"constant": constant}


def train(start, folder, value, **options):
    """Run; what was said, the steps taken, and how many were left out."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    constant = value == math.inf
    rows = tiny.pairs(
        ROWS,
        ref_chosen_logps=lambda row: value if row == BAD_ROW and not constant else -40.0 - row,
        ref_rejected_logps=lambda row: -41.0 - row,
    )
    common = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": STEPS, "optim": "sgd", "learning_rate": 0.01,
        "per_device_train_batch_size": 4 // world // options.get("gradient_accumulation_steps", 1),
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "alarm_prompts": 0,
        "max_length": 96,
    }  # fmt: skip
    config = PairConfig(**{**common, **options})
    trainer = (ConstantTrainer if constant else PairTrainer)(
        model=start, args=config, train_dataset=rows, processing_class=tiny.tokenizer()
    )
    said = ""
    try:
        trainer.train()
    except UserError as error:
        said = str(error)
    trainer.save_model(str(folder))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, {"said": said, "steps": trainer.state.global_step, "rates": [e["learning_rate"] for e in logged]}


def run_all(start, out, wrapper):
    """All runs on this process; each leaves its results in a file of its own."""
    for name, options in RUNS.items():
        trainer, found = train(start, Path(out) / name, **options)
        assert type(trainer.model_wrapped).__name__ == wrapper and trainer.accelerator.num_processes == 2
        rank = trainer.accelerator.process_index
        (Path(out) / name / f"rank-{rank}.json").write_text(json.dumps(found))
    # Adam makes 0 / 0 of the tokens that no row has
    _, found = train(start, Path(out) / "weights", -40.0, optim="adamw_torch", adam_epsilon=0.0, **SAVED)
    (Path(out) / "weights" / f"rank-{rank}.json").write_text(json.dumps(found))


def bad_step(start, folder):
    """The step with the bad row, and the row numbers of each step, from the data loader of one process."""
    trainer, _ = train(start, folder, -40.0, non_finite="stop")
    batches = [batch["row_id"].tolist() for batch in trainer.get_train_dataloader()]
    return next(step for step, rows in enumerate(batches, 1) if BAD_ROW in rows), batches


def assert_weights(folder, expected):
    wanted = load_file(expected / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-5, msg=f"{folder.name} {name}")


def zero(stage):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/zero{stage}.yaml"]
    return pytest.param(
        "DeepSpeedEngine", [*launcher, "--num_processes", "2"], marks=NEEDS_DEEPSPEED, id=f"zero{stage}"
    )


@pytest.mark.parametrize(
    ("wrapper", "launcher"),
    [
        pytest.param(
            "DistributedDataParallel",
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            id="ddp",
        ),
        zero(1),
        zero(2),
        zero(3),
    ],
)
def test_both_processes_decide_alike(tmp_path, wrapper, launcher):
    start = tiny.save(tmp_path / "start")
    bad, batches = bad_step(start, tmp_path / "order")
    for name, options in RUNS.items():
        train(start, tmp_path / "one" / name, **options)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *launcher, str(script), start, str(tmp_path / "two"), wrapper],
        env=environment(),
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name in RUNS:
        folder = tmp_path / "two" / name
        first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
        assert first["steps"] == second["steps"] == (bad - 1 if name == "stop-nan" else STEPS)
        assert [bool(one["said"]) for one in (first, second)] == [name == "stop-nan"] * 2
        if name != "stop-nan":
            assert first["rates"] == pytest.approx([0.01 * (STEPS - step) / STEPS for step in range(STEPS)])
        assert_weights(folder, tmp_path / "one" / name)
        lines = [json.loads(line) for line in (folder / "non_finite" / f"step-{bad}.jsonl").read_text().splitlines()]
        assert sorted(line["row"] for line in lines) == sorted(batches[bad - 1])
        guilty = {line["process"] for line in lines if line["loss"] in ("nan", "inf")}
        assert guilty == {line["process"] for line in lines if line["row"] == BAD_ROW}
        assert {line["process"] for line in lines} == {0, 1}
    said = [json.loads((tmp_path / "two" / "weights" / f"rank-{rank}.json").read_text())["said"] for rank in range(2)]
    assert said[0] == said[1] and said[0].startswith("Step 1 left weights that are not finite (first of ")
    assert not list((tmp_path / "two" / "weights").glob("checkpoint-*"))
