"""What a folder should hold: a manifest with the size and the SHA-256 of each file, taken when they were written."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.assets import file_digest

MANIFEST = "manifest.json"
FORMAT = 1
SHOWN_FROM = 10**9  # bytes; less is hashed before anybody would look
# What of a run's folder is its model: what people may edit, and what tells of the run, is not.
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
WITH_PARTS = ("model_index.json", "adapter_config.json")  # pipelines, and adapters with others beside them
MODEL_MARKS = ("*.safetensors", "*config.json")
NO_MODEL_FILES = (MANIFEST, "run.json", "metrics.json", "sweep.json", "loop.json", "rounds.json", "plan.json")
NO_MODEL_FOLDERS = ("checkpoint-", "_incomplete")
THREADS = 8  # hashing lets go of the interpreter, and shards are many


@dataclass(frozen=True)
class Written:
    """One file as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a folder by their paths in it, and what is known about the run that wrote them."""

    files: Mapping[str, Written]
    step: int | None = None
    processes: int | None = None
    rows_per_step: int | None = None
    engine: str | None = None


class BrokenManifest(ValueError):
    """A manifest that is there and cannot be what was written."""


def write_manifest(folder: Path, names: Iterable[str], **about: Any) -> Path:
    """Hash the files `names` of `folder` and write its manifest, aside and renamed; the caller brings it to the disk.

    `about`: `step`, `processes` and `rows_per_step` of the run.
    """
    names = sorted(names)
    hashes = _hashed([folder / name for name in names], f"Hashing {folder.name}")
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, hashes, strict=True)
    }
    content = {"format": FORMAT, **about, "files": files}
    path = folder / MANIFEST
    aside = folder / f"{MANIFEST}.tmp"
    # Without a newline at its end, so that every byte counts.
    aside.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    os.replace(aside, path)
    return path


def write_model_manifest(folder: Path, **about: Any) -> Path:
    """Write the manifest of a model that lies in `folder`, with whatever else may; all of it is brought to the disk."""
    names = model_files(folder)
    for name in names:
        to_disk(folder / name)
    path = write_manifest(folder, names, **about)
    to_disk(path)
    to_disk(folder)
    return path


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where it has none. Raises BrokenManifest for one that is not what was written."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        said = content.pop("sha256")
        if said != _digest(content):
            raise BrokenManifest(f"{MANIFEST} is cut off or damaged: it does not have the hash that it names")
        if content["format"] != FORMAT:
            raise BrokenManifest(f"{MANIFEST} has format {content['format']} and this version reads {FORMAT}")
        files = {name: Written(**entry) for name, entry in content["files"].items()}
        return Manifest(files, *(content.get(name) for name in ("step", "processes", "rows_per_step", "engine")))
    except FileNotFoundError:
        return None
    except BrokenManifest:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenManifest(f"{MANIFEST} is cut off or damaged") from error


def differences(folder: Path, files: Mapping[str, Written], *, quick: bool = False) -> list[str]:
    """What is wrong with the files of a folder, a sentence each; `quick` looks at sizes alone."""
    wrong: dict[str, str] = {}
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = f"{name} is missing"
        elif (size := path.stat().st_size) != written.size:
            wrong[name] = (
                f"{name} is cut off or damaged: it has {size:,} bytes and had {written.size:,} when it was written"
            )
    rest = [] if quick else [name for name in files if name not in wrong]
    hashes = _hashed([folder / name for name in rest], f"Checking {folder.name}")
    for name, found in zip(rest, hashes, strict=True):
        expected = files[name].sha256
        if found != expected:
            wrong[name] = (
                f"{name} is cut off or damaged: its SHA-256 is {found[:12]}... and was {expected[:12]}... when it was "
                "written"
            )
    return [wrong[name] for name in files if name in wrong]


def model_files(folder: Path) -> list[str]:
    """The files of a model, an adapter or a pipeline that a run left in its folder, beside checkpoints and logs."""
    homes = [folder]
    if any((folder / mark).is_file() for mark in WITH_PARTS):
        parts = (path for path in folder.glob("*/") if not path.name.startswith(NO_MODEL_FOLDERS))
        homes += [part for part in parts if any(next(part.glob(mark), None) for mark in MODEL_MARKS)]
    return sorted(
        path.relative_to(folder).as_posix()
        for home in homes
        for path in home.iterdir()
        if path.is_file() and path.suffix in MODEL_SUFFIXES and path.name not in NO_MODEL_FILES
    )


def files_of(folder: Path) -> list[str]:
    """The files in a folder and in its subfolders, without its manifest, by their paths in it."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    )


def to_disk(path: Path) -> None:
    """Wait until what was written to a file, or changed in a folder, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hashed(paths: list[Path], what: str) -> list[str]:
    """The hashes of files, several at a time; a large folder shows how far it is."""
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=total < SHOWN_FROM) as bar:

        def hashed(path: Path) -> str:
            digest = file_digest(path)
            bar.update(path.stat().st_size)
            return digest

        if total < SHOWN_FROM:  # not worth a thread, whose start waits for ever where there is no memory for it
            return [hashed(path) for path in paths]
        with ThreadPoolExecutor(max(1, min(THREADS, os.cpu_count() or 1, len(paths)))) as pool:
            return list(pool.map(hashed, paths))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
