"""Images that depend on their own seeds alone, the models they are drawn from, and the sheet that shows them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from llmalign.diffusion.sampling import (
    SamplingSettings,
    draw_grid,
    image_seeds,
    load_for_sampling,
    sample_images,
    sampling_settings,
    starting_point,
)
from llmalign.errors import UserError

PROMPTS = ("digit one", "digit two", "red green blue", "a small picture", "digit seven")


def arrays(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def draw(pipe: Any, **options: Any) -> np.ndarray:
    return arrays(sample_images(pipe, PROMPTS, **{"steps": 3, "size": 8, "progress": False, **options}))


@pytest.fixture(scope="module")
def adapter_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a LoRA run leaves, with lora_alpha twice its rank; and a checkpoint of it."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder("sd"))
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    folder = tmp_path_factory.mktemp("run")
    layers = get_peft_model_state_dict(pipe.unet)
    for place in (folder, folder / "checkpoint-3"):
        pipe.save_lora_weights(place, unet_lora_layers=layers, **_collate_lora_metadata({"unet": pipe.unet}))
    recipe = {"model_name_or_path": str(tiny_folder("sd")), "method": "dpo"}
    (folder / "run.json").write_text(json.dumps(recipe))
    pipe.set_progress_bar_config(disable=True)
    np.save(folder / "wanted.npy", draw(pipe))
    return folder


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "ancestral"])
def test_batch_size_changes_nothing(kind: str, tiny_pipeline: Callable[[str], Any]) -> None:
    pipe = tiny_pipeline("sd" if kind == "ancestral" else kind)
    if kind == "ancestral":  # draws noise at every step
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    one, two, all_at_once = (draw(pipe, batch_size=size) for size in (1, 2, 8))
    assert abs(one - two).max() <= 1 and abs(one - all_at_once).max() <= 1  # of 255: rounding
    assert one.shape == (5, 8, 8, 3)


def test_an_image_is_drawn_again_from_its_seed(tiny_pipeline: Callable[[str], Any]) -> None:
    pipe = tiny_pipeline("sd")
    drawn, seeds = draw(pipe, seed=5, guidance=2.0), image_seeds(5, len(PROMPTS))
    for place in (0, 3):
        again = pipe(
            PROMPTS[place],
            num_inference_steps=3,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(seeds[place]),
        ).images[0]
        assert abs(np.asarray(again, dtype=int) - drawn[place]).max() <= 1


def test_seeds_differ_by_image_and_by_seed_and_not_by_their_number() -> None:
    assert image_seeds(0, 3) == image_seeds(0, 100)[:3]
    assert len({*image_seeds(0, 50), *image_seeds(1, 50)}) == 100


def test_one_prompt_gives_different_images(tiny_pipeline: Callable[[str], Any]) -> None:
    first, second = arrays(sample_images(tiny_pipeline("sd"), ["digit one"] * 2, steps=2, progress=False))
    assert abs(first - second).max() > 10


@pytest.mark.parametrize(
    ("kind", "steps", "guidance"), [("sd", 50, 7.5), ("sdxl", 50, 5.0), ("sd3", 28, 7.0), ("flux", 28, 3.5)]
)
def test_settings_are_the_pipelines_own(
    kind: str, steps: int, guidance: float, tiny_pipeline: Callable[[str], Any]
) -> None:
    pipe = tiny_pipeline(kind)
    assert sampling_settings(pipe) == SamplingSettings(steps, guidance)
    assert sampling_settings(pipe, 4, 0.0) == SamplingSettings(4, 0.0)


def test_numbers_that_cannot_be(tiny_pipeline: Callable[[str], Any]) -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(UserError, match="at least one step, not 0"):
        draw(pipe, steps=0)
    with pytest.raises(UserError, match="at least one image, not 0"):
        draw(pipe, batch_size=0)
    with pytest.raises(UserError, match="StableDiffusionPipeline cannot draw 7 pixels"):
        draw(pipe, size=7)


def test_a_folder_with_a_pipeline(tiny_folder: Callable[[str], Path], tiny_pipeline: Callable[[str], Any]) -> None:
    folder = str(tiny_folder("sd"))
    assert np.array_equal(draw(load_for_sampling(folder)), draw(tiny_pipeline("sd")))
    assert starting_point(folder) is None
    assert starting_point(folder, "before") == "before"
    embedded = draw(load_for_sampling("embedded:tiny"))
    assert embedded.shape == (5, 8, 8, 3)


@pytest.mark.parametrize("part", [".", "checkpoint-3"])
def test_a_run_is_put_on_what_it_started_from(
    part: str, adapter_folder: Path, tiny_folder: Callable[[str], Path]
) -> None:
    folder, wanted = str(adapter_folder / part), np.load(adapter_folder / "wanted.npy")
    assert starting_point(folder) == str(tiny_folder("sd"))
    assert abs(draw(load_for_sampling(folder)) - wanted).max() <= 1  # with lora_alpha, or it would differ by more
    assert abs(draw(load_for_sampling(str(tiny_folder("sd")))) - wanted).max() > 3


def test_a_named_base_goes_first(adapter_folder: Path, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    weights = "pytorch_lora_weights.safetensors"
    (tmp_path / "adapter" / weights).write_bytes((adapter_folder / weights).read_bytes())
    with pytest.raises(UserError, match="no run.json .* --base"):
        load_for_sampling(str(tmp_path / "adapter"))
    loaded = load_for_sampling(str(tmp_path / "adapter"), str(tiny_folder("sd")))
    assert abs(draw(loaded) - np.load(adapter_folder / "wanted.npy")).max() <= 1
    (tmp_path / "run.json").write_text('{"method": "dpo"}')
    with pytest.raises(UserError, match="run.json names no pipeline"):
        starting_point(str(tmp_path / "adapter"))


@pytest.mark.parametrize(("kind", "words"), [("sd3", "another architecture"), ("sdxl", "cannot be put on")])
def test_weights_of_another_model_are_refused(
    kind: str, words: str, adapter_folder: Path, tiny_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=words):
        load_for_sampling(str(adapter_folder), str(tiny_folder(kind)))


def flat(colour: int, size: int) -> Image.Image:
    """A picture of one colour, which no other number gives."""
    return Image.new("RGB", (size, size), (40 + colour, 10, 250 - colour))


def pixels_by_colour(sheet: Image.Image) -> dict[Any, int]:
    return {colour: count for count, colour in sheet.getcolors(sheet.width * sheet.height)}


@pytest.mark.parametrize(("count", "size", "shown"), [(1, 8, 128), (9, 50, 150), (32, 100, 100), (20, 512, 192)])
def test_every_picture_is_whole(count: int, size: int, shown: int, tmp_path: Path) -> None:
    """Each one's pixels are counted: none is cut, covered or written over, with long prompts and captions around."""
    rows = [[flat(place + 100 * row, size) for place in range(count)] for row in range(2)]
    prompts = [f"a picture of {place // 3} that is long " * (place % 9) for place in range(count)]
    captions = [[f"{place:.3f}" for place in range(count)] for _ in rows]
    path = draw_grid(rows, prompts, tmp_path / "new" / "grid.png", ["start", "aligned"], captions)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    sheet = Image.open(path)
    assert sheet.width <= 1600
    found = pixels_by_colour(sheet)
    for row in rows:
        for picture in row:
            assert found[picture.getpixel((0, 0))] == shown**2


def test_captions_are_under_every_row(tmp_path: Path) -> None:
    """Counted by the pixels in their ink: a caption that the next row covers would be missing."""

    def ink(rows: int, captioned: bool) -> int:
        captions = [["0.888"] * 3] * rows if captioned else None
        path = draw_grid([[flat(0, 8)] * 3] * rows, ["x"] * 3, tmp_path / "grid.png", ["t"] * rows, captions)
        return pixels_by_colour(Image.open(path))[(0x6B, 0x6B, 0x6B)]

    without, one, three = ink(1, False), ink(1, True), ink(3, True)
    assert one > without and three - without == 3 * (one - without)


def test_pictures_of_one_prompt_stay_together(tmp_path: Path) -> None:
    """Eleven columns fit: three groups of four are broken after the second, and one of thirteen has to be."""
    red = flat(0, 8)
    places = []
    for prompts in (["a"] * 4 + ["b"] * 4 + ["c"] * 4, ["a"] * 13):
        sheet = np.asarray(Image.open(draw_grid([[red] * len(prompts)], prompts, tmp_path / "grid.png", ["x"])))
        rows = (sheet == red.getpixel((0, 0))).all(2).sum(1)
        places.append(sorted({int(count) // 128 for count in rows if count >= 128}))
    assert places == [[4, 8], [2, 11]]


def test_small_pictures_keep_their_pixels(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    found = pixels_by_colour(Image.open(draw_grid([[picture]], ["x"], tmp_path / "grid.png", ["t"])))
    assert all(found[picture.getpixel((x, y))] == 16**2 for x in range(8) for y in range(8))


@pytest.mark.parametrize(
    ("prompts", "titles", "captions"),
    [(["a", "b"], ["x"], None), (["a"], [], None), ([], [], None), (["a"], ["x"], [["1", "2"]]), (["a"], ["x"], [])],
)
def test_lists_that_do_not_fit(prompts: list, titles: list, captions: list | None, tmp_path: Path) -> None:
    rows = [[flat(0, 8)]] if prompts else []
    with pytest.raises(ValueError, match="rows of images need"):
        draw_grid(rows, prompts, tmp_path / "grid.png", titles, captions)
    assert not list(tmp_path.iterdir())
