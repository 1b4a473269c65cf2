"""Images from ordinary pipelines, a seed an image, and the picture that shows two models side by side."""

import inspect
import json
import logging
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.embedded import pipeline_path
from llmalign.diffusion.noise import row_generator
from llmalign.diffusion.pipelines import load_pipeline
from llmalign.errors import UserError
from llmalign.trainers.run_folder import RUN_FILE

logger = logging.getLogger(__name__)

STREAM = "sample"  # keeps the noise of images apart from that of training


def load_for_sampling(path: str, base: str | None = None) -> Any:
    """The pipeline in a folder, on the Hub or embedded, or the LoRA weights of a run or checkpoint on their pipeline.

    That is `base`, else the one that the run's `run.json` names. On a GPU in bfloat16, else in float32. Raises
    UserError where there is no pipeline, or where the weights are not for it. Not covered: adapters on adapters, and
    the checkpoints of a run that trains a whole network.
    """
    if not _is_adapter(path):
        return _load(path)
    start = base or _base_of(path)
    return with_adapter(_load(start), path, start)


def with_adapter(pipe: Any, path: str, start: str) -> Any:
    """The pipeline called `start` with the LoRA weights in `path`. Raises UserError where they are not for it."""
    try:
        pipe.load_lora_weights(str(Path(path).expanduser()), weight_name=LORA_FILE, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"The LoRA weights in {path} cannot be put on {start} ({reason}): check --base.") from error
    if not pipe.get_active_adapters():
        raise UserError(f"The LoRA weights in {path} are for another architecture than {start}: check --base.")
    return pipe


def starting_point(path: str, base: str | None = None) -> str | None:
    """What the model in `path` is compared with: `base`, else what an adapter was trained on, else nothing."""
    return base or (_base_of(path) if _is_adapter(path) else None)


def _is_adapter(path: str) -> bool:
    return (Path(path).expanduser() / LORA_FILE).is_file()


def _base_of(path: str) -> str:
    """What the recipe of the run names, which lies beside its weights and above its checkpoints."""
    folder = Path(path).expanduser().resolve()
    for file in (folder / RUN_FILE, folder.parent / RUN_FILE):
        if file.is_file():
            try:
                return str(json.loads(file.read_text(encoding="utf-8"))["model_name_or_path"])
            except (ValueError, KeyError) as error:
                raise UserError(f"{file} names no pipeline (model_name_or_path): name it with --base.") from error
    raise UserError(f"{path} holds LoRA weights and no {RUN_FILE} that names their pipeline: name it with --base.")


def _load(name: str) -> Any:
    path = pipeline_path(name)
    if not torch.cuda.is_available():
        return load_pipeline(path)
    logger.info("%s is sampled from in bfloat16 on a GPU.", name)
    pipe = load_pipeline(path, dtype="bfloat16").to("cuda")
    pipe.vae.bfloat16()  # a pipeline hands it the latents in the precision of the network
    return pipe


@dataclass(frozen=True)
class SamplingSettings:
    """Steps of the sampler and the guidance scale."""

    steps: int
    guidance: float


def sampling_settings(pipe: Any, steps: int | None = None, guidance: float | None = None) -> SamplingSettings:
    """What is given, else the defaults of the pipeline's own call. Raises UserError for what none can be."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    steps = defaults["num_inference_steps"].default if steps is None else steps
    if steps < 1:
        raise UserError(f"Sampling takes at least one step, not {steps}.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"The guidance scale is a finite number of at least 0, not {guidance:g}.")
    return SamplingSettings(steps, defaults["guidance_scale"].default if guidance is None else guidance)


def image_seeds(seed: int, count: int) -> list[int]:
    """The seed of each of `count` images: what `torch.Generator().manual_seed` takes to draw that image again."""
    return [row_generator(STREAM, seed, index).initial_seed() for index in range(count)]


def sample_images(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 4,
    size: int | None = None,
    progress: bool = True,
) -> Iterator[Image.Image]:
    """One image for each of N prompts, in order, as their batches are done.

    Image i draws its first noise, and that of a sampler which adds some at each step, from a CPU generator of its own,
    keyed by (seed, i): the batch size changes nothing (to rounding), and two models of one architecture start from the
    same noise. `steps` and `guidance` as in `sampling_settings`; `size` in pixels, both ways, else the pipeline's own.
    Turns the pipeline's own progress bar off. Raises UserError for a batch of fewer than one. Not covered: negative
    prompts.
    """
    if batch_size < 1:
        raise UserError(f"A batch holds at least one image, not {batch_size}.")
    settings = sampling_settings(pipe, steps, guidance)
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts), desc="Sampling", unit="image", disable=not progress) as bar:
        for first in range(0, len(prompts), batch_size):
            places = range(first, min(first + batch_size, len(prompts)))
            generators = [row_generator(STREAM, seed, place) for place in places]
            yield from _call(pipe, [prompts[place] for place in places], settings, generators, size)
            bar.update(len(places))


def _call(
    pipe: Any, prompts: list[str], settings: SamplingSettings, generators: list[torch.Generator], size: int | None
) -> list[Image.Image]:
    options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
    try:
        return pipe(prompts, generator=generators, height=size, width=size, **options).images
    except ValueError as error:
        if size is None:
            raise
        raise UserError(f"{type(pipe).__name__} cannot draw {size} pixels a side: {error}") from error


# The grid, in pixels.
SMALL, CELL, WIDEST = 64, 192, 1600
MARGIN, GAP, PAD = 16, 4, 8
FONT_SIZE, PROMPT_LINES = 14, 4
INK, FAINT = "#222222", "#6b6b6b"
Block = list[tuple[list[int], list[str]]]  # columns that share a prompt, and the lines of that prompt


def draw_grid(
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    path: Path | str,
    titles: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Draw pictures into a PNG, atomically: a column for each of N prompts, a row for each model, and return its path.

    rows: R lists of N images of one size; titles: R; captions: R x N short texts under the images, such as rewards.
    The columns are broken into blocks as wide as a screen. A prompt that repeats is written once under its images. What
    is smaller than 64 pixels is enlarged without smoothing, what is larger than 192 is made smaller. Raises ValueError
    where the lists do not fit one another. Not covered: scripts that DejaVu Sans lacks, such as Chinese.
    """
    lengths = [len(prompts)] * len(rows)
    fitting = [len(row) for row in rows] == lengths and len(titles) == len(rows)
    if not (rows and prompts and fitting and (captions is None or [len(texts) for texts in captions] == lengths)):
        raise ValueError(f"{len(rows)} rows of images need a title each, and an image (and caption) for every prompt")
    grid = _Grid(rows, prompts, titles, captions)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    grid.picture().save(aside, format="PNG")
    os.replace(aside, path)
    return path


class _Grid:
    """Where everything goes, and the drawing of it."""

    def __init__(
        self,
        rows: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        titles: Sequence[str],
        captions: Sequence[Sequence[str]] | None,
    ) -> None:
        self.rows, self.prompts, self.titles, self.captions = rows, prompts, titles, captions
        self.font = ImageFont.truetype(findfont("DejaVu Sans"), FONT_SIZE)
        self.line = sum(self.font.getmetrics())
        self.left = MARGIN + max(int(self.font.getlength(title)) for title in titles) + PAD
        widest = max(rows[0][0].size)
        scale = -(-2 * SMALL // widest) if widest < SMALL else min(1.0, CELL / widest)
        self.width, self.height = (round(side * scale) for side in rows[0][0].size)
        self.smoothing = Image.Resampling.NEAREST if widest < SMALL else Image.Resampling.LANCZOS
        self.columns = max(1, min(len(prompts), (WIDEST - self.left - MARGIN) // (self.width + GAP)))
        self.row_height = self.height + GAP + (self.line if captions else 0)

    def picture(self) -> Image.Image:
        """The whole sheet."""
        blocks = self._blocks()
        lines = [max(len(lines) for _, lines in block) for block in blocks]
        heights = [len(self.rows) * self.row_height + PAD + self.line * count for count in lines]
        widest = max(sum(len(columns) for columns, _ in block) for block in blocks)
        width = self._x(widest) - GAP + MARGIN
        sheet = Image.new("RGB", (width, sum(heights) + MARGIN * (len(blocks) + 1)), "white")
        top = MARGIN
        for block, height in zip(blocks, heights, strict=True):
            self._draw(sheet, block, top)
            top += height + MARGIN
        return sheet

    def _blocks(self) -> list[Block]:
        """Columns that share a prompt stay together wherever a block is wide enough for them."""
        blocks: list[Block] = []
        for prompt, group in groupby(range(len(self.prompts)), key=lambda column: self.prompts[column]):
            same = list(group)
            for start in range(0, len(same), self.columns):
                columns = same[start : start + self.columns]
                if not blocks or sum(len(other) for other, _ in blocks[-1]) + len(columns) > self.columns:
                    blocks.append([])
                blocks[-1].append((columns, self._wrapped(prompt, len(columns))))
        return blocks

    def _wrapped(self, prompt: str, columns: int) -> list[str]:
        width = columns * (self.width + GAP) - PAD
        for letters in range(2 * width // FONT_SIZE, 0, -1):
            lines = textwrap.wrap(prompt, letters, max_lines=PROMPT_LINES, placeholder="…")
            if max((self.font.getlength(line) for line in lines), default=0) <= width:
                return lines
        return []

    def _draw(self, sheet: Image.Image, block: Block, top: int) -> None:
        pen = ImageDraw.Draw(sheet)
        for number, row in enumerate(self.rows):
            y = top + number * self.row_height
            pen.text((self.left - PAD, y + self.height / 2), self.titles[number], INK, self.font, anchor="rm")
            for place, column in enumerate(column for columns, _ in block for column in columns):
                x = self._x(place)
                image = row[column].convert("RGB").resize((self.width, self.height), self.smoothing)
                sheet.paste(image, (x, y))
                if self.captions:
                    under = (x + self.width / 2, y + self.height + 2)
                    pen.text(under, self.captions[number][column], FAINT, self.font, anchor="ma")
        y, place = top + len(self.rows) * self.row_height + PAD // 2, 0
        for columns, lines in block:
            left, right = self._x(place), self._x(place + len(columns)) - GAP
            place += len(columns)
            pen.line((left, y - 2, right - 1, y - 2), FAINT)
            for number, line in enumerate(lines):
                pen.text(((left + right) / 2, y + number * self.line), line, INK, self.font, anchor="ma")

    def _x(self, place: int) -> int:
        return self.left + place * (self.width + GAP)
