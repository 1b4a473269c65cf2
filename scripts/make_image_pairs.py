"""Draws data/samples/image_pairs.parquet: pairs of pictures of one caption, of which the brighter one is chosen.

`python scripts/make_image_pairs.py [FILE]`. A picture is a shape in its colour on grey, its place and size and the grey
drawn at random; nothing but the grey tells what is chosen, and by less than a model could see is no pair.
"""

import itertools
import random
import sys
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from llmalign import assets
from llmalign.rewards.images import brightness

SIDE = 32
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 230)}
SHAPES = ("circle", "square", "triangle")
PAIRS_PER_CAPTION = {"train": 4, "test": 2}
LEAST_MARGIN = 0.05  # of brightness, whose range is 0 to 1
SCHEMA = pyarrow.schema(
    [
        ("prompt", pyarrow.string()),
        ("chosen", pyarrow.binary()),
        ("rejected", pyarrow.binary()),
        ("chosen_reward", pyarrow.float64()),
        ("rejected_reward", pyarrow.float64()),
        ("split", pyarrow.string()),
    ]
)


def picture(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """One picture, SIDE pixels a side."""
    grey = rng.randrange(256)
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    size = rng.randrange(SIDE // 2, 3 * SIDE // 4)
    left, top = (rng.randrange(1, SIDE - size) for _ in range(2))
    right, bottom = left + size - 1, top + size - 1
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), COLOURS[colour])
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), COLOURS[colour])
    else:
        pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), COLOURS[colour])
    return image


def pair(colour: str, shape: str, rng: random.Random) -> dict[str, object]:
    """Two pictures of a caption, the brighter one chosen."""
    caption = f"a {colour} {shape}"
    while True:
        images = [picture(colour, shape, rng) for _ in range(2)]
        rewards = brightness([caption] * 2, images)
        if abs(rewards[0] - rewards[1]) >= LEAST_MARGIN:
            break
    best = rewards.index(max(rewards))
    return {
        "prompt": caption,
        "chosen": as_png(images[best]),
        "rejected": as_png(images[1 - best]),
        "chosen_reward": rewards[best],
        "rejected_reward": rewards[1 - best],
    }


def as_png(image: Image.Image) -> bytes:
    """The bytes of its file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def rows(seed: int = 0) -> list[dict[str, object]]:
    """All pairs, each split with every caption as often."""
    rng = random.Random(seed)
    return [
        {**pair(colour, shape, rng), "split": split}
        for split, count in PAIRS_PER_CAPTION.items()
        for _ in range(count)
        for colour, shape in itertools.product(COLOURS, SHAPES)
    ]


def main(path: Path) -> None:
    """Write them."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(), schema=SCHEMA), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else assets.root() / "data" / "samples" / "image_pairs.parquet")
