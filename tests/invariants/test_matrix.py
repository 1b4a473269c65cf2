"""Every text trainer on two processes under every configuration logs what one process logs, or says why it cannot.

On-policy trainers are compared on recorded completions. Adam trains them, with its state sharded where it is.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.invariants import matrix, matrix_run
from tests.invariants.launching import ROOT, WITH_DEEPSPEED, build_ops, environment
from tests.trainers import tiny


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    """What a trainer logs in this process alone, and the folder of its weights; each is trained once."""
    out, known = tmp_path_factory.mktemp("one"), {}

    def of(name):
        if name not in known:
            known[name] = matrix_run.train(name, start, str(out), 1, "")
        return known[name], out / name

    return of


def launch(config, names, start, out):
    if matrix.CONFIGS[config] == "DeepSpeedEngine":
        build_ops(offload="offload" in config)
    out.mkdir()
    words = ["--config_file", f"accelerate_configs/{config}.yaml", "--main_process_port", "0", matrix_run.__file__]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, start, str(out), matrix.CONFIGS[config], *names],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())


def check(name, config, found, folder, one_process):
    """The cell of the matrix is as the table says."""
    alone, alone_folder = one_process(name)
    if matrix.expected(name, config) != matrix.SAME:
        assert matrix.expected(name, config) in found["refused"]
        return
    assert len(found["logged"]) == len(alone["logged"])
    compared = 0
    for one, two in zip(alone["logged"], found["logged"], strict=True):
        if "grad_norm" in one and matrix.CONFIGS[config] == "DeepSpeedEngine":  # one norm of a policy and its critic
            one = one | {"grad_norm": math.hypot(one["grad_norm"], one.get("critic/grad_norm", 0))}
        for key in one.keys() & two.keys():
            limit = matrix.CLOSE * max(1, abs(one[key])) * (1 if key.endswith("loss") else 10)
            assert two[key] == pytest.approx(one[key], rel=0, abs=limit), (name, config, key)
            compared += key.endswith("loss")
    assert compared >= matrix_run.COMMON["max_steps"]
    if name in matrix_run.RESUMED:
        # DeepSpeed's Adam on the CPU multiplies its bias corrections up, and takes them as powers once it is resumed.
        rounding = 1e-6 if "offload" in config else 0.0
        assert found["resumed_apart"] <= rounding, f"{name}: the resumed run ends elsewhere"
    assert_same_weights(alone_folder, folder, name)


def assert_same_weights(one, other, name):
    """What was saved can be read as what one process saves, and is it up to rounding."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    for file in files:
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
    if name == "rpo":
        _, report = AutoModelForCausalLM.from_pretrained(other, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]


def run(config, names, start, one_process, tmp_path):
    found = launch(config, names, start, tmp_path / config)
    assert list(found) == list(names)
    for name in names:
        check(name, config, found[name], tmp_path / config / name, one_process)


def mark(config, *more):
    sharded_by = [WITH_DEEPSPEED] if matrix.CONFIGS[config] == "DeepSpeedEngine" else []
    return pytest.param(config, marks=[*sharded_by, *more])


@pytest.mark.parametrize("config", [mark(config) for config in matrix.QUICK])
def test_a_few_cells(config, start, one_process, tmp_path):
    run(config, matrix.QUICK[config], start, one_process, tmp_path)


@pytest.mark.parametrize("config", [mark(config, pytest.mark.slow) for config in matrix.CONFIGS])
def test_every_cell(config, start, one_process, tmp_path):
    run(config, tuple(matrix.TRAINERS), start, one_process, tmp_path)


def test_the_page_shows_the_matrix_as_it_is_tested():
    page = (ROOT / "accelerate_configs" / "README.md").read_text().splitlines()
    first = page.index(matrix.table()[0])
    assert page[first : first + len(matrix.table())] == matrix.table()
