"""A stage: work whose result is a folder of files with a manifest, done once, found again, and never half there.

The manifest is written last, aside and renamed: where it is, the stage is finished. It holds the hashes of what went in
and of what came out; a stage whose inputs or results are not those any more is done again, which is said.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmalign import __version__
from llmalign.assets import file_digest
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PLAN = "plan.json"
PACKAGES = ("torch", "transformers", "trl", "peft")
POLL_SECONDS = 0.5

Row = dict[str, Any]


@dataclass
class Manifest:
    """What a finished stage was made of and what it made.

    `inputs` and `outputs`: SHA-256 by name, outputs with their sizes. `counts` and `measured` are results, the same
    however often the stage was stopped; `cost` (seconds, tokens, requests) is what this run of it took.
    """

    stage: str
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    seed: int
    counts: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each result."""
        return {name: entry["sha256"] for name, entry in self.outputs.items()}

    def digest(self) -> str:
        """One hash of all results."""
        return digest_of(self.hashes())


@dataclass
class Made:
    """What the work of a stage hands over: the names of its result files, and what there is to say of them."""

    outputs: list[str]
    counts: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def finished(folder: Path, inputs: Mapping[str, str]) -> Manifest | None:
    """The manifest of a stage whose result is there, whole and made of these inputs; else None, and why is said."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    changed = [name for name in {**manifest.inputs, **inputs} if manifest.inputs.get(name) != inputs.get(name)]
    if changed:
        logger.warning("%s was made of other %s: it is done again.", folder, " and ".join(sorted(changed)))
        return None
    for name, entry in manifest.outputs.items():
        if name in manifest.pruned:
            continue
        path = folder / name
        if not path.is_file():
            logger.warning("%s is missing: the stage is done again.", path)
            return None
        if path.stat().st_size != entry["bytes"] or file_digest(path) != entry["sha256"]:
            logger.warning("%s has changed since it was written: the stage is done again.", path)
            return None
    return manifest


def run_stage(
    folder: Path,
    *,
    inputs: Mapping[str, str],
    seed: int,
    make: Callable[[Path], Made],
    precious: bool = False,
    main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> Manifest:
    """The stage's manifest, after doing what is not done yet. Partial work of the same inputs is left for `make`.

    A `precious` result that is not whole is refused instead of removed. Of several processes all call this. The main
    one begins, collects and writes the manifest; the others do their share of `make` and look for the manifest, since
    no exchange between processes waits as long as a stage may take.
    """
    kept = finished(folder, inputs)
    if kept is None and precious and (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} holds a trained model that is not what its {MANIFEST} says any more, or was made of other rows "
            "(see the warning above): put back what has changed, or delete the folder to have it trained again"
        )
    barrier()
    if kept is not None:
        logger.info("%s: done already.", _name(folder))
        return kept
    if main:
        _begin(folder, dict(inputs))
    barrier()
    logger.info("%s ...", _name(folder))
    started = time.perf_counter()
    made = make(folder)
    if not main:
        wait_for(folder / MANIFEST)
        return read_manifest(folder)
    manifest = Manifest(
        stage=_name(folder),
        inputs=dict(inputs),
        outputs={name: describe(folder / name) for name in made.outputs},
        seed=seed,
        counts=made.counts,
        measured=made.measured,
        cost={"seconds": round(time.perf_counter() - started, 2), **made.cost},
        versions=versions(),
    )
    write_manifest(folder, manifest)
    logger.info("%s: %s (%.1f s).", _name(folder), _said(made.counts) or "done", manifest.cost["seconds"])
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished stage. Raises UserError where it cannot be read."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is no manifest of this version ({error}); delete {folder} to have its stage done "
            "again"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a stage's manifest, which says that it is finished."""
    write_json(folder / MANIFEST, asdict(manifest))


def versions() -> dict[str, str]:
    """Of what a result depends on beside its inputs."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"llmalign": __version__, "python": platform.python_version(), **found}


def describe(path: Path) -> dict[str, Any]:
    """Hash and size of a result."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def digest_of(content: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside, bring it to the disk and rename it."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines aside, bring them to the disk and rename them."""
    _write(path, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows, so many at a time: those of a large round do not fit in memory."""
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is whole or not there, whenever the process or the machine stops."""
    _write(path, [content])


def _write(path: Path, content: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(folder: Path, inputs: dict[str, str]) -> None:
    """A folder that holds partial work of these inputs, or nothing."""
    if folder.exists() and ((folder / MANIFEST).exists() or _planned(folder) != inputs):
        # The plan goes first: what is being removed must not look like work to go on from.
        (folder / PLAN).unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    if not folder.exists():
        write_json(folder / PLAN, inputs)


def _planned(folder: Path) -> dict[str, str] | None:
    path = folder / PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def wait_for(path: Path) -> None:
    """Wait until another process has written a file; should it fail, the launcher ends this one too."""
    while not path.is_file():
        time.sleep(POLL_SECONDS)


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _said(counts: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in counts.items() if isinstance(value, int)}
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in plain.items())
