"""Image files made in code, and rows of them written in every form that is read."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

SIZE = (24, 16)  # width, height


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise, different for every seed."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The image as the bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = SIZE) -> bytes:
    return file_of(picture(seed, size))


def pair(index: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """A row as Pick-a-Pic has it: two pictures of their own, a caption and a label."""
    return {
        "caption": f"picture {index}",
        "jpg_0": png(2 * index),
        "jpg_1": png(2 * index + 1),
        "label_0": label,
        **changes,
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_lines(path: Path, rows: list[dict[str, Any]], inside: str = "images") -> str:
    """JSON lines whose images lie in a folder beside them."""
    (path.parent / inside).mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_with_paths(path, row, index, inside)) + "\n" for index, row in enumerate(rows)))
    return str(path)


def _with_paths(path: Path, row: dict[str, Any], index: int, inside: str) -> dict[str, Any]:
    written = dict(row)
    for name, value in row.items():
        if isinstance(value, bytes):
            written[name] = f"{inside}/{path.stem}-{index}-{name}.png"
            (path.parent / written[name]).write_bytes(value)
    return written
