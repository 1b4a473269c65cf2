"""Read preference data of any of the supported forms into canonical columns.

kind     columns, each text or a conversation ([{role, content}, ...]); all rows of a data set are of one form
pairs    chosen, rejected, optionally prompt (else their shared beginning), base, flipped, and the log-probs
         ref_chosen_logps, ref_rejected_logps, last_chosen_logps, last_rejected_logps
groups   prompt, completions (k of them), rewards (k numbers)
prompts  prompt
text     messages, or prompt and completion, or text

and, to make pairs of (`pair_files`), with numbers that may be missing or not finite, since those are counted there:

scored_groups  prompt, completions (any number of them), rewards
comparisons    instruction, output_1, output_2, preference (from 1, the first is better, to 2)

Every row also has `row_id` (int64). In a data set that is read whole it is the row's position, counted from 0, among
all rows of its sources in the order of the list, before `where`; in a stream it is a digest of the row's content, so
that it does not depend on how the stream is split among processes (rows of equal content share it).

A list of sources without weights is put end to end. With weights the mix is as large as it can be without using a row
twice: of each source a random subset (by `seed`) of its share, in the source's order, interleaved at random positions.
Streams draw the next source by weight (by `seed`) and end when one of them ends.

Rows are checked one by one as they are read, and the result is kept in the cache of the `datasets` library under a
digest of the files, the options and this code, so that several processes and later runs read it once. Not covered:
images, tool calls and `tools` columns (refused), and Hub data sets that need code of their own.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from llmalign.data import checks
from llmalign.data.checks import Fault
from llmalign.data.readers import Row, Shard, open_shards
from llmalign.data.rows import KINDS, Layout, settle
from llmalign.data.specs import DataSource, parse_sources, read_spec
from llmalign.errors import UserError

__all__ = ["DataSource", "load", "parse_sources", "read_spec"]

logger = logging.getLogger(__name__)

Sources = str | dict[str, Any] | DataSource | Sequence[str | dict[str, Any] | DataSource]


def load(
    sources: Sources, *, kind: str, streaming: bool = False, seed: int = 0, keep: Sequence[str] = ()
) -> Dataset | IterableDataset:
    """The rows of one data set, or of a list of them, in the columns of `kind` (see the module).

    `keep` names further columns to carry along: numbers such as a scorer's margin, beside prompts anything. Groups with
    fewer than two completions teach nothing and are left out, which is logged with their number (in a stream without
    it). Raises UserError, naming file, row and column, for whatever cannot be read or is not what the kind asks for; a
    stream raises it when it gets to the row.
    """
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of data; known are: {', '.join(KINDS)}.")
    parsed = as_sources(sources)
    if streaming:
        return _stream(parsed, kind, tuple(keep), seed)
    parts: list[Dataset] = []
    for source in parsed:
        first_id = parts[-1][-1]["row_id"] + 1 if parts else 0
        parts.append(_read(source, kind, tuple(keep), first_id))
    _check_alike(parsed, parts)
    if kind == "groups":
        parts = [_without_short_groups(source, part) for source, part in zip(parsed, parts, strict=True)]
    return mix(parsed, parts, seed)


def as_sources(sources: Sources) -> list[DataSource]:
    items = [sources] if isinstance(sources, (str, dict, DataSource)) else list(sources)
    parsed: list[DataSource] = []
    for item in items:
        parsed += [item] if isinstance(item, DataSource) else parse_sources(item)
    if not parsed:
        raise UserError("The list of data sets is empty; name at least one.")
    if any(source.weight is None for source in parsed) and any(source.weight is not None for source in parsed):
        raise UserError("Some data sets of the list have a `weight` and others have none; give it to all or to none.")
    return parsed


def _read(source: DataSource, kind: str, keep: tuple[str, ...], first_id: int) -> Dataset:
    shards = open_shards(source, streaming=False)
    layout = _layout(shards, source, kind, keep)
    options = {"shards": shards, "source": source, "layout": layout, "first_id": first_id}
    stamps = [shard.stamp() for shard in shards]
    key = Hasher.hash([code_digest(), stamps, repr(source), repr(layout), first_id])
    try:
        rows = Dataset.from_generator(_generate, features=layout.features, gen_kwargs=options, fingerprint=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    logger.info("%s: %d rows.", source.path, len(rows))
    return rows


def code_digest() -> str:
    """Digest of this package's files: what is cached was checked by this code and no other."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _layout(shards: list[Shard], source: DataSource, kind: str, keep: tuple[str, ...]) -> Layout:
    for shard in shards:
        for number, row in shard.rows():
            try:
                if matches(row, source.where):
                    return settle(kind, row, columns=source.columns, keep=keep, text_cells=shard.text_cells)
            except Fault as fault:
                raise at(shard, number, fault) from None
    raise nothing_matches(shards, source)


def _generate(
    shards: list[Shard], source: DataSource, layout: Layout, first_id: int | None, salt: int = 0
) -> Iterator[Row]:
    """Canonical rows; without a `first_id` (a stream) numbered by content and `salt`, and not ended by `max_rows`."""
    position, taken = first_id or 0, 0
    for shard in shards:
        for number, row in shard.rows():
            try:
                wanted = matches(row, source.where)
                canonical = layout.canonical(row, text_cells=shard.text_cells) if wanted else None
            except Fault as fault:
                raise at(shard, number, fault) from None
            if canonical is not None:
                yield {"row_id": position if first_id is not None else _content_id(canonical, salt), **canonical}
                taken += 1
            if first_id is not None and taken == source.max_rows:
                return
            position += 1


def at(shard: Shard, number: int, fault: Fault) -> UserError:
    return UserError(f"{shard.name}, {shard.unit} {number}: {fault}.")


def _content_id(row: Row, salt: int) -> int:
    text = json.dumps([salt, row], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def matches(row: Row, where: dict[str, Any] | None) -> bool:
    for name, wanted in (where or {}).items():
        value = checks.pick(row, name)
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def nothing_matches(shards: list[Shard], source: DataSource) -> UserError:
    where = source.where or {}
    seen: dict[str, list[Any]] = {name: [] for name in where}
    for shard in shards:
        for _, row in shard.rows():
            for name, values in seen.items():
                value = checks.pick(row, name)
                if value not in values and len(values) < 10:
                    values.append(value)
    conditions = " and ".join(f"{name} = {wanted!r}" for name, wanted in where.items())
    found = "; ".join(f"{name} is one of {', '.join(map(repr, values))}" for name, values in seen.items())
    return UserError(
        f"{source.path} has no row where {conditions}; {found}." if where else f"{source.path} has no rows."
    )


def _check_alike(sources: Sequence[DataSource], parts: Sequence[Dataset]) -> None:
    for source, part in zip(sources[1:], parts[1:], strict=True):
        if part.features != parts[0].features:
            raise UserError(
                f"{source.path} and {sources[0].path} cannot be mixed: one has {_described(part)}, the other "
                f"{_described(parts[0])}; leave columns out with `columns: {{name: null}}`, or write both in one form."
            )


def _described(part: Dataset) -> str:
    texts = any(str(part.features[name]).startswith("Value('string'") for name in part.column_names)
    names = [name for name in part.column_names if name != "row_id"]
    return f"{'text' if texts else 'conversations'} in {', '.join(names)}"


def _without_short_groups(source: DataSource, part: Dataset) -> Dataset:
    long_enough = part.filter(_has_two, input_columns=["rewards"], desc="Looking for groups of fewer than two")
    if not len(long_enough):
        raise UserError(f"{source.path} has no group of two or more completions, so there is nothing to compare.")
    if len(long_enough) < len(part):
        first = min(set(part["row_id"][:]) - set(long_enough["row_id"][:]))
        logger.warning(
            "%s: left out %d of %d groups, which have fewer than two completions; the first is row %d.",
            source.path, len(part) - len(long_enough), len(part), first,
        )  # fmt: skip
    return long_enough


def _has_two(rewards: list[float]) -> bool:
    return len(rewards) >= 2


def mix(sources: Sequence[DataSource], parts: list[Dataset], seed: int) -> Dataset:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights or len(parts) == 1:
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    counts = [min(len(part), round(total * share)) for part, share in zip(parts, shares, strict=True)]
    if 0 in counts:
        lost = sources[counts.index(0)].path
        raise UserError(f"The weights leave no row of {lost}; give it a larger weight, or take it out of the list.")
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *(len(part) for part in parts[:-1])])
    picks = [
        offset + np.sort(rng.choice(len(part), count, replace=False))
        for offset, part, count in zip(offsets, parts, counts, strict=True)
    ]
    turns = rng.permutation(np.repeat(np.arange(len(parts)), counts))
    order = np.empty(sum(counts), dtype=np.int64)
    for index, pick in enumerate(picks):
        order[turns == index] = pick
    taken = (f"{n} of {len(p)} rows of {s.path}" for n, p, s in zip(counts, parts, sources, strict=True))
    logger.info("Mixed by weight, no row twice: %s.", ", ".join(taken))
    return datasets.concatenate_datasets(parts).select(order)


def _stream(sources: Sequence[DataSource], kind: str, keep: tuple[str, ...], seed: int) -> IterableDataset:
    weights = [source.weight for source in sources if source.weight is not None]
    if len(sources) > 1 and not weights:
        raise UserError(
            "Several streams cannot be put end to end, since a stream is not shuffled as a whole: give weights."
        )
    parts = [_stream_one(source, kind, keep, salt) for salt, source in enumerate(sources)]
    _check_alike(sources, parts)
    if len(parts) == 1:
        return parts[0]
    logger.info("Streaming by weight until the first set ends: %s.", ", ".join(source.path for source in sources))
    return datasets.interleave_datasets(
        parts,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="first_exhausted",
    )


def _stream_one(source: DataSource, kind: str, keep: tuple[str, ...], salt: int) -> IterableDataset:
    shards = open_shards(source, streaming=True)
    layout = _layout(shards, source, kind, keep)
    options = {"shards": shards, "source": source, "layout": layout, "first_id": None, "salt": salt}
    stream = IterableDataset.from_generator(_generate, features=layout.features, gen_kwargs=options)
    if source.max_rows is not None:
        stream = stream.take(source.max_rows)
    if kind == "groups":
        logger.info("%s: groups of fewer than two completions are left out as they come.", source.path)
        stream = stream.filter(_has_two, input_columns=["rewards"])
    return stream
