"""LoRA weights merged into a pipeline: the same images from an ordinary folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict

from llmalign.cli import main
from llmalign.diffusion.merging import merge_image_adapter
from llmalign.diffusion.pipelines import family_of
from llmalign.diffusion.sampling import load_for_sampling, sample_images
from llmalign.errors import UserError


def draw(pipe: Any) -> np.ndarray:
    images = sample_images(pipe, ["digit one", "digit two"], steps=3, progress=False)
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.fixture
def run(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """What a LoRA run on the pipeline of a kind leaves, with lora_alpha twice its rank."""
    start = tiny_folder(request.param)
    pipe = DiffusionPipeline.from_pretrained(start)
    family = family_of(pipe)
    network = getattr(pipe, family.network_name)
    torch.manual_seed(0)
    targets = list(family.lora_targets)
    network.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    layers = {f"{family.network_name}_lora_layers": get_peft_model_state_dict(network)}
    folder = tmp_path / "run"
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata({family.network_name: network}))
    (folder / "run.json").write_text(json.dumps({"model_name_or_path": str(start)}))
    return folder


@pytest.mark.parametrize(
    "run", ["sd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd3", "flux"))], indirect=True
)
def test_images_are_those_of_the_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert "merged in" in capsys.readouterr().out
    assert (out / "model_index.json").is_file() and not list(out.rglob("*lora*"))
    assert not list(tmp_path.glob(".*"))
    wanted = draw(load_for_sampling(str(run)))
    assert abs(draw(load_for_sampling(str(out))) - wanted).max() <= 1
    start = json.loads((run / "run.json").read_text())["model_name_or_path"]
    assert abs(draw(load_for_sampling(start)) - wanted).max() > 3


@pytest.mark.parametrize("run", ["sd"], indirect=True)
def test_what_cannot_be_merged_is_said(run: Path, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a whole pipeline: there is no adapter"):
        merge_image_adapter(str(tiny_folder("sd")), tmp_path / "merged")
    with pytest.raises(UserError, match="cannot be put on|another architecture"):
        merge_image_adapter(str(run), tmp_path / "merged", base=str(tiny_folder("sd3")))
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="name it with --base"):
        merge_image_adapter(str(run), tmp_path / "merged")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 2
    assert not (tmp_path / "merged").exists()
