"""Rows of captions and images in canonical columns, and image files as pixels.

kind         columns beside `row_id` (numbered as in `formats`)
image_pairs  caption, chosen, rejected (image files as bytes), label: the probability from .5 to 1 that `chosen` is the
             better one (1: surely, .5: a tie)
images       caption, image
captions     caption

Sources of pairs have `jpg_0`, `jpg_1` and `label_0` (the probability that `jpg_0` is the better one), as Pick-a-Pic
has, or `chosen` and `rejected`, and perhaps `label` (the probability that `chosen` is). The side that is more probably
the better one becomes `chosen`, jpg_0 in a tie. Images come out of a column `image`, or are the winners of such pairs.
The caption is called `caption`, `prompt` or `text`. Other names go through `columns`.

An image is the bytes of a file, a mapping {bytes, path}, a column of `datasets.Image` (which is not decoded here), or,
in .jsonl, .json and .csv files, a path inside the folder that the data file lies in. Not covered: streams, paths in
other sources, files in any format but FORMATS, later frames of animations, colour profiles.
"""

import hashlib
import logging
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps

from llmalign.data import checks
from llmalign.data.checks import Fault
from llmalign.data.formats import Sources, as_sources, at, code_digest, matches, mix, nothing_matches
from llmalign.data.readers import TEXT_SUFFIXES, FileShard, Row, Shard, open_shards
from llmalign.data.specs import DataSource, check_keys
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

PAIRS, IMAGES = "image_pairs", "images"
COLUMNS = {PAIRS: ("caption", "chosen", "rejected", "label"), IMAGES: ("caption", "image"), "captions": ("caption",)}
CAPTIONS = ("caption", "prompt", "text")
PICKED, PREFERRED, ALONE = ("jpg_0", "jpg_1", "label_0"), ("chosen", "rejected"), ("image",)
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {PAIRS: (PICKED, PREFERRED), IMAGES: (ALONE, PICKED, PREFERRED)}
KNOWN = tuple(dict.fromkeys((*CAPTIONS, *ALONE, *PICKED, *PREFERRED, "label")))
TYPES = {"caption": "string", "label": "float32", "fault": "string"}  # other columns are binary
TIE = 0.5
ROWS_AT_ONCE = 100  # written to the cache together: a column of so many large images stays below Arrow's 2 GiB

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows more, some of which run programs
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, struct.error, zlib.error)


def load_image_rows(
    sources: Sources, *, kind: str, ties: str = "drop", seed: int = 0, lenient: bool = False
) -> Dataset:
    """The rows of one data set, or of a list of them mixed as in `formats.load`, in the columns of `kind`.

    ties: `drop` leaves out pairs with a label of .5, which is logged with their number, `soft` keeps them. Whether an
    image is one is seen from the beginning of its file; whether all of it can be read, only when it is decoded. With
    `lenient`, for the doctor, what cannot be used in a row is null instead, and a further column `fault` says why, null
    where nothing is wrong. Raises UserError, naming file and row, for whatever cannot be read: no caption (an empty one
    is one), no image, a label that is no number from 0 to 1, a path that leads out of the data file's folder.
    """
    if kind not in COLUMNS:
        raise UserError(f"{kind!r} is no kind of image data; known are: {', '.join(COLUMNS)}.")
    if ties not in ("drop", "soft"):
        raise UserError(f"`ties` takes drop or soft, got {ties!r}.")
    if ties == "soft" and kind != PAIRS:
        raise UserError(f"`ties: soft` keeps pairs without a winner, and {kind} are read: take `ties: drop`.")
    parsed = as_sources(sources)
    parts: list[Dataset] = []
    first_id = 0
    for source in parsed:
        rows = _read(source, kind, first_id, lenient)
        first_id = rows["row_id"][-1] + 1
        if "label" in rows.column_names and ties == "drop":
            rows = without_ties(source.path, rows)
        parts.append(rows.remove_columns("label") if kind == IMAGES else rows)
    return mix(parsed, parts, seed)


def open_image(data: bytes) -> Image.Image:
    """The image behind the bytes of a file, of which only the beginning has been read.

    Raises Fault for what is no image of FORMATS and for one of more pixels than Pillow's MAX_IMAGE_PIXELS.
    """
    limit = Image.MAX_IMAGE_PIXELS or 2**63
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Fault(f"is an image of more than {limit:,} pixels") from error
    except DAMAGE as error:
        raise Fault(f"is no image that can be read (known are: {', '.join(FORMATS)})") from error
    if image.width * image.height > limit:
        raise Fault(f"is an image of more than {limit:,} pixels")
    return image


def decode(data: bytes) -> Image.Image:
    """The image in RGB, turned upright as its EXIF orientation says, what is transparent laid on white.

    White is what a page shows behind it, so what the people saw who chose. 16-bit grey is scaled to 8 bits. Raises
    Fault for what is no image of FORMATS, for damaged and truncated files, for images of more pixels than Pillow's
    MAX_IMAGE_PIXELS, and for pixels of 32 bits, whose range no file says.
    """
    image = open_image(data)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise Fault(f"is a damaged or truncated {image.format} file") from error
    if upright.mode in ("I", "F"):
        raise Fault("is an image with 32 bits a pixel, whose range is unknown; save it with 8")
    if upright.mode.startswith("I;16"):
        grey = np.asarray(upright).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        background = Image.new("RGBA", upright.size, "white")
        background.alpha_composite(upright.convert("RGBA"))
        return background.convert("RGB")
    return upright.convert("RGB")


def pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """An RGB image as float32 (3, resolution, resolution) in [-1, 1]: x / 127.5 - 1.

    The shorter side is brought to the resolution, bilinear with antialiasing (Pillow's, which torchvision uses), the
    longer one in proportion and rounded down, and the middle is cut out. Only that part is computed, so that a long
    thin image takes no more memory than another.
    """
    width, height = image.size
    shorter = min(width, height)
    scaled = (resolution * width // shorter, resolution * height // shorter)
    left, top = (round((side - resolution) / 2) for side in scaled)
    box = (
        left * width / scaled[0],
        top * height / scaled[1],
        (left + resolution) * width / scaled[0],
        (top + resolution) * height / scaled[1],
    )
    cut = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    values = torch.from_numpy(np.array(cut, dtype=np.float32))
    return (values / 127.5 - 1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one source keep what the kind asks for, settled from its first row."""

    kind: str
    caption: str
    images: tuple[str, ...]
    label: str | None
    label_optional: bool
    lenient: bool

    @property
    def features(self) -> Features:
        names = [*COLUMNS[self.kind], *(["label"] if self.kind == IMAGES else []), *(["fault"] if self.lenient else [])]
        return Features({"row_id": Value("int64"), **{name: Value(TYPES.get(name, "binary")) for name in names}})

    def canonical(self, row: Row, shard: Shard) -> Row:
        """The canonical columns of a raw row, for `images` with the label of the pair. Raises Fault unless lenient."""
        faults: list[str] = []

        def tried(read: Callable[..., Any], *values: Any) -> Any:
            try:
                return read(*values)
            except Fault as fault:
                if not self.lenient:
                    raise
                faults.append(str(fault))
                return None

        columns: Row = {"caption": tried(self._caption, row)}
        if self.images:
            label = tried(self._label, row, shard)
            sides = [tried(self.image, name, row, shard) for name in self.images]
            if label is not None and label < TIE:
                label, sides = 1.0 - label, sides[::-1]
            if self.kind == PAIRS:
                columns |= {"chosen": sides[0], "rejected": sides[1], "label": label}
            else:
                columns |= {"image": None if label is None else sides[0], "label": label}
        return {**columns, "fault": "; ".join(faults) or None} if self.lenient else columns

    def _caption(self, row: Row) -> Any:
        return checks.content(self.caption, checks.pick(row, self.caption), False)

    def image(self, name: str, row: Row, shard: Shard) -> bytes:
        """The bytes of an image file. Raises Fault."""
        return image_file(name, checks.pick(row, name), shard, checked=not self.lenient)

    def _label(self, row: Row, shard: Shard) -> float:
        if self.label is None or (self.label_optional and self.label not in row):
            return 1.0
        value = checks.pick(row, self.label)
        if shard.text_cells:
            value = checks.from_cell(self.label, value, "number")
        if value is None:
            raise Fault(f"{self.label!r} is null")
        label = checks.number(self.label, value)
        if not 0.0 <= label <= 1.0:
            raise Fault(f"{self.label!r} is {label:g}, and a label is a probability from 0 to 1")
        return label


def _settle(kind: str, first: Row, columns: dict[str, Any] | None, lenient: bool) -> _Layout:
    """The layout of a source whose first row this is. Raises Fault, and UserError for what `columns` cannot say."""
    mapped = columns or {}
    check_keys(mapped, KNOWN, f"`columns` for {kind}")
    for name, source in mapped.items():
        if isinstance(source, list):
            raise UserError(f"`columns` for {kind} must give one name for {name!r}, got the list {source!r}.")
    found = {name: mapped.get(name, name) for name in KNOWN if (mapped.get(name) if name in mapped else name in first)}
    missing = f"it has: {', '.join(first)}; say with `columns` what stands for"
    captions = [name for name in sorted(CAPTIONS, key=lambda name: name not in mapped) if name in found]
    if not captions:
        raise Fault(f"has no 'caption', nor 'prompt' or 'text'; {missing} 'caption'")
    shapes = [shape for shape in SHAPES.get(kind, ()) if all(name in found for name in shape)]
    if kind in SHAPES and not shapes:
        listed = " nor ".join(" and ".join(map(repr, shape)) for shape in SHAPES[kind])
        raise Fault(f"has neither {listed}; {missing} them")
    if len(shapes) > 1:
        other = shapes[1][0]
        raise Fault(f"has {shapes[0][0]!r} as well as {other!r}; leave one out with `columns: {{{other}: null}}`")
    shape = shapes[0] if shapes else ()
    label = {PICKED: "label_0", PREFERRED: "label"}.get(shape)
    return _Layout(
        kind=kind,
        caption=found[captions[0]],
        images=tuple(found[name] for name in shape if name != label),
        label=None if label is None else mapped.get(label, label),
        label_optional=shape == PREFERRED and label not in mapped,
        lenient=lenient,
    )


def image_file(name: str, value: Any, shard: Shard, *, checked: bool = True) -> bytes:
    """The bytes of the image file that a value of `shard` is or names; if `checked`, it begins as an image does.

    Raises Fault, which calls it `name`.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise Fault(f"{name!r} is null")
    data = _file_beside(name, value, shard) if isinstance(value, str) else value
    if not isinstance(data, bytes):
        raise Fault(f"{name!r} must be the bytes of an image, {{bytes, path}} or a path, not {type(data).__name__}")
    if checked:
        try:
            open_image(data)
        except Fault as fault:
            raise Fault(f"{name!r} {fault}") from None
    return data


def _folder_of(shard: Shard) -> Path | None:
    """The folder in which paths may lead to images; None where they are not followed."""
    return shard.file.parent if isinstance(shard, FileShard) and shard.suffix in TEXT_SUFFIXES else None


def _file_beside(name: str, path: str, shard: Shard) -> bytes:
    folder, shown = _folder_of(shard), repr(path if len(path) <= 80 else f"{path[:77]}...")
    if folder is None:
        raise Fault(f"{name!r} is the path {shown}, which is followed only out of text files; store the image's bytes")
    try:
        root = folder.resolve()
        file = (root / path).resolve()
        if Path(path).is_absolute() or ".." in Path(path).parts or not file.is_relative_to(root):
            raise Fault(
                f"{name!r} is the path {shown}; paths must be relative, without '..', and stay inside the folder of "
                "the data file"
            )
        if not file.is_file():
            raise Fault(f"{name!r} is the path {shown}, and there is no such file in the folder of the data file")
        return file.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise Fault(f"{name!r} is the path {shown}, which cannot be read: {error}") from error


def _read(source: DataSource, kind: str, first_id: int, lenient: bool) -> Dataset:
    shards = open_shards(source, streaming=False)
    first = next(wanted_rows(shards, source), None)
    if first is None:
        raise nothing_matches(shards, source)
    shard, number, _, row = first
    try:
        layout = _settle(kind, row, source.columns, lenient)
    except Fault as fault:
        raise at(shard, number, fault) from None
    stamps = [*(shard.stamp() for shard in shards), _stamp_of_files(shards, source, layout)]
    key = Hasher.hash([code_digest(), stamps, repr(source), repr(layout), first_id])
    options = {"shards": shards, "source": source, "layout": layout, "first_id": first_id}
    try:
        rows = Dataset.from_generator(
            _generate, features=layout.features, gen_kwargs=options, fingerprint=key, writer_batch_size=ROWS_AT_ONCE
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    logger.info("%s: %d rows.", source.path, len(rows))
    return rows


def wanted_rows(shards: Sequence[Shard], source: DataSource) -> Iterator[tuple[Shard, int, int, Row]]:
    """Shard, number in it, position in the source, and row, of the rows that `where` and `max_rows` leave."""
    position = taken = 0
    for shard in shards:
        for number, row in shard.rows():
            try:
                wanted = matches(row, source.where)
            except Fault as fault:
                raise at(shard, number, fault) from None
            if wanted:
                yield shard, number, position, row
                taken += 1
                if taken == source.max_rows:
                    return
            position += 1


def _generate(shards: list[Shard], source: DataSource, layout: _Layout, first_id: int) -> Iterator[Row]:
    for shard, number, position, row in wanted_rows(shards, source):
        try:
            yield {"row_id": first_id + position, **layout.canonical(row, shard)}
        except Fault as fault:
            raise at(shard, number, fault) from None


def _stamp_of_files(shards: Sequence[Shard], source: DataSource, layout: _Layout) -> str:
    """Digest of the image files that text files name: they are cached with the rows, and may change without them."""
    digest = hashlib.sha256()
    lenient = replace(layout, lenient=True)
    for shard, _, _, row in wanted_rows([shard for shard in shards if _folder_of(shard) is not None], source):
        for name in layout.images:
            try:
                digest.update(hashlib.sha256(lenient.image(name, row, shard)).digest())
            except Fault:
                digest.update(b"none")
    return digest.hexdigest()


def without_ties(name: str, rows: Dataset) -> Dataset:
    """The pairs that have a winner; how many have none is logged. Raises UserError where no pair has one."""
    kept = np.flatnonzero(np.array(rows["label"][:], dtype=np.float32) != TIE)
    if not len(kept):
        raise UserError(f"{name} has nothing but ties (labels of .5), so there is nothing to prefer.")
    if len(kept) < len(rows):
        logger.info("%s: left out %d of %d pairs, which are ties.", name, len(rows) - len(kept), len(rows))
        return rows.select(kept)
    return rows
