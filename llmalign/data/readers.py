"""Raw rows out of files, folders, saved data sets and the Hub; every fault names the file and the line or row."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.parquet

from llmalign import assets
from llmalign.data.specs import SPEC_PREFIX, DataSource
from llmalign.errors import UserError

SAMPLE_PREFIX = "sample:"
SAMPLE_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "eval", "dev")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LONGEST_CELL = 2**27  # characters of one CSV cell; Python's own limit of 2**17 is less than a long answer

Row = dict[str, Any]


@dataclass(frozen=True)
class FileShard:
    """One file of rows. Not covered: nested archives, and encodings other than UTF-8."""

    file: Path

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.file)

    @property
    def suffix(self) -> str:
        """The kind of file, without `.gz`."""
        return self.file.with_suffix("").suffix if self.file.suffix == ".gz" else self.file.suffix

    @property
    def unit(self) -> str:
        """What `rows` counts."""
        return "line" if self.suffix in (".jsonl", ".csv") else "row"

    @property
    def text_cells(self) -> bool:
        """Whether every value is text, so that numbers and lists have still to be read out of it."""
        return self.suffix == ".csv"

    def stamp(self) -> str:
        """Digest of the content: rows cached from a file are good for as long as it holds."""
        digest = hashlib.sha256(self.suffix.encode())
        with _readable(self.file), open(self.file, "rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows with their line (.jsonl, .csv) or row number, counted from 1. Raises UserError for a damaged file."""
        readers = {".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
        empty = True
        with _readable(self.file):
            for numbered in readers[self.suffix](self.file):
                empty = False
                yield numbered
        if empty:
            raise UserError(f"{self.file} is empty: it holds no rows.")


@dataclass(frozen=True)
class SetShard:
    """One split that the `datasets` library has opened, from the Hub or from a `save_to_disk` folder.

    Images, audio and video are not decoded: that would open whatever path a row names.
    """

    name: str
    dataset: Any
    unit: str = "row"
    text_cells: bool = False

    def stamp(self) -> str:
        """The library's own fingerprint of the rows."""
        return str(self.dataset._fingerprint)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows with their number, counted from 1."""
        yield from enumerate(self.dataset, 1)


Shard = FileShard | SetShard


def open_shards(source: DataSource, *, streaming: bool) -> list[Shard]:
    """What a source consists of, files in the order of their names. Raises UserError when there is nothing to read."""
    path = source.path
    if path.startswith(SPEC_PREFIX):
        raise UserError(f"{path} is a data spec; read it with parse_sources.")
    if path.startswith(SAMPLE_PREFIX):
        return [FileShard(_sample(path.removeprefix(SAMPLE_PREFIX)))]
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, source.split)
    if local.is_file():
        return [FileShard(_checked_file(local, source.split))]
    if path.endswith(SUFFIXES) or path.startswith(("/", "./", "../", "~")):
        raise UserError(f"There is no file or folder {path}.")
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"{path!r} is neither a file, nor a folder, nor the name of a Hub data set.")
    return [_hub(source, streaming)]


def _sample(name: str) -> Path:
    folder = assets.root() / "data" / "samples"
    shipped = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in SAMPLE_SUFFIXES}
    if name not in shipped:
        known = ", ".join(f"{SAMPLE_PREFIX}{stem}" for stem in shipped)
        raise UserError(f"There is no sample {SAMPLE_PREFIX}{name}; shipped are: {known or 'none'}.")
    return shipped[name]


def _checked_file(file: Path, split: str | None) -> Path:
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{file} is of no kind that can be read; known are: {', '.join(SUFFIXES)}.")
    if split not in (None, "train"):
        raise UserError(f"{file} is one file and has no split {split!r}; pick rows with `where`, or name another file.")
    return file


def _folder(folder: Path, split: str | None) -> list[Shard]:
    wanted = split or "train"
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return [_saved(folder, wanted)]
    inside = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES)]
    files = sorted(path for path in inside if not any(part.startswith((".", "_")) for part in path.parts))
    if not files:
        raise UserError(f"The folder {folder} holds no file that can be read; known are: {', '.join(SUFFIXES)}.")
    chosen = [path for path in files if _split_of(path, (wanted,))]
    if not chosen and wanted == "train" and not any(_split_of(path, SPLIT_NAMES) for path in files):
        chosen = files
    if not chosen:
        raise UserError(
            f"The folder {folder} has no files of the split {wanted!r}; it has: {', '.join(map(str, files))}."
        )
    return [FileShard(folder / path) for path in chosen]


def _split_of(path: Path, names: tuple[str, ...]) -> bool:
    """Whether the file or one of its folders is named after one of the splits, as in `train-00000.parquet`."""
    return any(re.match(rf"{re.escape(name)}([^a-z]|$)", part) for part in path.parts for name in names)


def _saved(folder: Path, split: str) -> SetShard:
    _refuse_foreign_files(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"The data set saved in {folder} cannot be opened: {_one_line(error)}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"The data set saved in {folder} has no split {split!r}; it has: {', '.join(loaded)}.")
        return SetShard(f"{folder} ({split})", _undecoded(loaded[split]))
    if split != "train":
        raise UserError(f"The data set saved in {folder} has no splits, so not {split!r} either; leave `split` out.")
    return SetShard(str(folder), _undecoded(loaded))


def _refuse_foreign_files(folder: Path) -> None:
    """Raise UserError where a saved data set names a file or a split that lies elsewhere: `datasets` would read it."""
    for path in sorted(folder.rglob("*")):  # which on Python 3.11 does not look into folders that are links
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to what lies outside of the data set; only files in it are read.")
    index = folder / "dataset_dict.json"
    if index.is_file():
        try:
            splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not the index of a saved data set: {_one_line(error)}.") from error
        strange = [name for name in splits if not isinstance(name, str) or Path(name).name != name]
        if strange:
            raise UserError(f"{index} names the split {strange[0]!r}; only folders beside it are read.")
    for state in sorted(folder.rglob("state.json")):
        try:
            names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{state} is not the state of a saved data set: {_one_line(error)}.") from error
        foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if foreign:
            raise UserError(f"{state} names {foreign[0]!r}; only files beside it are read.")


def _undecoded(dataset: Any) -> Any:
    """The same rows with every image, audio and video as the bytes or the path that is stored."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset if dataset.features is None else dataset.decode(False)
    plain = datasets.Features({name: _plain(feature) for name, feature in dataset.features.items()})
    return dataset if plain == dataset.features else dataset.cast(plain)


def _plain(feature: Any) -> Any:
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        return replace(feature, decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_plain(feature.feature))
    return {name: _plain(inner) for name, inner in feature.items()} if isinstance(feature, dict) else feature


def _hub(source: DataSource, streaming: bool) -> SetShard:
    split = source.split or "train"
    try:
        loaded = datasets.load_dataset(
            source.path, name=source.config, split=split, revision=source.revision, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source.path} is no local file or folder, and the Hub data set of that name cannot be read "
            f"({_one_line(error)}); check the name and the network, or give a file."
        ) from error
    return SetShard(f"{source.path} ({split})", _undecoded(loaded))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is a truncated or damaged gzip file; fetch or write it again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {_one_line(error)}.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or _one_line(error)}.") from error


def _open_text(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    with _open_text(file) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield number, _mapping(_parse_json(line, f"{file}, line {number}"), f"{file}, line {number}")


def _json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """A list of mappings; a file of that name which holds JSON lines, as the Hub has many, is read as such."""
    with _open_text(file) as handle:
        text = handle.read()
    if not text.strip():
        return
    if text.lstrip().startswith("{"):
        yield from _json_lines(file)
        return
    rows = _parse_json(text, str(file))
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a list of rows, got {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
        yield number, _mapping(row, f"{file}, row {number}")


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{place} is not valid JSON: {error.msg} at {spot}.") from error
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply to be read.") from error


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a mapping of column names to values, got {type(row).__name__}.")
    return row


def _csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with _open_text(file) as handle:
        reader = csv.reader(handle, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise UserError(f"{file} names a column twice in its header: {', '.join(header)}.")
            for cells in reader:
                if len(cells) != len(header) and cells:
                    raise UserError(f"{file}, line {reader.line_num} has {len(cells)} cells, the header {len(header)}.")
                if cells:
                    yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num} is not valid CSV: {_one_line(error)}.") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{file} is not a whole Parquet file: {_one_line(error)}.") from error
