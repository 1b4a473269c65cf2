"""Images of `llmalign sample`, small and inside of the page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from llmalign.report.collect import Pictures, Run
from llmalign.report.markup import Html, el, join

SIDE = 256  # pixels of the longer side
SMALL = 24_000  # bytes of a file that is taken as it is
MOST_PROMPTS, MOST_IMAGES = 12, 4
MOST_BYTES = 3_000_000  # of a run
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


class Shelf:
    """Turns image files into data URIs until `most_bytes` are spent; what it leaves out is in `said`."""

    def __init__(self, most_bytes: int = MOST_BYTES, side: int = SIDE) -> None:
        self._left, self._side = most_bytes, side
        self.left_out = 0
        self.said: list[str] = []

    def uri(self, path: Path) -> str | None:
        """The image as a data URI, None where it cannot be read or does not fit."""
        try:
            content = path.read_bytes()
        except OSError as error:
            self.said.append(f"{path} cannot be read: {error.strerror or error}")
            return None
        if len(content) > SMALL:
            content = self._smaller(path, content)
        kind = next((name for start, name in KINDS.items() if content.startswith(start)), None)
        if kind is None:
            if content:
                self.said.append(f"{path} is no PNG, JPEG or WebP image")
            return None
        if len(content) > self._left:
            self.left_out += 1
            return None
        self._left -= len(content)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    def _smaller(self, path: Path, content: bytes) -> bytes:
        """The image at a side of 256 pixels or fewer, as it is where Pillow is not installed; empty if it is broken."""
        try:
            from PIL import Image
        except ImportError:
            sentence = "images are as large as their files: `pip install 'llmalign[diffusion]'` makes them smaller"
            self.said += [sentence] if sentence not in self.said else []
            return content
        try:
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.said.append(f"{path} cannot be read as an image: {error}")
            return b""
        small.thumbnail((self._side, self._side))
        held = io.BytesIO()
        small.save(held, "JPEG", quality=85, optimize=True)
        return held.getvalue()


def gallery(run: Run) -> tuple[Html | None, list[str]]:
    """The run's images by prompt, those of the start beside them; its grid where there are no rows.

    Also returns a sentence for all that is not shown.
    """
    shelf = Shelf()
    shown = [_prompt(one, shelf) for one in run.pictures[:MOST_PROMPTS]]
    said = []
    if len(run.pictures) > MOST_PROMPTS:
        said.append(f"{run.name}: the first {MOST_PROMPTS} of {len(run.pictures)} prompts")
    if any(len(one.images) > MOST_IMAGES for one in run.pictures[:MOST_PROMPTS]):
        said.append(f"{run.name}: the first {MOST_IMAGES} images of each prompt")
    content = [one for one in shown if one]
    if not content and run.grid is not None:
        uri = Shelf(side=1600).uri(run.grid)
        content = [el("figure", _image(uri, f"The grid of {run.name}"), cls="grid-image")] if uri else []
    if shelf.left_out:
        said.append(f"{run.name}: {shelf.left_out} images would make this file too large")
    return (el("div", content, cls="gallery") if content else None), said + shelf.said


def _prompt(one: Pictures, shelf: Shelf) -> Html | None:
    rows = [("before", one.start), ("after" if one.start else "", one.images)]
    lines = [_line(words, paths[:MOST_IMAGES], one.prompt, shelf) for words, paths in rows]
    found = [line for line in lines if line]
    return el("figure", el("figcaption", one.prompt), found) if found else None


def _line(words: str, paths: Sequence[Path], prompt: str, shelf: Shelf) -> Html | None:
    uris = [uri for uri in (shelf.uri(path) for path in paths) if uri]
    if not uris:
        return None
    alt = f"{prompt} ({words})" if words else prompt
    return el("div", el("span", words, cls="side") if words else None,
              el("div", join(*(_image(uri, alt) for uri in uris)), cls="strip"), cls="before-after")  # fmt: skip


def _image(uri: str, alt: str) -> Html:
    return el("img", src=uri, alt=alt, loading="lazy", decoding="async")
