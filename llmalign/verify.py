"""What a run has left behind, looked at file by file: checkpoints, models, the stages of rounds, and records."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from llmalign.errors import UserError
from llmalign.hub.staging import MANIFEST as HUB_MANIFEST
from llmalign.trainers.manifest import (
    MANIFEST,
    BrokenManifest,
    Written,
    differences,
    files_of,
    model_files,
    read_manifest,
)
from llmalign.trainers.resuming import ASIDE
from llmalign.trainers.running_out import in_units
from llmalign.trainers.soundness import WEIGHTS, WEIGHTS_ALONE, broken, lost_manifest, missing, writers_of

RECORDS = ("run.json", "metrics.json", "trainer_state.json", "sweep.json", "loop.json", "rounds.json")
CHECKPOINT = re.compile(r"checkpoint-\d+")
DEPTH = 4  # of a sweep over rounds: sweep, run, round, stage
WHOLE, BROKEN = "whole", "broken"


@dataclass(frozen=True)
class Verified:
    """A checkpoint, a model, a stage or a run's records: how much was looked at, and what is wrong with it."""

    name: str
    step: int | None
    size: int
    files: int
    verdict: str
    faults: tuple[str, ...] = ()


def verify(path: str | Path, *, quick: bool = False) -> list[Verified]:
    """All that is found in the folder of a run, of a checkpoint or of a model; `quick` does not read the files.

    Raises UserError where there is nothing to verify.
    """
    home = Path(path)
    if not home.is_dir():
        raise UserError(f"there is no folder {home}; name the folder of a run, of a checkpoint or of a model")
    found = list(_look(home, home, quick, DEPTH))
    if not found:
        raise UserError(f"{home} holds no run, no checkpoint and no model, so there is nothing to verify")
    return found


def table(found: list[Verified]) -> Table:
    """A line for each thing that was looked at."""
    shown = Table(caption=f"{sum(bool(one.faults) for one in found)} of {len(found)} broken")
    for name in ("what", "step", "size", "files", "verdict"):
        shown.add_column(name, justify="left" if name in ("what", "verdict") else "right", overflow="fold")
    for one in found:
        step = "" if one.step is None else f"{one.step:,}"
        shown.add_row(one.name, step, in_units(one.size), f"{one.files:,}", one.verdict)
    return shown


def _look(folder: Path, home: Path, quick: bool, depth: int) -> Iterator[Verified]:
    name = folder.relative_to(home).as_posix() if folder != home else folder.resolve().name
    if CHECKPOINT.fullmatch(folder.name) or _is_checkpoint(folder):
        yield _checkpoint(folder, name, quick)
        return
    seen = {ASIDE}
    if _has_model(folder) or any((folder / one).is_file() for one in (MANIFEST, HUB_MANIFEST, *RECORDS)):
        own, verified = _rest(folder, name, quick)
        seen |= {Path(one).parts[0] for one in own}  # parts of a pipeline are no models of their own
        yield verified
    if depth:
        for inside in sorted((path for path in folder.iterdir() if path.is_dir()), key=_by_number):
            if inside.name not in seen and not inside.is_symlink():
                yield from _look(inside, home, quick, depth - 1)


def _by_number(folder: Path) -> list[Any]:
    """Numbers in a name as numbers, so that step 9 comes before step 12."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", folder.name)]


def _is_checkpoint(folder: Path) -> bool:
    """Whether a renamed folder is one: a run's own folder has a state, too, and no scheduler's or random state."""
    return (folder / "trainer_state.json").is_file() and next(folder.glob("rng_state*.pth"), None) is not None


def _checkpoint(folder: Path, name: str, quick: bool) -> Verified:
    names, step = files_of(folder), None
    how, faults = "", []
    try:
        manifest = read_manifest(folder)
        how = _how(manifest is not None, quick)
        if manifest is not None:
            names, step = list(manifest.files), manifest.step
            faults = differences(folder, manifest.files, quick=quick)
        else:
            faults = [one for one in (lost_manifest(folder), broken(folder)) if one is not None]
        lost = missing(folder, manifest, writers_of(folder))
        if lost == WEIGHTS_ALONE and manifest is not None:  # as it was written
            how += "; weights alone (save_only_model), which no run goes on from"
        elif lost is not None and not faults:
            faults = [lost]
    except BrokenManifest as error:
        faults = [str(error)]
    if step is None and CHECKPOINT.fullmatch(folder.name):
        step = int(folder.name.rsplit("-", 1)[1])
    return _verified(folder, name, step, names, faults, how)


def _has_model(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in (*WEIGHTS, "model_index.json"))


def _rest(folder: Path, name: str, quick: bool) -> tuple[list[str], Verified]:
    """A folder with a model or with records of a run: a finished one, or one that rounds or a sweep has parts in."""
    faults = [f"{record} is cut off or damaged" for record in RECORDS if not _readable(folder / record)]
    files, step, names = None, None, model_files(folder)
    try:
        files, step = _manifest(folder)
    except BrokenManifest as error:
        faults.append(str(error))
    else:
        if files is not None:
            names = list(files)
            faults += differences(folder, files, quick=quick)
        elif (found := broken(folder, names)) is not None and found not in faults:
            faults.append(found)
    how = _how(files is not None, quick) if _has_model(folder) else "no model yet"
    verdict = _verified(folder, name, step, names, faults, how)
    return names, verdict


def _manifest(folder: Path) -> tuple[Mapping[str, Written] | None, int | None]:
    """What a folder should hold, by its manifest, that of a stage or the Hub's, and the step; None: nothing says it."""
    try:
        if (folder / HUB_MANIFEST).is_file():
            pushed = json.loads((folder / HUB_MANIFEST).read_text(encoding="utf-8"))["files"]
            return {name: Written(**entry) for name, entry in pushed.items()}, None
        if (folder / "plan.json").is_file() and (folder / MANIFEST).is_file():  # a stage of `iterate`
            stage = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            outputs = {name: one for name, one in stage["outputs"].items() if name not in stage["pruned"]}
            return {name: Written(one["bytes"], one["sha256"]) for name, one in outputs.items()}, None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenManifest(f"the manifest of {folder.name} is cut off or damaged") from error
    manifest = read_manifest(folder)
    return (None, None) if manifest is None else (manifest.files, manifest.step)


def _verified(folder: Path, name: str, step: int | None, names: list[str], faults: list[str], how: str) -> Verified:
    own = [path for path in (folder / one for one in names) if path.is_file()]
    if (folder / ASIDE).exists():
        how += "; a checkpoint whose writing was cut off is left over, unused"
    size = sum(path.stat().st_size for path in own)
    said = tuple(f"{name}: {fault}" for fault in faults)
    return Verified(name, step, size, len(own), BROKEN if faults else how, said)


def _how(manifest: bool, quick: bool) -> str:
    """The verdict on what has no fault: how closely it was looked at."""
    return "whole in structure (no manifest)" if not manifest else f"{WHOLE}, by sizes" if quick else WHOLE


def _readable(record: Path) -> bool:
    """Whether a record is whole, or is not there at all."""
    try:
        json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True
