"""Two processes share the work of the rounds and come to the stages of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.loop.running import Bench, results

pytestmark = pytest.mark.slow

#: of a round, what depends neither on how training was shared nor on who sampled which shard
SHARED = ("samples.jsonl", "judged.jsonl", "pairs.jsonl", "rows.jsonl")
#: `llmalign iterate` with small shards of rows, so that two processes have one each or more
SCRIPT = """
import sys
from importlib import import_module
from llmalign.cli import main

if __name__ == "__main__":
    import_module("llmalign.loop.cache").SHARD_ROWS = int(sys.argv[1])
    sys.exit(main(["iterate", "recipe.yaml"]))
"""


def run(bench: Bench, processes: int, rows: int) -> str:
    """What the run said; it comes to its end."""
    (bench.folder / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *launcher, "script.py", str(rows)], cwd=bench.folder, env=environment, capture_output=True,
        text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def begun(said: str) -> list[str]:
    return [line.split()[1] for line in said.splitlines() if line.startswith("INFO round-") and line.endswith(" ...")]


@pytest.fixture(scope="module")
def one(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("one"), tiny_model_dir)
    bench.write(select="independent", eval_prompts=4, per_device_train_batch_size=2)
    run(bench, 1, rows=2)
    return bench


@pytest.mark.parametrize("rows", [2, 256], ids=["a shard or more for each", "one shard for both"])
def test_two_processes_equal_one(rows: int, one: Bench, tmp_path: Path) -> None:
    """The same samples, judgements, pairs and log-probs; and weights that are equal but for the order of their sums."""
    bench = Bench(tmp_path, one.model)
    bench.write(select="independent", eval_prompts=4, per_device_train_batch_size=1)
    run(bench, 2, rows)
    alone, together = results(one.output), results(bench.output)
    assert set(alone) == set(together)
    for name in alone:
        if name.startswith(("round-0", "round-1")) and name.endswith(SHARED) and "evaluate" not in name:
            if rows == 2 or not name.endswith("rows.jsonl"):
                assert together[name] == alone[name], name
    # Of other shards other batches are made, whose sums may differ in their last digits.
    for mine, other in zip(*(each.rows(1, "cache", "rows.jsonl") for each in (one, bench)), strict=True):
        logps = [key for key in mine if key.endswith("_logps")]
        assert len(logps) == 4 and [other[key] for key in logps] == pytest.approx(
            [mine[key] for key in logps], abs=1e-4
        )
        assert {**mine, **{key: other[key] for key in logps}} == other
    weights = [load_file(each.output / "round-1" / "train" / "model.safetensors") for each in (one, bench)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-5, msg=name)
    assert json.loads(together["rounds.json"])["rounds"][2]["kl"]["mean"] is not None
    assert begun(run(bench, 2, rows)) == [] and results(bench.output) == together


def test_a_stage_of_which_one_process_has_done_its_share_is_gone_on_with(one: Bench, tmp_path: Path) -> None:
    """One process finds its shards and has nothing to do; it must not be waited for, nor wait."""
    bench = Bench(tmp_path, one.model)
    bench.write(select="independent", eval_prompts=4, per_device_train_batch_size=1)
    run(bench, 2, rows=2)
    before = results(bench.output)
    folder = bench.output / "round-2" / "cache"
    kept = [
        [row[f"ref_{side}_logps"] for side in ("chosen", "rejected")] for row in bench.rows(2, "cache", "rows.jsonl")
    ]
    for name in ("manifest.json", "rows.jsonl"):
        (folder / name).unlink()
    shard = folder / "ref" / "shards" / "00000.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_text("".join(json.dumps({"logps": logps}) + "\n" for logps in kept[:2]))
    assert begun(run(bench, 2, rows=2)) == ["round-2/cache"]
    assert results(bench.output) == before
