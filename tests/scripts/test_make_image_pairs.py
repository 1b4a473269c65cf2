"""The pictures of `sample:image_pairs` are what the script draws, and show what their captions say."""

import importlib.util
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_image_pairs", repository / "scripts" / "make_image_pairs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(repository: Path) -> list[dict]:
    return pyarrow.parquet.read_table(repository / "data" / "samples" / "image_pairs.parquet").to_pylist()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def test_the_shipped_file_is_what_the_script_draws(script: ModuleType, rows: list[dict], tmp_path: Path) -> None:
    script.main(tmp_path / "pairs.parquet")
    drawn = pyarrow.parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert len(drawn) == len(rows) == 54
    for one, other in zip(drawn, rows, strict=True):
        assert {key: value for key, value in one.items() if key not in ("chosen", "rejected")} == {
            key: value for key, value in other.items() if key not in ("chosen", "rejected")
        }
        for side in ("chosen", "rejected"):  # the bytes depend on the version of zlib
            assert (pixels(one[side]) == pixels(other[side])).all()


def test_the_brighter_picture_is_chosen(rows: list[dict]) -> None:
    for row in rows:
        chosen, rejected = (pixels(row[side]).mean() / 255 for side in ("chosen", "rejected"))
        assert chosen - rejected >= 0.05
        assert (row["chosen_reward"], row["rejected_reward"]) == pytest.approx((chosen, rejected))


def test_pictures_show_their_captions(rows: list[dict]) -> None:
    """The channel that a shape adds to grey is its colour's; of its box a square fills all, the others less."""
    filled = {"square": (1.0, 1.0), "circle": (0.7, 0.85), "triangle": (0.45, 0.6)}
    for row in rows:
        _, colour, shape = row["prompt"].split()
        for side in ("chosen", "rejected"):
            image = pixels(row[side]).astype(int)
            assert image.shape == (32, 32, 3)
            inside = (image.max(axis=-1) - image.min(axis=-1)) > 0
            red, green, blue = image[inside].mean(axis=0)
            assert {"red": red, "green": green, "blue": blue}[colour] == max(red, green, blue)
            down, across = inside.any(axis=1).sum(), inside.any(axis=0).sum()
            low, high = filled[shape]
            assert low <= inside.sum() / (down * across) <= high


def test_both_splits_have_every_caption_as_often(rows: list[dict]) -> None:
    counts = Counter((row["split"], row["prompt"]) for row in rows)
    assert set(counts.values()) == {4, 2} and len(counts) == 18
    assert all(count == {"train": 4, "test": 2}[split] for (split, _), count in counts.items())
