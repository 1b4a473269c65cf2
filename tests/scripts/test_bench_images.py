"""The image bench compares equal work, keeps its numbers apart, and writes what it measured. No limit on any time."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import bench_images
import pytest
import torch
from benching import image_contenders, images
from benching.image_cases import CASES, TRAINED, Case, Job

STEPS, PAIRS = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("image-bench")
    images.prepare(Job("prepare", "full", False, True, STEPS, PAIRS, str(home), quick=True))
    return home


def job(folder: Path, contender: str, trained: str, **changes) -> Job:
    return replace(Job(contender, trained, False, False, STEPS, PAIRS, str(folder), quick=True), **changes)


@pytest.mark.parametrize("trained", TRAINED)
def test_one_batch_gives_both_the_same_loss_and_gradient(folder, trained):
    loss, gradient = image_contenders.gaps(job(folder, "ours", trained))
    assert loss < 1e-3 and gradient < bench_images.GRADIENT_TOLERANCE


def test_another_beta_is_other_work(folder, monkeypatch):
    made = image_contenders.Ours

    def other(given: Job) -> image_contenders.Ours:
        ours = made(given)
        ours.trainer.args.beta *= 1.01
        return ours

    monkeypatch.setattr(image_contenders, "Ours", other)
    assert image_contenders.gaps(job(folder, "ours", "full"))[1] > bench_images.GRADIENT_TOLERANCE


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_runs_have_the_same_losses_with_and_without_encoders_and_recomputation(folder, trained):
    turns: list[int] = []
    jobs = [
        job(folder, "ours", trained),
        job(folder, "script", trained),
        job(folder, "script", trained, encoders=True, recompute=True),
    ]
    runs = [image_contenders.CONTENDERS[one.contender](one).train(lambda: turns.append(0)) for one in jobs]
    assert len(turns) == len(jobs) * (STEPS + 1)
    for one, other in pairwise(torch.tensor(run) for run in runs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0)
    assert len({loss for loss, _ in runs[0]}) == STEPS


def test_bytes_of_weights_worked_out_by_hand():
    network = torch.nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([network.weight])
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # 6 trained weights of 8 parameters, two moments of each and the step; 4 bytes a number.
    assert image_contenders.account(network, torch.nn.Linear(1, 1), optimizer) == {
        "network": 32,
        "reference": 8,
        "gradients": 24,
        "optimizer": 48 + 4,
    }


def measured(seconds: list[float], megabytes: float, losses: tuple[float, ...] = (0.5, 0.4)) -> dict:
    steps = [[loss, 1.0] for loss in losses]
    times = [[one, 2 * one] for one in seconds]
    return {"seconds": times, "megabytes": megabytes, "tensors": megabytes / 10, "steps": steps, "held": {}}


def test_ratios_are_medians_over_rounds():
    found = bench_images.summarise(
        Case("full", "full", "kept"),
        4,
        1.0,
        {
            "ours": measured([1.0, 2.0, 1.0], 60),
            "script": measured([2.0, 2.0, 3.0], 100),
            "with encoders": measured([3.0, 6.0, 8.0], 120),
        },
    )
    assert (found.time_ratio, found.wall_ratio, found.memory_ratio, found.tensors_ratio) == (2.0, 2.0, 0.6, 0.6)
    assert (found.low, found.high) == (1.0, 3.0)
    # Encoding adds a second to ours in the first epoch: 3 / 2, 6 / 3, 8 / 2; later 3, 3, 8.
    assert (found.first_epoch, found.later_epochs, found.encoded_memory_ratio) == (2.0, 3.0, 0.5)
    assert found.seconds == (1.0, 2.0, 6.0)


@pytest.mark.parametrize(("case", "name"), [("full / full, kept", "ours"), ("lora / full, kept", "with encoders")])
def test_other_losses_are_refused(case, name):
    runs = {one: measured([1.0], 1) for one in ("ours", "script", "with encoders")}
    runs[name] = measured([1.0], 1, (0.5, 0.45))
    with pytest.raises(RuntimeError, match=f"{name} does not train like the script"):
        bench_images.check_alike(CASES[case], runs)


def test_only_cases_that_train_the_same_weights_are_equal_work():
    equal = {(case.ours, case.script) for case in CASES.values() if case.equal_work}
    assert equal == {("full", "full"), ("lora", "lora"), ("lora", "lora-two")}
    jobs = CASES["lora / full, as shipped"].jobs(3, 2, "folder", quick=False)
    assert [(one.trained, one.recompute, one.encoders) for one in jobs.values()] == [
        ("lora", False, False),
        ("full", True, False),
        ("full", True, True),
    ]


@pytest.mark.slow
def test_a_case_runs_in_processes_of_its_own_and_is_written(tmp_path, capsys):
    out = tmp_path / "made" / "images.json"
    arguments = ["--quick", "--rounds", "2", "--pairs", "1", "--case", "lora / lora-two, recomputed"]
    assert bench_images.main([*arguments, "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    (found,) = content["cases"]
    assert found["case"] == "lora / lora-two, recomputed" and min(found["time_ratio"], found["memory_ratio"]) > 0
    held = found["held"]
    assert held["ours"]["reference"] == held["ours"]["encoders"] == 0 < held["script"]["reference"]
    assert held["script"]["encoders"] == 0 < held["with encoders"]["encoders"]
    assert held["ours"]["gradients"] == held["script"]["gradients"] < held["ours"]["network"]
    assert "numbers mean nothing" in capsys.readouterr().out
