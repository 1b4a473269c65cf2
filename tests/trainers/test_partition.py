"""Running partition functions and the windowed baseline: recorded numbers, two real processes, saved state."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmalign.errors import UserError
from llmalign.trainers.partition import BaselineWindow, PartitionFunction, cut_to_mean

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())["fdpg"]
INF, NAN = math.inf, math.nan


def tensor(values: list) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def test_all_samples_against_the_recorded_numbers():
    given = RECORDED["monte_carlo"]
    partition = PartitionFunction(per_context=False)
    partition.update(None, tensor(given["target_log_scores"]) - tensor(given["proposal_logps"]))
    assert partition.log_z(None).item() == pytest.approx(given["log_z_from_these_samples"], rel=1e-12)
    assert partition.log_z(None).exp().item() == pytest.approx(given["z_from_these_samples"], rel=1e-12)
    clean = RECORDED["monte_carlo_clean"]
    partition = PartitionFunction(per_context=False)
    partition.update(None, tensor(clean["target_log_scores"]) - tensor(clean["proposal_logps"]))
    assert partition.log_z(None, count=3).tolist() == pytest.approx([clean["log_z"]] * 3, rel=1e-12)


@pytest.mark.parametrize("split", [1, 2, 5])
def test_it_is_the_mean_of_all_ratios_however_they_come(split):
    ratios = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    partition = PartitionFunction(per_context=False)
    for part in ratios.split(split):
        partition.update(None, part)
    assert partition.log_z(None).exp().item() == pytest.approx(ratios.exp().mean().item(), rel=1e-12)
    assert partition.count() == 40


def test_contexts_are_kept_apart():
    partition = PartitionFunction(per_context=True)
    partition.update(["a", "b", "a"], tensor([0.0, 1.0, math.log(3)]))
    partition.update(["b", "c"], tensor([-INF, -INF]))
    # Z(a) = (1 + 3)/2, Z(b) = (e + 0)/2, Z(c) = 0: known, and 0.
    assert partition.log_z(["c", "a", "b", "a"]).tolist() == pytest.approx(
        [-INF, math.log(2), 1 - math.log(2), math.log(2)]
    )
    assert [partition.count(key) for key in "abcd"] == [2, 2, 1, 0]
    partition.update(["c"], tensor([0.0]))
    assert partition.log_z(["c"]).item() == pytest.approx(-math.log(2))


def test_ratios_beyond_what_exp_holds():
    partition = PartitionFunction(per_context=False)
    partition.update(None, tensor([2000.0, 2000.0]))
    partition.update(None, tensor([-3000.0, -INF]))
    assert partition.log_z(None).item() == pytest.approx(2000 - math.log(2))


def test_without_contexts_keys_are_not_read():
    partition = PartitionFunction(per_context=False)
    partition.update(["a", "b"], tensor([0.0, math.log(3)]))
    assert partition.log_z(["c", "d"]).tolist() == pytest.approx([math.log(2)] * 2)


# max_z


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0, 3.9])
def test_the_largest_ratios_are_cut_to_one_level(limit):
    ratios = torch.tensor([0.0, 0.5, 4.0, 1.0, 10.0, 8.0], dtype=torch.float64)  # mean 3.917
    found = cut_to_mean(ratios.log(), limit).exp()
    assert found.mean().item() == pytest.approx(limit, rel=1e-12)
    level = found.max()
    torch.testing.assert_close(found, ratios.clamp(max=level.item()), rtol=1e-12, atol=0)


def test_the_cut_by_hand():
    # 0 .5 1 4 8 10, limit 2: their sum must be 12; 1.5 from the three smallest leaves 10.5 / 3 = 3.5 for the others.
    ratios = tensor([0.5, 4.0, 1.0, 10.0, 8.0, 0.0])
    assert cut_to_mean(ratios.log(), 2.0).exp().tolist() == pytest.approx([0.5, 3.5, 1.0, 3.5, 3.5, 0.0])
    below = tensor([0.1, -INF])
    assert torch.equal(cut_to_mean(below, 5.0), below)
    assert cut_to_mean(tensor([1e4, -INF]), 1.0).tolist() == [pytest.approx(math.log(2)), -INF]


def test_a_limited_partition_function_stays_below_its_limit():
    partition = PartitionFunction(per_context=True, max_z=2.0)
    partition.update(["a", "a", "b"], tensor([5.0, 0.0, 0.5]))
    assert partition.log_z(["a", "b"]).tolist() == pytest.approx([math.log(2), 0.5])


# The window


def test_the_window_forgets_the_oldest():
    window = BaselineWindow(3)
    assert window.mean() == 0
    window.update(torch.tensor([1.0, 2.0]))
    assert window.mean() == 1.5
    window.update(torch.tensor([6.0, 4.0]))
    assert window.mean() == 4
    again = BaselineWindow(2)
    again.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert again.mean() == 5


# State and bad input


@pytest.mark.parametrize("per_context", [True, False])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(per_context):
    keys, ratios = ["a", "b", "c"], tensor([0.3, -INF, 2.0])
    whole, first = PartitionFunction(per_context=per_context), PartitionFunction(per_context=per_context)
    for one in (whole, first):
        one.update(keys, ratios)
    second = PartitionFunction(per_context=per_context)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for one in (whole, second):
        one.update(keys[:2], ratios[:2] - 1)
    assert torch.equal(second.log_z(keys), whole.log_z(keys))
    assert second.state_dict() == whole.state_dict()


def test_what_is_refused():
    partition = PartitionFunction(per_context=True)
    with pytest.raises(UserError, match="^a log ratio of target to proposal of context 'b' is nan$"):
        partition.update(["a", "b"], tensor([0.0, NAN]))
    with pytest.raises(UserError, match="^the partition function of context 'a' has seen no sample: update it before"):
        partition.log_z(["a"])
    with pytest.raises(ValueError, match="^2 samples need as many context keys, got none"):
        partition.update(None, tensor([0.0, 0.0]))
    with pytest.raises(UserError, match="is one for all, this run asks for one for each context"):
        partition.load_state_dict(PartitionFunction(per_context=False).state_dict())
    with pytest.raises(UserError, match="^max_z must be a finite number above 0, got 0"):
        PartitionFunction(per_context=True, max_z=0)
    with pytest.raises(UserError, match="at least 1 pseudo-reward, got 0"):
        BaselineWindow(0)


# Two processes

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from llmalign.trainers.partition import BaselineWindow, PartitionFunction

dist.init_process_group("gloo")
rank = dist.get_rank()
given = json.loads(sys.argv[1])[rank]
ratios = torch.tensor([float(value) for value in given], dtype=torch.float64)
single, by_context, window = (
    PartitionFunction(per_context=False), PartitionFunction(per_context=True), BaselineWindow(5),
)
single.update(None, ratios)
# Unequal work: the ranks share one context, and the second has one that the first never sees.
keys = ["shared" if place < 2 else f"own {rank}" for place in range(len(ratios))]
by_context.update(keys, ratios)
by_context.update([], ratios[:0])
window.update(torch.arange(3.0) + 10 * rank)
state = {"single": single.state_dict(), "contexts": by_context.state_dict(), "window": window.state_dict()}
everyone = [None, None]
dist.all_gather_object(everyone, state)
if rank == 0:
    print("STATES", json.dumps(everyone))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two gloo processes holds after both have taken in their recorded ratios."""
    script = tmp_path_factory.mktemp("ranks") / "script.py"
    script.write_text(SCRIPT)
    recorded = RECORDED["z_estimation"]
    ratios = json.dumps([recorded["log_ratio_rank0"], recorded["log_ratio_rank1"]])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), ratios], env=environment, capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("STATES ")]
    return json.loads(line.removeprefix("STATES "))


@pytest.mark.slow
def test_z_over_two_processes_against_the_recorded_numbers(two_processes):
    recorded = RECORDED["z_estimation"]
    ranks = [tensor(recorded[f"log_ratio_rank{rank}"]) for rank in (0, 1)]
    means = [ratios.exp().mean().item() for ratios in ranks]
    assert means == pytest.approx([recorded["z_rank0_mean"], recorded["z_rank1_mean"]], rel=1e-9)
    for state in two_processes:
        partition = PartitionFunction(per_context=False)
        partition.load_state_dict(state["single"])
        found = partition.log_z(None).exp().item()
        assert found == pytest.approx(recorded["z_global"], rel=1e-9)
        assert found != pytest.approx(sum(means) / 2, rel=1e-3)
        assert partition.count() == 7


@pytest.mark.slow
def test_contexts_over_two_processes(two_processes):
    first, second = (tensor(RECORDED["z_estimation"][f"log_ratio_rank{rank}"]) for rank in (0, 1))
    assert two_processes[0] == two_processes[1]
    partition = PartitionFunction(per_context=True)
    partition.load_state_dict(two_processes[1]["contexts"])
    expected = [torch.cat([first[:2], second[:2]]), first[2:], second[2:]]
    found = partition.log_z(["shared", "own 0", "own 1"])
    torch.testing.assert_close(
        found.exp(), torch.stack([ratios.exp().mean() for ratios in expected]), rtol=1e-12, atol=0
    )


@pytest.mark.slow
def test_the_window_over_two_processes(two_processes):
    assert two_processes[0]["window"]["kept"] == [1.0, 2.0, 10.0, 11.0, 12.0]
