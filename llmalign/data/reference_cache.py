"""Log-probs of completions under a frozen model, kept on disk, so that no run computes again what another one has.

A folder holds the scores of one ScoreKey: of one set of weights, in one precision, with one way of scoring. In it lie
shards, safetensors files that are written aside and renamed, and never changed again: any number of processes may fill
a folder at once. A shard that is torn, altered or another folder's is set aside and its entries are computed anew.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.assets import cache_folder
from llmalign.data.weights import weights_digest
from llmalign.errors import UserError
from llmalign.types import PromptGroups

logger = logging.getLogger(__name__)

__all__ = [
    "ReferenceCache", "Report", "ScoreKey", "default_root", "keep_rows", "look_up_rows", "score_ahead", "sequence_keys",
    "weights_digest",
]  # fmt: skip

FORMAT = "1"
KEY_BYTES = 16
SHARD_ROWS = 50_000
FLUSH_SECONDS = 30.0
CHUNK_ROWS = 1000

Row = dict[str, Any]


def default_root() -> Path:
    """Where log-probs are kept unless a recipe says otherwise: `reference` in the user's cache."""
    return cache_folder() / "reference"


@dataclass(frozen=True)
class ScoreKey:
    """What a log-prob depends on beside the tokens.

    `weights`: their digest. `dtype`: what they are held in. `autocast`: the precision of the computation, `no` where it
    is that of the weights. `scoring`: the layout and whatever else changes how sequences are scored. `max_length`: the
    tokens that prompt and completion are cut to; None, not cut.
    """

    weights: str
    dtype: str
    autocast: str
    scoring: str
    max_length: int | None

    def digest(self) -> str:
        """SHA-256 of all fields and of the version of the file format, in hexadecimal."""
        return hashlib.sha256(json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode()).hexdigest()


def sequence_keys(groups: PromptGroups) -> np.ndarray:
    """Keys of the N sequences, (N,) of 16 bytes: of prompt and completion ids, so that their boundary matters."""
    keys = []
    for prompt, completions in zip(groups.prompts, groups.completions, strict=True):
        started = hashlib.sha256(np.array([len(prompt), *prompt], dtype="<i4").tobytes())
        for completion in completions:
            whole = started.copy()
            whole.update(np.array([len(completion), *completion], dtype="<i4").tobytes())
            keys.append(whole.digest()[:KEY_BYTES])
    return np.array(keys, dtype=f"S{KEY_BYTES}")


class _Broken(Exception):
    """Why a shard cannot be used."""


class ReferenceCache:
    """The log-probs of one ScoreKey under the folder `root`; what is stored lies on disk after `flush`.

    Shards of other processes are seen after `refresh`. Raises UserError where the folder cannot be written.
    """

    def __init__(self, root: Path | str, key: ScoreKey, *, shard_rows: int = SHARD_ROWS) -> None:
        self._digest = key.digest()
        self.folder = Path(root).expanduser() / self._digest[:32]
        self._shard_rows = shard_rows
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")  # sorted
        self._values = np.empty(0, dtype=np.float32)
        self._pending: dict[bytes, float] = {}
        self._seen: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "key.json").is_file():
                said = {"what": "Log-probs in nats of completions under a frozen model.", "format": FORMAT}
                _write_aside(
                    self.folder / "key.json",
                    lambda path: path.write_text(json.dumps({**said, **asdict(key)}, indent=2) + "\n"),
                )
        except OSError as error:
            raise self._unwritable(error) from error
        self.refresh()

    def _unwritable(self, error: Exception) -> UserError:
        why = error.strerror if isinstance(error, OSError) else error
        return UserError(
            f"the reference cache cannot be written in {self.folder} ({why}); set reference_cache_dir or "
            "LLMALIGN_CACHE to a folder that can be"
        )

    def lookup(self, groups: PromptGroups) -> np.ndarray:
        """Log-probs (N,) float32 of the sequences, NaN where there is none."""
        return self.lookup_keys(sequence_keys(groups))

    def lookup_keys(self, keys: np.ndarray) -> np.ndarray:
        """Log-probs (N,) float32 by sequence key, NaN where there is none."""
        found = np.full(len(keys), np.nan, dtype=np.float32)
        if len(self._keys):
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            held = self._keys[places] == keys
            found[held] = self._values[places[held]]
        if self._pending:
            for index in np.flatnonzero(np.isnan(found)):
                found[index] = self._pending.get(keys[index].ljust(KEY_BYTES, b"\0"), np.nan)
        return found

    def store(self, groups: PromptGroups, logps: np.ndarray, *, row_ids: Sequence[int] | None = None) -> None:
        """Keep log-probs (N,) of the sequences; every `shard_rows` of them are written.

        Raises UserError naming the row (by `row_ids`, one a prompt, else by its position) of a NaN or an infinity.
        """
        if len(logps) != sum(groups.counts()):
            raise ValueError(f"{len(logps)} log-probs for {sum(groups.counts())} completions")
        bad = np.flatnonzero(~np.isfinite(logps))
        if len(bad):
            row = int(np.repeat(np.arange(len(groups)), groups.counts())[bad[0]])
            raise UserError(
                f"Row {row if row_ids is None else row_ids[row]}: the frozen model gives a completion the log-prob "
                f"{logps[bad[0]]}; check the model's weights and precision (float16 overflows), or drop the row."
            )
        keys = (key.ljust(KEY_BYTES, b"\0") for key in sequence_keys(groups).tolist())
        self._pending.update(zip(keys, logps.tolist(), strict=True))
        if len(self._pending) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what was stored since the last time as one shard."""
        if not self._pending:
            return
        keys = np.frombuffer(b"".join(self._pending), dtype=np.uint8).reshape(-1, KEY_BYTES)
        values = np.fromiter(self._pending.values(), dtype=np.float32)
        body = _body_digest(keys, values)
        noted = {"count": str(len(values)), "sha256": body, "key": self._digest}
        path = self.folder / f"{body[:32]}.safetensors"
        try:
            _write_aside(path, lambda aside: save_file({"keys": keys, "values": values}, aside, noted))
        except (OSError, SafetensorError) as error:  # the latter where the disk is full
            raise self._unwritable(error) from error
        self._seen.add(path.name)
        self._add(keys, values)
        self._pending = {}

    def refresh(self) -> None:
        """Read the shards that are new in the folder, and set broken ones aside with a logged sentence."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name in self._seen:
                continue
            try:
                keys, values = _read(path, self._digest)
            except FileNotFoundError:
                continue  # another process has just set it aside
            except _Broken as error:
                logger.warning("%s is not used: %s; what it held is computed again.", path, error)
                with suppress(OSError):  # the folder may be another user's, and skipping the file is enough
                    path.rename(path.with_suffix(".broken"))
                continue
            self._seen.add(path.name)
            self._add(keys, values)

    def _add(self, keys: np.ndarray, values: np.ndarray) -> None:
        keys = np.concatenate([self._keys, np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)])
        values = np.concatenate([self._values, values])
        # Of two values for a key, the lower: which one wins must not hang on the order in which shards are read.
        order = np.lexsort((values, keys))
        self._keys, first = np.unique(keys[order], return_index=True)
        self._values = values[order][first]


def _read(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n, 16) uint8 and values (n,) float32 of a whole shard of this key. Raises _Broken."""
    try:
        with safe_open(path, framework="numpy") as shard:
            noted = shard.metadata() or {}
            keys, values = shard.get_tensor("keys"), shard.get_tensor("values")
    except SafetensorError as error:
        raise _Broken(f"it is torn or no shard ({error})") from error
    if noted.get("key") != key:
        raise _Broken("it belongs to another key")
    if keys.dtype != np.uint8 or values.dtype != np.float32 or keys.shape != (len(values), KEY_BYTES):
        raise _Broken("its arrays are not those of a shard")
    if noted.get("count") != str(len(values)) or noted.get("sha256") != _body_digest(keys, values):
        raise _Broken("its bytes have changed since it was written")
    if not np.isfinite(values).all():
        raise _Broken("it holds a log-prob that is not finite")
    return keys, values


def _body_digest(keys: np.ndarray, values: np.ndarray) -> str:
    return hashlib.sha256(keys.tobytes() + values.tobytes()).hexdigest()


def _write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it."""
    aside = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def look_up_rows(
    cache: ReferenceCache, rows: Iterable[Row], groups_of: Callable[[list[Row]], PromptGroups]
) -> np.ndarray:
    """Log-probs (N,) float32 of all completions of some rows, NaN where there is none; holds few rows at a time."""
    parts = [cache.lookup(groups_of(chunk)) for chunk in _chunks(rows)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)


def keep_rows(
    cache: ReferenceCache, rows: Iterable[Row], groups_of: Callable[[list[Row]], PromptGroups], logps: np.ndarray
) -> None:
    """Store what the cache lacks of the log-probs (N,) of all completions of some rows, as another cache held them."""
    for chunk in _chunks(rows):
        groups = groups_of(chunk)
        own, logps = np.split(logps, [sum(groups.counts())])
        if np.isnan(cache.lookup(groups)).any():
            cache.store(groups, own)
    cache.flush()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while chunk := list(islice(left, CHUNK_ROWS)):
        yield chunk


@dataclass(frozen=True)
class Report:
    """What filling a cache took: sequences that had to be scored (on all ranks; each once), all others, and time."""

    found: int
    computed: int
    seconds: float

    def __add__(self, other: "Report") -> "Report":
        """Both together."""
        return Report(self.found + other.found, self.computed + other.computed, self.seconds + other.seconds)


@dataclass(frozen=True)
class _Job:
    """Completions of a row that the cache lacks; `tokens` counts their prompt once."""

    row: int
    completions: list[int]
    tokens: int


def score_ahead(
    cache: ReferenceCache,
    rows: Any,
    groups_of: Callable[[list[Row]], PromptGroups],
    score: Callable[[PromptGroups], Tensor],
    *,
    tokens_per_batch: int,
    description: str,
    rank: int = 0,
    world: int = 1,
    together: Callable[[str | None], None] | None = None,
    agree: Callable[[Any], Any] | None = None,
    even: bool = False,
    disable: bool = False,
) -> Report:
    """Fill the cache with what it lacks of `rows` (a list or a Dataset), each rank its share, longest batches first.

    `score` gives log-probs (N,). `agree` returns rank 0's argument on every rank: another run may fill the same cache
    meanwhile, so ranks that each looked for themselves would not see the same gaps. `even` lets every rank call `score`
    equally often, as sharded models need. What is scored is written twice a minute, so that a killed fill goes on where
    it was. Raises UserError naming the row whose log-prob is not finite, or the folder that cannot be written;
    `together` is told of such a fault, or None, on every rank and raises where any has one.
    """
    started = time.perf_counter()
    cache.refresh()
    jobs, total = _missing(cache, rows, groups_of)
    if world > 1:
        if agree is None:
            raise ValueError("several ranks fill a cache only with `agree`, a broadcast from rank 0")
        jobs = agree(jobs)
    batches = _batches(jobs, tokens_per_batch)
    own = batches[rank::world]
    idle = [own[-1] if own else batches[0]] if even and len(own) < len(batches[::world]) else []
    fault: str | None = None
    flushed = time.perf_counter()
    size = sum(len(job.completions) for batch in own for job in batch)
    try:
        with tqdm(total=size, desc=description, unit="seq", disable=disable or rank > 0 or not batches) as bar:
            for index, batch in enumerate([*own, *idle]):
                if fault is not None and not even:
                    break
                examples = [rows[job.row] for job in batch]
                groups = _some(groups_of(examples), [job.completions for job in batch])
                logps = score(groups).detach().float().cpu().numpy()
                if index == len(own) or fault is not None:
                    continue
                ids = [row["row_id"] for row in examples]
                fault = _fault_of(lambda: cache.store(groups, logps, row_ids=ids))  # noqa: B023 - called at once
                bar.update(len(logps))
                if time.perf_counter() - flushed > FLUSH_SECONDS:
                    fault = fault or _fault_of(cache.flush)
                    flushed = time.perf_counter()
    finally:
        fault = _fault_of(cache.flush) or fault
    (together or _raise)(fault)
    cache.refresh()
    computed = sum(len(job.completions) for job in jobs)
    return Report(total - computed, computed, time.perf_counter() - started)


def _fault_of(write: Callable[[], None]) -> str | None:
    """What kept something from being written, in a sentence."""
    try:
        write()
    except UserError as error:
        return str(error)
    return None


def _raise(fault: str | None) -> None:
    if fault is not None:
        raise UserError(fault)


def _missing(
    cache: ReferenceCache, rows: Iterable[Row], groups_of: Callable[[list[Row]], PromptGroups]
) -> tuple[list[_Job], int]:
    """What the cache lacks, a sequence that stands in several rows once; and how many sequences there are in all."""
    jobs: list[_Job] = []
    planned: set[bytes] = set()
    start = total = 0
    for chunk in _chunks(rows):
        groups = groups_of(chunk)
        keys = sequence_keys(groups)
        lacking = np.isnan(cache.lookup_keys(keys))
        place = 0
        for offset, completions in enumerate(groups.completions):
            wanted = []
            for index in range(len(completions)):
                key = keys[place + index]
                if lacking[place + index] and key not in planned:
                    planned.add(key)
                    wanted.append(index)
            place += len(completions)
            if wanted:
                tokens = len(groups.prompts[offset]) + sum(len(completions[index]) for index in wanted)
                jobs.append(_Job(start + offset, wanted, tokens))
        start += len(chunk)
        total += len(keys)
    return jobs, total


def _batches(jobs: Sequence[_Job], tokens_per_batch: int) -> list[list[_Job]]:
    """Batches of at most `tokens_per_batch` tokens, or of a single row; longest rows first."""
    batches: list[list[_Job]] = []
    room = 0
    for job in sorted(jobs, key=lambda job: (-job.tokens, job.row)):
        if job.tokens > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(job)
        room -= job.tokens
    return batches


def _some(groups: PromptGroups, wanted: list[list[int]]) -> PromptGroups:
    """Of each prompt the wanted completions alone."""
    completions = [[group[index] for index in some] for group, some in zip(groups.completions, wanted, strict=True)]
    return PromptGroups(groups.prompts, completions)
