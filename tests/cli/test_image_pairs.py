"""`llmalign pairs` on images: scored by a reward that the command names, or with rewards of their own."""

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from llmalign.cli import main

Rows = list[dict[str, Any]]
LEVELS = [[40, 200, 90], [10, 10], [7], [255, 0]]
MINE = """
def level(prompts, images, **columns):
    if "fails" in prompts:
        raise ZeroDivisionError("division by zero")
    return [None if image.getpixel((0, 0))[0] == 200 else image.getpixel((0, 0))[0] for image in images]

def never(prompts, images, **columns):
    return [float("nan")] * len(images)
"""


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (level, level, level))


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def write(folder: Path, groups: list[list[Image.Image]], **columns: list[Any]) -> Path:
    """A folder as `llmalign sample` leaves it: images.jsonl beside its PNG files."""
    folder.mkdir()
    rows, count = [], 0
    for index, images in enumerate(groups):
        names = [f"{count + place:05d}.png" for place in range(len(images))]
        count += len(names)
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        own = {name: values[index] for name, values in columns.items()}
        rows.append({"prompt": f"prompt {index}", "images": names, "seeds": list(range(len(names))), **own})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "images.jsonl"


def read(path: Path) -> Rows:
    return pyarrow.parquet.read_table(path).to_pylist()


def image(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def table(said: str) -> dict[str, str]:
    cells = [line.strip("│").split("│") for line in said.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in cells}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, Path]]:
    """Run the command; its status, what it said (on stderr where it failed), and where it wrote."""

    def run_pairs(data: Path | str, *options: str, out: str = "pairs.parquet") -> tuple[int, str, Path]:
        status = main(["pairs", str(data), "--out", str(tmp_path / out), *options])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        if status:
            (sentence,) = [line for line in printed.err.splitlines() if line.startswith("llmalign: ")]
            return status, sentence, tmp_path / out
        return status, printed.out, tmp_path / out

    return run_pairs


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    return write(tmp_path / "samples", [[grey(level) for level in own] for own in LEVELS])


def test_sampled_images_become_pairs_by_brightness(run, sampled: Path) -> None:
    status, said, out = run(sampled, "--reward", "brightness")
    assert status == 0 and "read as images" in said
    first, last = read(out)
    assert (first["prompt"], first["row_id"]) == ("prompt 0", 0) and (last["prompt"], last["row_id"]) == ("prompt 3", 3)
    folder = sampled.parent
    assert first["chosen"] == (folder / "00001.png").read_bytes()
    assert first["rejected"] == (folder / "00000.png").read_bytes()
    assert first["chosen_reward"] == pytest.approx(200 / 255) and first["margin"] == pytest.approx(160 / 255)
    assert image(last["chosen"]).getpixel((0, 0)) == (255, 255, 255) and last["margin"] == 1.0
    assert table(said) == {
        "prompts": "4",
        "prompts that gave a pair": "2",
        "pairs": "2",
        "dropped: prompts with fewer than two images left": "1",
        "dropped: pairs of the same image": "1",
        "mean margin": "0.814",
    }
    assert "Warning" not in said and f"llmalign doctor {out} --kind image_pairs" in said
    assert re.search(rf"llmalign train trainers/\w+/lora.yaml --model_name_or_path MODEL --dataset_name {out}", said)
    assert main(["doctor", str(out), "--kind", "image_pairs"]) == 0


def test_the_smaller_jpeg_is_the_more_compressible(run, tmp_path: Path) -> None:
    pictures = [noise(1), grey(9).resize((16, 16))]
    sizes = []
    for picture in pictures:
        encoded = BytesIO()
        picture.save(encoded, "JPEG", quality=95)
        sizes.append(len(encoded.getvalue()) / 1000)
    data = write(tmp_path / "samples", [pictures])
    (row,) = read(run(data, "--reward", "compressibility")[2])
    assert image(row["chosen"]).getpixel((0, 0)) == (9, 9, 9)
    assert row["chosen_reward"] == pytest.approx(-sizes[1]) and row["margin"] == pytest.approx(sizes[0] - sizes[1])
    (row,) = read(run(data, "--reward", "incompressibility", "--overwrite")[2])
    assert image(row["rejected"]).getpixel((0, 0)) == (9, 9, 9)


def test_rewards_of_the_rows_and_options_of_groups(run, tmp_path: Path) -> None:
    levels = [[1, 2, 3, 4]] * 3
    data = write(
        tmp_path / "samples",
        [[grey(level) for level in own] for own in levels],
        rewards=[[0.1, 0.3, 0.2, None], [1.0, 0.0, 0.5, 0.75], None],
    )
    _, said, out = run(data, "--strategy", "all_pairs", "--margin", "0.2", "--max_pairs_per_prompt", "2")
    rows = read(out)
    assert [row["row_id"] for row in rows] == [0, 1, 1] and all(row["margin"] > 0.199 for row in rows)
    assert [image(rows[0][side]).getpixel((0, 0))[0] for side in ("chosen", "rejected")] == [2, 1]
    found = table(said)
    assert found["dropped: images without a finite reward"] == "5" and found["dropped: pairs below the margin"] == "2"
    assert found["dropped: pairs over the limit of a prompt"] == "4"
    # A reward on the command line takes the place of the rows' own, and of those that they lack.
    (first, *_, last) = read(run(data, "--reward", "brightness", "--overwrite")[2])
    assert first["margin"] == pytest.approx(3 / 255) and last["row_id"] == 2
    drawn = [run(data, "--strategy", "best_random", "--seed", seed, "--overwrite")[2].read_bytes() for seed in "0112"]
    assert drawn[1] == drawn[2] and len(set(drawn)) > 1


def test_a_function_of_one_s_own_that_fails_on_some(run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    levels = [[40, 200, 90], [3, 2], [5, 6]]
    data = write(tmp_path / "samples", [[grey(level) for level in own] for own in levels])
    text = data.read_text().replace("prompt 1", "fails")
    data.write_text(text)
    status, said, out = run(data, "--reward", f"{tmp_path}/mine.py:level")
    assert status == 0
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in read(out)] == [(90.0, 40.0), (6.0, 5.0)]
    assert table(said)["dropped: images without a finite reward"] == "3"
    assert "ZeroDivisionError: division by zero" in caplog.text
    status, sentence, _ = run(data, "--reward", f"{tmp_path}/mine.py:never", out="none.parquet")
    assert status == 2 and "images without a finite reward: 7" in sentence
    assert sentence.endswith("the reward gave no number, and the log says why.") and "gave nan" in caplog.text
    assert not (tmp_path / "none.parquet").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "images.jsonl, line 1: has no 'rewards': score the images with --reward, such as --reward brightness"),
        (["--reward", "brigthness"], "there is no image reward 'brigthness'; the nearest is 'brightness'"),
        (["--reward", "clip:./nowhere"], "there is no folder './nowhere'"),
        (["--reward", "no.py:f"], "there is no file no.py"),
        (["--reward", "brightness", "--margin", "2"], "gives no pair (rows: 4; "),
        (["--reward", "brightness", "--strategy", "best"], "'best' is no strategy"),
        (["--rewrad", "brightness"], "pairs has no option --rewrad; the nearest is --reward"),
        (["--kind", "groups"], "has 'images', which would change what the model sees"),
        (["--reward", "brightness", "--columns", "{images: files}"], "line 1: has no 'files'"),
    ],
)
def test_faults_are_named_in_a_sentence(run, sampled: Path, options: list[str], words: str) -> None:
    status, sentence, out = run(sampled, *options, out="new/pairs.parquet" if "groups" not in options else "p.jsonl")
    assert status == 2 and words in sentence and not out.exists() and not (out.parent / "new").exists()


def test_an_image_that_cannot_be_read_is_named(run, sampled: Path) -> None:
    broken = sampled.parent / "00002.png"
    broken.write_bytes(broken.read_bytes()[:45])
    status, sentence, out = run(sampled, "--reward", "brightness")
    assert status == 2 and not out.exists()
    assert f"{sampled}, line 1: 'images[2]' is a damaged or truncated PNG file." in sentence


def test_texts_and_images_do_not_share_their_options(run, sampled: Path, tmp_path: Path) -> None:
    status, sentence, _ = run("sample:groups", "--reward", "brightness", out="pairs.jsonl")
    assert status == 2 and "--reward scores images, and sample:groups holds groups" in sentence
    status, sentence, _ = run(sampled, "--reward", "brightness", out="pairs.jsonl")
    assert status == 2 and "--out must end in .parquet for these pairs" in sentence
    status, sentence, _ = run("sample:groups", "--kind", "images", "--reward", "brightness")
    assert status == 2 and "line 1: has no 'images'" in sentence
