"""Which checkpoint a run goes on from: the one that is named, or the newest that is whole."""

import logging
import os
from pathlib import Path

from llmalign.errors import UserError
from llmalign.processes import from_first_process
from llmalign.trainers.soundness import checkpoints, fault

logger = logging.getLogger(__name__)

ASIDE = "_incomplete"
WAY_OUT = "resume from another checkpoint, or start again in a new output_dir"

#: checkpoints of which this process has read every byte, with the times and sizes of their files then
_read: set[tuple[object, ...]] = set()


def check_whole(path: str | Path, world_size: int | None = None) -> None:
    """Check that training can go on from the checkpoint at `path` and end where the uninterrupted run would have ended.

    Looked at: weights, optimizer, scheduler, the random state of each process, `trainer_state.json`, and every file's
    size and hash where there is a manifest, else its structure. Of several processes the first one reads, and all call
    this. `world_size` (default: what the launcher says) may be another than the checkpoint's, where nothing in it is a
    process's own.

    Raises:
        UserError: something is missing or broken; the sentence names it.
    """
    found = from_first_process(lambda: _fault(Path(path), world_size))
    if found is not None:
        raise UserError(f"{path} cannot be resumed from: {found}; {WAY_OUT}.")


def find_resumable(output_dir: str | Path, world_size: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the whole checkpoint with the highest step (or None), and each newer one with what is wrong with it."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(Path(output_dir))):
        found = _fault(folder, world_size)
        if found is None:
            return folder, skipped
        skipped.append((folder, found))
    return None, skipped


def resolve_resume(resume: str | None, output_dir: str | Path, world_size: int | None = None) -> str | None:
    """Turn what `--resume` was given into the checkpoint to go on from; None means: from the beginning.

    `"auto"` is the newest whole checkpoint of `output_dir`, or the beginning where there is none at all. Of several
    processes the first one looks, and all call this.

    Raises:
        UserError: the named checkpoint is not whole, or `output_dir` holds checkpoints and none of them is whole.
    """
    if resume is None:
        return None
    if resume != "auto":
        check_whole(resume, world_size)
        logger.info("Resuming from %s.", resume)
        return resume
    found, skipped = from_first_process(lambda: find_resumable(output_dir, world_size))
    if (Path(output_dir) / ASIDE).exists():
        logger.info("%s holds a checkpoint whose writing was cut off; it is not used.", Path(output_dir) / ASIDE)
    for folder, fault_of_it in skipped:
        logger.warning("Skipped %s: %s.", folder, fault_of_it)
    if found is None and skipped:
        reasons = "; ".join(f"{folder.name}: {fault_of_it}" for folder, fault_of_it in skipped)
        raise UserError(
            f"None of the checkpoints in {output_dir} can be resumed from ({reasons}); "
            "start again in a new output_dir, or delete these checkpoints."
        )
    if found is None:
        logger.info("%s holds no checkpoint: starting from the beginning.", output_dir)
        return None
    logger.info("Resuming from %s, the newest whole checkpoint.", found)
    return str(found)


def _fault(folder: Path, world_size: int | None) -> str | None:
    """As `fault`, without reading a checkpoint again that has not changed since this process read it."""
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    try:
        key = _signature(folder, world_size)
        if key in _read:
            return None
        found = fault(folder, world_size)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    if found is None:
        _read.add(key)
    return found


def _signature(folder: Path, world_size: int) -> tuple[object, ...]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    times = ((str(path), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()])
    return (str(folder.resolve()), world_size, *times)
