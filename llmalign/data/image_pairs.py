"""A file of pairs of images out of prompts that have several images each, and what became of every row.

A row has prompt (or caption, or text), images (as `llmalign.data.images` reads one: paths beside a text file, bytes, or
{bytes, path}) and, where no reward is given, rewards: one number an image, null where there is none.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from llmalign.data import checks
from llmalign.data.checks import Fault
from llmalign.data.formats import at, nothing_matches
from llmalign.data.images import CAPTIONS, ROWS_AT_ONCE, decode, image_file, wanted_rows
from llmalign.data.pair_files import (
    IMAGE_COLUMNS,
    IMAGES,
    WAYS_OUT,
    PairOptions,
    PairReport,
    check_out,
    no_pair,
    written_aside,
)
from llmalign.data.pairing import BEST_WORST, check_options, row_rng, select_pairs
from llmalign.data.readers import Row, Shard, open_shards
from llmalign.data.specs import DataSource, check_keys
from llmalign.errors import UserError

Score = Callable[[list[str], list[Image.Image]], Sequence[float | None]]  # rewards of N images under N prompts

SUFFIXES = (".parquet",)
SCORED_AT_ONCE = 64  # images, and those of the row that passes it
FAILED = {**WAYS_OUT, "unscored": "the reward gave no number, and the log says why"}
SCHEMA = pyarrow.schema(
    [
        ("prompt", pyarrow.string()),
        ("chosen", pyarrow.binary()),
        ("rejected", pyarrow.binary()),
        ("chosen_reward", pyarrow.float64()),
        ("rejected_reward", pyarrow.float64()),
        ("margin", pyarrow.float64()),
        ("row_id", pyarrow.int64()),
    ]
)


def write_image_pairs(
    source: DataSource,
    out: Path,
    *,
    score: Score | None = None,
    options: PairOptions | None = None,
    overwrite: bool = False,
) -> PairReport:
    """Write the pairs of `source` to `out` (.parquet), aside first and then renamed, as rows of SCHEMA.

    score: rewards of images, in place of the rows' own. Images are stored as the files that they were; those that are
    scored are decoded (RGB), of others only the beginning is read. Rows are read as they are needed, so that data sets
    larger than the memory can be. Raises UserError for whatever cannot be read, followed or written, and where no row
    gives a pair. Not covered: repeated rows, and one image in two encodings, which is not seen to be the same.
    """
    options = options or PairOptions()
    check_out(source, out, overwrite, SUFFIXES)
    check_options(options.strategy or BEST_WORST, options.margin, options.max_pairs)
    report = PairReport(IMAGES)
    groups = _scored(_groups(source, scored=score is None), score)
    batches = _batches(_records(groups, options, report))
    first = next(batches, None)  # before anything is made, so that a source without pairs leaves nothing behind
    if first is None:
        raise no_pair(source, report, WAYS_OUT if score is None else FAILED)
    with written_aside(out) as aside, pyarrow.parquet.ParquetWriter(aside, SCHEMA) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=SCHEMA))
    return report


@dataclass
class _Group:
    """A prompt, its images as files, and where it stands in its source."""

    row_id: int
    prompt: str
    images: list[bytes]
    rewards: list[float | None]
    shard: Shard
    number: int

    def decoded(self) -> list[Image.Image]:
        return [self._decoded(place, data) for place, data in enumerate(self.images)]

    def _decoded(self, place: int, data: bytes) -> Image.Image:
        try:
            return decode(data)
        except Fault as fault:
            raise at(self.shard, self.number, Fault(f"'images[{place}]' {fault}")) from None


def _groups(source: DataSource, *, scored: bool) -> Iterator[_Group]:
    """The rows of a source; `scored` ones have their own rewards, which else are not read."""
    check_keys(source.columns or {}, IMAGE_COLUMNS, "`columns` for images")
    shards = open_shards(source, streaming=False)
    names: dict[str, Any] = {}
    for shard, number, position, row in wanted_rows(shards, source):
        try:
            names = names or _settle(row, source.columns or {}, scored)
            yield _group(row, names, shard, number, position)
        except Fault as fault:
            raise at(shard, number, fault) from None
    if not names:
        raise nothing_matches(shards, source)


def _settle(first: Row, columns: dict[str, Any], scored: bool) -> dict[str, Any]:
    """Where a source keeps caption, images and, if `scored`, rewards, settled from its first row. Raises Fault."""
    found = {name: columns.get(name, name) for name in IMAGE_COLUMNS if columns.get(name) or name in first}
    captions = [name for name in sorted(CAPTIONS, key=lambda name: name not in columns) if found.get(name)]
    missing = f"it has: {', '.join(first)}; say with `columns` what stands for"
    if not captions:
        raise Fault(f"has no 'prompt', nor 'caption' or 'text'; {missing} 'prompt'")
    if not found.get("images"):
        raise Fault(f"has no 'images'; {missing} 'images'")
    if not scored:
        return {"prompt": found[captions[0]], "images": found["images"]}
    if not found.get("rewards"):
        raise Fault(
            f"has no 'rewards': score the images with --reward, such as --reward brightness; {missing} 'rewards'"
        )
    return {"prompt": found[captions[0]], "images": found["images"], "rewards": found["rewards"]}


def _group(row: Row, names: dict[str, Any], shard: Shard, number: int, position: int) -> _Group:
    values = {name: checks.pick(row, source) for name, source in names.items()}
    if shard.text_cells:
        one, several = {"images": "text", "rewards": "score"}, {"images": "json", "rewards": "scores"}
        kinds = {name: (one if isinstance(names[name], list) else several).get(name, "text") for name in names}
        values = {name: checks.from_cell(name, cell, kinds[name]) for name, cell in values.items()}
    if not isinstance(values["images"], list):
        raise Fault(f"'images' must be a list, not {type(values['images']).__name__}")
    images = [image_file(f"images[{place}]", value, shard) for place, value in enumerate(values["images"])]
    rewards = checks.scores("rewards", values.get("rewards"))
    if rewards is None:
        rewards = [None] * len(images)
    if len(rewards) != len(images):
        raise Fault(f"has {len(images)} images and {len(rewards)} rewards")
    prompt = checks.content("prompt", values["prompt"], False)
    return _Group(position, str(prompt), images, rewards, shard, number)


def _scored(groups: Iterator[_Group], score: Score | None) -> Iterator[_Group]:
    """The same groups with the rewards of `score`, which is handed the images of several at once."""
    if score is None:
        yield from groups
        return
    waiting: list[_Group] = []
    for group in groups:
        waiting.append(group)
        if sum(len(one.images) for one in waiting) >= SCORED_AT_ONCE:
            yield from _score(waiting, score)
            waiting = []
    if waiting:
        yield from _score(waiting, score)


def _score(groups: list[_Group], score: Score) -> list[_Group]:
    prompts = [group.prompt for group in groups for _ in group.images]
    rewards = list(score(prompts, [image for group in groups for image in group.decoded()]))
    if len(rewards) != len(prompts):
        raise UserError(f"The reward gave {len(rewards)} numbers for {len(prompts)} images; it must give one for each.")
    for group in groups:
        group.rewards, rewards = rewards[: len(group.images)], rewards[len(group.images) :]
    return groups


def _records(groups: Iterator[_Group], options: PairOptions, report: PairReport) -> Iterator[dict[str, Any]]:
    """The pairs as rows of SCHEMA, counted in `report` as they come."""
    for group in groups:
        selection = select_pairs(
            group.rewards,
            group.images,
            strategy=options.strategy or BEST_WORST,
            rng=row_rng(options.seed, group.row_id),
            margin=options.margin,
            max_pairs=options.max_pairs,
        )
        rewards = [float("nan") if reward is None else float(reward) for reward in group.rewards]
        report.rows += 1
        report.rows_with_pairs += bool(selection.pairs)
        report.dropped += selection.dropped
        for chosen, rejected in selection.pairs:
            margin = rewards[chosen] - rewards[rejected]
            report.pairs += 1
            report.margins += margin
            yield {
                "prompt": group.prompt,
                "chosen": group.images[chosen],
                "rejected": group.images[rejected],
                "chosen_reward": rewards[chosen],
                "rejected_reward": rewards[rejected],
                "margin": margin,
                "row_id": group.row_id,
            }


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(records, ROWS_AT_ONCE)):
        yield batch
