"""`llmalign sample`: images, their rows and the sheet, of a model alone and beside its start."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from llmalign.cli import main
from llmalign.cli.entry import build_parser
from llmalign.diffusion.guidance import THRESHOLD
from llmalign.diffusion.sampling import image_seeds
from llmalign.diffusion.tiny import build_tiny

Sample = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `other`, of other weights; and `run`, LoRA weights on `base`."""
    from peft import LoraConfig, get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("models")
    build_tiny("sd").save_pretrained(folder / "base")
    build_tiny("sd", seed=1).save_pretrained(folder / "other")
    pipe = build_tiny("sd")
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(folder / "run", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    (folder / "run" / "run.json").write_text(json.dumps({"model_name_or_path": str(folder / "base")}))
    return folder


@pytest.fixture
def sample(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the command, two steps an image, into `tmp_path / out`, and return what it said."""

    def run(model: str, *options: str, status: int = 0, out: str = "out", prompts: tuple[str, ...] = ("digit one",)):
        prompted = [part for prompt in prompts for part in ("--prompt", prompt)]
        target = ["--out", str(tmp_path / out), "--steps", "2"]
        assert main(["sample", str(models / model), *target, *prompted, *options]) == status
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert not list(tmp_path.rglob("*.part"))
        return " ".join((said.err if status else said.out).split())

    return run


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(folder.glob("0*.png"))])


def test_a_model_alone(sample: Sample, tmp_path: Path) -> None:
    said = sample("base", "--per_prompt", "2", "--seed", "7", prompts=("digit one", "größer"))
    out, seeds = tmp_path / "out", image_seeds(7, 4)
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"0000{i}.png" for i in range(4)),
        "grid.png",
        "images.jsonl",
    ]
    assert rows_of(out) == [
        {"prompt": "digit one", "images": ["00000.png", "00001.png"], "seeds": seeds[:2]},
        {"prompt": "größer", "images": ["00002.png", "00003.png"], "seeds": seeds[2:]},
    ]
    assert said == f"4 images in {out}, side by side in {out}/grid.png."
    pipe = build_tiny("sd")
    generator = torch.Generator().manual_seed(rows_of(out)[1]["seeds"][1])
    again = pipe("größer", num_inference_steps=2, generator=generator).images[0]
    assert abs(np.asarray(again, dtype=int) - pixels(out)[3]).max() <= 1


def test_an_adapter_is_shown_beside_its_start(sample: Sample, tmp_path: Path) -> None:
    sample("run", "--per_prompt", "3")
    sample("base", "--per_prompt", "3", "--batch_size", "2", out="alone")
    start, aligned = pixels(tmp_path / "out" / "start"), pixels(tmp_path / "out")
    assert abs(start - pixels(tmp_path / "alone")).max() <= 1
    assert abs(start - aligned).max() > 3
    one, two = (Image.open(tmp_path / name / "grid.png").height for name in ("alone", "out"))
    assert two > one + 128


def test_any_two_models_side_by_side(sample: Sample, models: Path, tmp_path: Path) -> None:
    sample("other", "--base", str(models / "base"))
    sample("base", out="base")
    sample("other", out="other")
    assert np.array_equal(pixels(tmp_path / "out" / "start"), pixels(tmp_path / "base"))
    assert np.array_equal(pixels(tmp_path / "out"), pixels(tmp_path / "other"))


def test_rewards_before_and_after(sample: Sample, tmp_path: Path) -> None:
    """Means as worked out from the files; an image that one side has no reward for counts on neither."""
    file = tmp_path / "redness.py"
    file.write_text(
        "def redness(prompts, images, **columns):\n"
        "    reds = [sum(image.getchannel(0).tobytes()) / 64 for image in images]\n"
        "    return [None if prompt == 'red' else red for prompt, red in zip(prompts, reds)]\n"
    )
    reward = f"{file}:redness"
    said = sample(
        "run", "--per_prompt", "2", "--reward", "brightness", "--reward", reward, prompts=("one", "red", "nine")
    )
    start, aligned = pixels(tmp_path / "out" / "start"), pixels(tmp_path / "out")
    bright = [side.mean() / 255 for side in (start, aligned)]
    kept = [0, 1, 4, 5]
    red = [side[kept, ..., 0].mean() for side in (start, aligned)]
    cells = [[float(number) for number in found] for found in re.findall(r"(\S+\.\d{4}) \[(\S+), (\S+)\] │", said)]
    means = [mean for mean, _, _ in cells]
    wanted = [*bright, bright[1] - bright[0], *red, red[1] - red[0]]
    assert means == pytest.approx(wanted, abs=1e-4)
    for mean, low, high in cells:
        assert low <= mean <= high and low < high
    assert "under each image its brightness" in said
    assert said.count("│ 6 │") == 1 and said.count("│ 4 │") == 1


def test_one_prompt_has_an_interval_too(sample: Sample) -> None:
    said = sample("base", "--per_prompt", "4", "--reward", "brightness")
    mean, low, high = (float(number) for number in re.findall(r"\d\.\d{4}", said))
    assert low < mean < high


def test_adaptive_guidance_says_what_it_saved(sample: Sample, tmp_path: Path) -> None:
    """The cosines of an untrained network are high from the first step on: one of two unconditional passes goes."""
    said = sample("run", "--adaptive_guidance", "0.5")
    for title in ("start", "aligned"):
        assert f"{title}: Adaptive guidance left out 50.0% of the unconditional passes, 25.0% of all" in said
    sample("run", out="plain")
    assert abs(pixels(tmp_path / "out") - pixels(tmp_path / "plain")).max() > 0


def test_threshold_of_the_bare_option_is_the_modules() -> None:
    options = build_parser().parse_args(["sample", "m", "--out", "o", "--adaptive_guidance"])
    assert options.adaptive_guidance == THRESHOLD


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "images", "mapped"])
def test_prompts_from_files(form: str, sample: Sample, tmp_path: Path) -> None:
    texts, options = ["digit one", "digit two"], []
    file = tmp_path / f"prompts.{form if form in ('txt', 'parquet') else 'jsonl'}"
    if form == "txt":
        file.write_text("\ufeffdigit one\r\n\n  digit two\n", encoding="utf-8")
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"caption": texts, "jpg_0": [b"", b""]}), file)
    else:
        rows: list[dict] = [{"prompt": text} for text in texts]
        if form == "images":  # what an earlier call wrote
            rows = [{**row, "images": ["00000.png"], "seeds": [1]} for row in rows]
        elif form == "mapped":
            rows, options = (
                [{"q": text} for text in [*texts, "three"]],
                ["--columns", "{caption: q}", "--max_rows", "2"],
            )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample("base", "--prompts", str(file), *options, prompts=("first",))
    assert [row["prompt"] for row in rows_of(tmp_path / "out")] == ["first", *texts]


def test_a_folder_in_use_is_left_alone(sample: Sample, tmp_path: Path) -> None:
    """And with --overwrite only what an earlier call wrote is replaced, once the model is there."""
    sample("run", prompts=("one", "two"))
    out = tmp_path / "out"
    (out / "notes.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "is not empty; give --overwrite" in sample("run", status=2)
    assert "check" in sample("absent", "--overwrite", status=2)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sample("base", "--overwrite", "--seed", "1")
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "00000.png", "grid.png", "images.jsonl", "notes.png"
    ]  # fmt: skip
    assert (out / "notes.png").read_bytes() == b"mine" and (out / "00000.png").read_bytes() != before[out / "00000.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--per_prompt", "0"], "at least one image, not 0"),
        (["--steps", "0"], "at least one step"),
        (["--adaptive_guidance", "99"], "between 0 and 1"),
        (["--adaptive_guidance", "--guidance", "1"], "Guidance is off"),
        (["--reward", "brightnes"], "the nearest is 'brightness'"),
        (["--nonsense", "1"], "does not know --nonsense 1"),
        (["--prompts", "absent.txt"], "There is no file absent.txt"),
        (["--prompts", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_what_cannot_be_done(options: list[str], words: str, sample: Sample) -> None:
    assert words in sample("base", *options, status=2)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": [{"role": "user", "content": "hi"}]}, [], "line 1: "),
        ({"words": "digit one"}, [], "it has: words"),
        ({"prompt": "digit one"}, ["--max_truncated", "1"], "the doctor's --max_"),
        ({"prompt": "digit one"}, ["--nonsense", "1"], "unknown key `nonsense`"),
    ],
)
def test_rows_that_are_no_prompts(row: dict, options: list[str], words: str, sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert words in sample("base", "--prompts", str(file), *options, status=2, prompts=())


def test_no_prompt_at_all(sample: Sample) -> None:
    assert "There is no prompt" in sample("base", status=2, prompts=())


def test_a_large_set_is_shown_in_part(sample: Sample, tmp_path: Path) -> None:
    said = sample("base", "--per_prompt", "34", "--batch_size", "34", "--steps", "1")
    assert "grid.png (the first 32 of 34)." in said
    assert len(pixels(tmp_path / "out")) == 34
