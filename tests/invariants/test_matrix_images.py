"""Every image trainer on two processes under every configuration logs, saves and resumes what one process does."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from llmalign.diffusion.tiny import build_tiny
from tests.invariants import image_cells, matrix, matrix_images
from tests.invariants.launching import ROOT, WITH_DEEPSPEED, build_ops, environment

WRAPPERS = {**matrix.CONFIGS, "fsdp2": "FSDPDenoiser"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What a cell measures in this process alone, and its folder; each is trained once."""
    out, known = tmp_path_factory.mktemp("one"), {}

    def of(cell):
        if cell not in known:
            known[cell] = image_cells.run(*cell.rsplit("-", 1), out, 1, "Denoiser")
        return known[cell], out / cell / "out"

    return of


def launch(config, cells, out):
    if WRAPPERS[config] == "DeepSpeedEngine":
        build_ops(offload="offload" in config)
    words = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", "2", "--main_process_port", "0"]
    given = environment() | ({} if WRAPPERS[config] == "DeepSpeedEngine" else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, image_cells.__file__, str(out), WRAPPERS[config],
         *cells],
        env=given, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())


def check(cell, config, found, folder, one_process):
    alone, alone_folder = one_process(cell)
    assert len(found["steps"]) == len(alone["steps"]) == image_cells.SHARED["max_steps"]
    for (loss, norm), (own_loss, own_norm) in zip(alone["steps"], found["steps"], strict=True):
        assert own_loss == pytest.approx(loss, rel=matrix.CLOSE, abs=matrix.CLOSE), cell
        assert own_norm == pytest.approx(norm, rel=1e-4), cell
    assert found["eval"].keys() == alone["eval"].keys()
    for key, value in alone["eval"].items():  # a picture's reward is a mean of whole numbers
        assert found["eval"][key] == pytest.approx(value, rel=1e-4, abs=1e-4), (cell, key)
    # DeepSpeed's Adam on the CPU multiplies its bias corrections up step by step, and resumed it takes them as powers.
    rounding = 1e-6 if "offload" in config else 0.0
    assert found["resumed_apart"] <= rounding, f"{cell}: the resumed run ends elsewhere"
    for one, two in zip(image_cells.weights(alone_folder), image_cells.weights(folder), strict=True):
        expected, own = load_file(one), load_file(two)
        assert own.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-5, msg=f"{cell} {name}")
    assert_diffusers_reads(folder, adapted=cell.endswith("lora"))


def assert_diffusers_reads(folder, *, adapted):
    """A plain pipeline takes what was saved, every weight of it."""
    if not adapted:
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert saved.keys() == pipe.unet.state_dict().keys()
        assert all(torch.equal(weight, saved[name]) for name, weight in pipe.unet.state_dict().items())
        return
    pipe = build_tiny("sd")
    pipe.load_lora_weights(folder)
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    held = {name: weight for name, weight in pipe.unet.named_parameters() if "lora_" in name}
    assert len(held) == len(saved) > 0
    assert all(torch.equal(w, saved[f"unet.{n.replace('.default_0', '')}"]) for n, w in held.items())


@pytest.mark.slow  # test_image_ranks.py has a quick one, under DDP
@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=[WITH_DEEPSPEED] if "zero" in name else []) for name in WRAPPERS]
)
def test_two_processes_equal_one(config, one_process, tmp_path):
    assert all(row[config] == matrix_images.SAME for row in matrix_images.ROWS.values())
    found = launch(config, list(matrix_images.TRAINERS), tmp_path / config)
    assert set(found) == set(matrix_images.TRAINERS)
    for cell in found:
        check(cell, config, found[cell], tmp_path / config / cell / "out", one_process)
