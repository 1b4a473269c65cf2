"""Look rows of captions and images over before any training, and show one of them.

Rows are as `images.load_image_rows` gives them. To have faults counted, where training would stop at the first, load
them with `lenient=True`, and pairs with `ties="soft"`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmalign.data.checks import Fault
from llmalign.data.images import IMAGES, PAIRS, TIE, decode, open_image
from llmalign.data.report import (
    FIRST_ROWS,
    Faults,
    Finding,
    RowReport,
    Shares,
    by_quantile,
    quantile_table,
    quantiles,
)
from llmalign.errors import UserError

SIDES = {PAIRS: ("chosen", "rejected"), IMAGES: ("image",)}
FREQUENT = 5  # captions that the report names
BATCH = 32
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class ImageLimits(Shares):
    """The limits of images. `duplicates` counts the repetitions of a row, not its first occurrence.

    `identical`, `truncated` and `duplicates` are called, and are, as those of text.
    """

    unreadable: float = 0.0
    missing_caption: float = 0.0
    empty_caption: float = 0.05
    truncated: float = 0.05
    unlabelled: float = 0.0
    ties: float = 0.2
    identical: float = 0.01
    sizes_differ: float = 0.1
    small: float = 0.05
    duplicates: float = 0.1


IMAGE_FAULTS: Faults = {
    "unreadable": (
        "unreadable image",
        "have an image that is missing or cannot be read",
        "`llmalign doctor` with `--row` says why; write the files again, or take the rows out of the data",
    ),
    "missing_caption": (
        "no caption",
        "have no caption",
        "give every row one; it may be empty text where the model is to learn without",
    ),
    "empty_caption": ("empty caption", "have an empty caption", "give every row a caption, or allow more of them"),
    "truncated": (
        "caption too long",
        "have a caption of more than {max_tokens} tokens, whose end the model does not read",
        "shorten the captions",
    ),
    "unlabelled": (
        "no label",
        "have no label from 0 to 1",
        "leave such rows out with `where`, or take them out of the data",
    ),
    "ties": ("ties", "are ties and teach no preference", "take them out of the data, or allow more of them"),
    "identical": (
        "identical images",
        "have the same picture on both sides and teach no preference",
        "take them out of the data",
    ),
    "sizes_differ": (
        "two sizes in a pair",
        "have two images of different size, which are told apart by how sharp they are once scaled",
        "bring both images of a pair to one size, or allow more of them",
    ),
    "small": (
        "smaller than resolution",
        "have an image whose shorter side is below the resolution {resolution} and is enlarged",
        "lower the resolution, or take them out of the data",
    ),
    "duplicates": ("repeated rows", "repeat an earlier row exactly", "keep one of each"),
}
ABOUT_PAIRS = ("unlabelled", "ties", "identical", "sizes_differ")


@dataclass(frozen=True, kw_only=True)
class ImageReport(RowReport):
    """What `examine_images` found. `measured` maps what was measured to its values at QUANTILES.

    formats: how many images there are in each format. captions: how many there are, each counted once. frequent: those
    of most rows, with their number.
    """

    faults: ClassVar[Faults] = IMAGE_FAULTS

    resolution: int | None
    max_tokens: int | None
    measured: dict[str, tuple[int, ...]]
    formats: dict[str, int]
    captions: int
    repeated_captions: int
    frequent: dict[str, int]
    limits: Shares = field(default_factory=ImageLimits)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            **super().as_dict(),
            "resolution": self.resolution,
            "max_tokens": self.max_tokens,
            "measured": by_quantile(self.measured),
            "formats": self.formats,
            "captions": self.captions,
            "repeated_captions": self.repeated_captions,
            "frequent_captions": self.frequent,
        }

    def tables(self) -> list[Table]:
        """Counts beside their limits, what was measured, and the captions of most rows."""
        (faults,) = super().tables()
        repeated = self.repeated_captions
        faults.add_row("repeated captions", f"{repeated:,}", f"{repeated / self.rows:.1%}", "")
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items()) or "no images"
        tables = [faults, quantile_table(f"{formats}; {self.captions:,} captions", self.measured, "greatest")]
        if repeated:
            captions = Table(title="captions of most rows")
            captions.add_column("caption")
            captions.add_column("rows", justify="right")
            for caption, count in self.frequent.items():
                captions.add_row(Text(_shortened(caption)), f"{count:,}")
            tables.append(captions)
        return tables


def examine_images(
    rows: Dataset, *, kind: str, resolution: int | None = None, limits: ImageLimits | None = None,
    count_tokens: Callable[[list[str]], Sequence[int]] | None = None, max_tokens: int | None = None,
) -> ImageReport:  # fmt: skip
    """Count the faults of rows of `image_pairs` or `images`; every image is decoded, which takes as long as it takes.

    resolution: of training; without it no image is too small. count_tokens gives the tokens of captions, max_tokens how
    many of them the model reads; without both none is too long. Images are measured as they are shown, turned by their
    EXIF orientation; pictures are identical when all their pixels are, in whatever files. Raises UserError when there
    is nothing to examine. Not covered: whether the caption or the label is true, and pictures that are nearly the same.
    """
    if kind not in SIDES:
        raise UserError(f"The doctor of images knows {', '.join(SIDES)}, not {kind!r}.")
    if not len(rows):
        raise UserError("There are no rows to examine.")
    if (count_tokens is None) != (max_tokens is None):
        raise UserError("Captions are counted with `count_tokens` and `max_tokens` together: give both or neither.")
    check = _Check(kind, resolution, max_tokens)
    for batch in rows.iter(batch_size=BATCH):
        check.captions(batch["row_id"], batch["caption"], count_tokens)
        for index in range(len(batch["row_id"])):
            check.row({name: column[index] for name, column in batch.items()})
    counts = check.occurrences
    frequent = counts.most_common(FREQUENT)
    return ImageReport(
        kind=kind,
        rows=len(rows),
        findings={name: Finding(len(ids), tuple(ids[:FIRST_ROWS])) for name, ids in check.found.items()},
        limits=limits or ImageLimits(),
        resolution=resolution,
        max_tokens=max_tokens,
        measured={name: quantiles(np.array(values)) for name, values in check.measured.items()}
        | {"rows of a caption": quantiles(np.array(list(counts.values())))},
        formats=dict(check.formats.most_common()),
        captions=len(counts),
        repeated_captions=counts.total() - len(counts),
        frequent={caption: count for caption, count in frequent if count > 1},
    )


def show_image_row(row: Mapping[str, Any], console: Console) -> None:
    """Print what a row of `image_pairs` or `images` holds: caption, label, and format, size and bytes of each image."""
    console.print(f"row {row['row_id']}", style="bold")
    caption = row["caption"]
    shown = "none" if caption is None else f"{caption!r}, {len(caption)} characters"
    console.print(Text(f"caption: {shown}"), soft_wrap=True)
    for side in (side for sides in SIDES.values() for side in sides if side in row):
        console.print(Text(f"{side}: {_described(row[side])}"), soft_wrap=True)
    if "label" in row:
        console.print(Text(f"label: {_read_label(row['label'])}"))
    if row.get("fault"):
        console.print(Text(f"fault: {row['fault']}"), style="red", soft_wrap=True)


class _Check:
    """Goes over the rows and remembers which showed what."""

    def __init__(self, kind: str, resolution: int | None, max_tokens: int | None) -> None:
        self.kind, self.resolution, self.max_tokens = kind, resolution, max_tokens
        unchecked = {"small": resolution is None, "truncated": max_tokens is None}
        unchecked |= dict.fromkeys(ABOUT_PAIRS, kind != PAIRS)
        self.found: dict[str, list[int]] = {name: [] for name in IMAGE_FAULTS if not unchecked.get(name)}
        self.measured: dict[str, list[int]] = defaultdict(list)
        self.formats: Counter[str] = Counter()
        self.occurrences: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def captions(
        self, row_ids: Sequence[int], captions: Sequence[str | None],
        count_tokens: Callable[[list[str]], Sequence[int]] | None,
    ) -> None:  # fmt: skip
        present = {row_id: text for row_id, text in zip(row_ids, captions, strict=True) if text is not None}
        self.occurrences.update(present.values())
        self.found["missing_caption"] += [row_id for row_id in row_ids if row_id not in present]
        self.found["empty_caption"] += [row_id for row_id, text in present.items() if not text.strip()]
        self.measured["caption, characters"] += map(len, present.values())
        if count_tokens is not None and self.max_tokens is not None and present:
            lengths = list(map(int, count_tokens(list(present.values()))))
            self.measured["caption, tokens"] += lengths
            longer = zip(present, lengths, strict=True)
            self.found["truncated"] += [row_id for row_id, length in longer if length > self.max_tokens]

    def row(self, row: Mapping[str, Any]) -> None:
        """Images, label and repetition of one row."""
        row_id = row["row_id"]
        if self.kind == PAIRS and row["label"] is None:
            self.found["unlabelled"].append(row_id)
        elif self.kind == PAIRS and row["label"] == TIE:
            self.found["ties"].append(row_id)
        found = [self._picture(row[side]) for side in SIDES[self.kind]]
        pictures = [picture for picture in found if picture is not None]
        if len(pictures) < len(found):
            self.found["unreadable"].append(row_id)
            return
        if self.resolution is not None and min(side for picture in pictures for side in picture.size) < self.resolution:
            self.found["small"].append(row_id)
        if self.kind == PAIRS and pictures[0].size != pictures[1].size:
            self.found["sizes_differ"].append(row_id)
        elif self.kind == PAIRS and pictures[0].tobytes() == pictures[1].tobytes():
            self.found["identical"].append(row_id)
        self._count_repeated(row)

    def _picture(self, data: bytes | None) -> Image.Image | None:
        if data is None:
            return None
        try:
            picture = decode(data)
        except Fault:
            return None
        self.formats[str(open_image(data).format)] += 1
        for name, value in (("width", picture.width), ("height", picture.height), ("file, bytes", len(data))):
            self.measured[name].append(value)
        return picture

    def _count_repeated(self, row: Mapping[str, Any]) -> None:
        digest = blake2b(repr(row["caption"]).encode())
        for side in SIDES[self.kind]:
            digest.update(blake2b(row[side]).digest())
        if digest.digest() in self._seen:
            self.found["duplicates"].append(row["row_id"])
        self._seen.add(digest.digest())


def _described(data: bytes | None) -> str:
    if data is None:
        return "none"
    try:
        header, picture = open_image(data), decode(data)
    except Fault as fault:
        return f"{len(data):,} bytes; {fault}"
    turned = "" if header.size == picture.size else ", turned upright"
    return f"{header.format} {header.mode}, {picture.width} x {picture.height} pixels{turned}, {len(data):,} bytes"


def _read_label(label: float | None) -> str:
    if label is None:
        return "none"
    return f"{label:g}, {'a tie' if label == TIE else 'the probability that chosen is the better one'}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
