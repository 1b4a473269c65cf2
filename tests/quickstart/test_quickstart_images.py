"""The quickstart of images from end to end, shrunk: a base of a few steps stands for the trained one."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="image models need diffusers, and it is not installed")
pytest.importorskip("sklearn", reason="the digits come from scikit-learn, and it is not installed")

from PIL import Image

from llmalign import quickstart_images as quick
from llmalign.diffusion.base import BaseSettings
from llmalign.diffusion.digits import train_digits
from llmalign.rewards.images import load_image_reward

SHRUNK = quick.Settings(pairs=8, held_out_pairs=4, steps=3, batch=4, pictures=20, sampling_steps=2, batch_drawn=20)


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    start = train_digits(folder / "base", settings=BaseSettings(vae_steps=2, unet_steps=2), progress=False)
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(screen):
        patch.setattr(quick, "ensure_digits", lambda: start)
        results = quick.main(folder / "run", seed=3, settings=SHRUNK)
    return folder / "run", results, screen.getvalue()


def test_it_leaves_a_lora_file_numbers_and_pictures(shrunk: tuple[Path, dict, str]) -> None:
    folder, results, _ = shrunk
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    for name in ("grid.png", "curves.png"):
        assert Image.open(folder / name).size[0] > 300


def test_what_it_prints_is_what_it_measured(shrunk: tuple[Path, dict, str]) -> None:
    _, results, printed = shrunk
    before, after = (results["measured"][name] for name in ("before", "after"))
    for entry in (before, after):
        assert f"{entry['reward']['mean']:.3f}" in printed
    gain = after["reward"]["mean"] - before["reward"]["mean"]
    assert results["gain"]["mean"] == pytest.approx(gain, abs=1e-6)
    assert results["history"][0]["eval_rewards/accuracies"] == 0.5


def test_of_two_pictures_the_brighter_one_is_chosen_and_ties_are_left_out() -> None:
    dark, light = Image.new("RGB", (8, 8), (10, 10, 10)), Image.new("RGB", (8, 8), (200, 200, 200))
    sides = [[dark, light, dark], [light, dark, dark]]
    rows = quick.pairs_of(["a", "b", "c"], sides, load_image_reward("brightness"))
    assert [row["caption"] for row in rows] == ["a", "b"]
    for row in rows:
        chosen, rejected = (Image.open(io.BytesIO(row[name])).getpixel((0, 0))[0] for name in ("chosen", "rejected"))
        assert (chosen, rejected) == (200, 10)


@pytest.mark.slow
def test_the_whole_quickstart_brightens_and_keeps_the_digits(tmp_path: Path) -> None:
    results = quick.main(tmp_path / "run")
    before, after = (results["measured"][name] for name in ("before", "after"))
    assert results["gain"]["mean"] > 0.05
    assert before["accuracy"]["mean"] > 0.9 and after["accuracy"]["mean"] > 0.85
