"""What a run says when memory, the disk or the right to write runs out: what happened, what to change, what is left."""

import contextlib
import errno
import gc
import logging
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import get_model_param_count

from llmalign.errors import OneProcessError, UserError
from llmalign.processes import fail_together
from llmalign.trainers.less_memory import advice
from llmalign.trainers.manifest import model_files
from llmalign.trainers.resuming import ASIDE
from llmalign.trainers.soundness import WEIGHTS_ALONE, broken, checkpoints, fault

logger = logging.getLogger(__name__)

CAUGHT = (OSError, MemoryError, RuntimeError, ImportError, SafetensorError)
MEMORY, FULL, FORBIDDEN, LOST, PEERS = "memory", "full", "forbidden", "lost", "peers"
NUMBERS = {
    errno.ENOMEM: MEMORY, errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: FULL, errno.EROFS: FORBIDDEN,
    errno.EACCES: FORBIDDEN, errno.EPERM: FORBIDDEN, errno.EIO: LOST, errno.ESTALE: LOST,
}  # fmt: skip
#: what else can be wrong with a path that the run itself made
OWN_NUMBERS = {errno.ENOTDIR: LOST, errno.ENOENT: LOST, errno.EEXIST: LOST, errno.EISDIR: LOST}
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Unable to allocate",
    "Cannot allocate memory", "failed to map segment", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
NO_SPACE = ("No space left", "Not enough disk space", "Disk quota exceeded", "File too large")
TORCH_SAVE = ("PytorchStreamWriter failed", "inline_container", "iostream error")  # which do not say why
#: what an exchange says whose other side is gone, of gloo and of NCCL
NO_PEERS = ("closed by peer", "reset by peer", "remote process exited", "NCCL communicator was aborted")
NEARLY_NOTHING = 1 << 20
MOMENTS = 8  # bytes of Adam's state a trained weight
REASON = 160
CLOCKS = 2.0  # seconds by which a file system's times may be coarser than the system's, or behind


@dataclass(frozen=True)
class Shortage:
    """What ran out, in the system's words, and the path that it says, if it says one."""

    kind: str
    reason: str
    path: str | None = None


class Resources(contextlib.AbstractContextManager["Resources"]):
    """Where memory, the disk or the right to write runs out within it, a sentence takes the place of the error.

    It names the keys of the recipe that would help, from their values, and the newest good checkpoint. What was
    half-written in the output folder is removed. A OneProcessError: other processes may have enough.
    """

    def __init__(self, args: Any, *, peft: bool, any_split: bool = True) -> None:
        self.args, self.peft, self.any_split = args, peft, any_split
        self._trainer: Any = None
        self._checkpoint_bytes: int | None = None
        self._began = time.time()

    def expect(self, trainer: Any) -> None:
        """Take note of what runs, and warn where the disk has no room for what will be saved."""
        self._trainer, self._checkpoint_bytes = trainer, estimated_checkpoint(trainer)
        if not trainer.is_world_process_zero() or self.args.save_strategy == "no":
            return
        limit = self.args.save_total_limit
        count = 2 if limit is None else limit + 1  # the oldest leaves once the newest is there
        free = free_bytes(self.args.output_dir)
        if free is not None and free < count * self._checkpoint_bytes:
            logger.warning(
                "%s has %s free and a checkpoint takes about %s: make room for %d of them, or %s.",
                self.args.output_dir, in_units(free), in_units(self._checkpoint_bytes), count, self._less_to_save(),
            )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        own = isinstance(error, UserError)  # it says something already, though perhaps of what is only the last straw
        found = shortage(error.__cause__ if own else error, Path(self.args.output_dir))
        if found is None or (own and found.kind not in (MEMORY, FULL, PEERS)):
            return
        running = set()
        free = free_bytes(found.path or self.args.output_dir)
        for one in _chain(error):
            running |= {frame.f_code.co_name for frame, _ in traceback.walk_tb(one.__traceback__)}
            traceback.clear_frames(one.__traceback__)  # they hold the batch and its graph: a sentence needs memory
        gc.collect()
        if found.kind == PEERS:
            raise OneProcessError(
                "Another process of this run has ended and says itself why, so this one ends, too; "
                f"{where_to_go_on(self.args.output_dir)}."
            ) from error
        if found.kind == MEMORY:
            raise OneProcessError(self._memory(found, running)) from error
        raise OneProcessError(self._disk(found, free)) from error

    def _memory(self, found: Shortage, running: set[str]) -> str:
        helps = advice(self.args, peft=self.peft, running=running, any_split=self.any_split)
        done = self._trainer.state.global_step if self._trainer is not None else 0
        when = f"after step {done}" if done else "before the first step was done"
        parts = [f"Memory ran out {when} ({found.reason})."]
        if helps.same:
            either = "either" if len(helps.same) > 1 else "it"
            parts.append(f"Set {' or '.join(helps.same)}: {where_to_go_on(self.args.output_dir)} with {either}.")
        if helps.other:
            parts.append(f"A new run needs less with {', '.join(helps.other[:-1])}{_last(helps.other)}.")
        if not helps.same:
            parts.append(f"As it was, {where_to_go_on(self.args.output_dir)}.")
        return " ".join(parts)

    def _disk(self, found: Shortage, free: int | None) -> str:
        output = Path(self.args.output_dir)
        removed = " What was half-written is removed." if remove_half_written(output, self._began) else ""
        place = found.path or self._fullest()
        inside = Path(place).absolute().is_relative_to(output.absolute())
        way_out = self._other_folder(Path(place))
        if inside:
            way_out = "give another output_dir" if found.kind == FORBIDDEN else self._less_to_save()
        goes_on = where_to_go_on(self.args.output_dir)
        goes_on = f" {goes_on[0].upper()}{goes_on[1:]}."
        if found.kind == FULL:
            taken = (
                f", and a checkpoint takes about {in_units(self._checkpoint_bytes)}" if self._checkpoint_bytes else ""
            )
            left = f"{in_units(free or 0)} free{taken if inside else ''}"
            return (
                f"No room is left to write {place} ({found.reason}; {left}): make room, or {way_out}.{removed}{goes_on}"
            )
        mend = (
            "see to its owner, its rights and how it is mounted"
            if found.kind == FORBIDDEN
            else "see to the disk and its quota"
        )
        return f"{place} cannot be written ({found.reason}): {mend}, or {way_out}.{removed}{goes_on}"

    def _less_to_save(self) -> str:
        """Keys that would leave less on the disk."""
        limit = self.args.save_total_limit
        keys = [] if limit == 1 else [f"save_total_limit: 1 (now {'all are kept' if limit is None else limit})"]
        if not self.args.save_only_model:
            keys.append("save_only_model: true (weights alone, which no run goes on from)")
        return "set " + " or ".join([*keys, "another output_dir"])

    def _other_folder(self, place: Path) -> str:
        """The key that names the folder of caches in which `place` lies."""
        for name in ("reference_cache_dir", "image_cache_dir"):
            folder = next((getattr(self.args, name) for entry in fields(self.args) if entry.name == name), None)
            if folder is not None and place.absolute().is_relative_to(Path(folder).expanduser().absolute()):
                return f"set {name} to another folder"
        return "set LLMALIGN_CACHE, HF_HOME or TMPDIR, whichever it lies in, to another folder"

    def _fullest(self) -> str:
        """Of the folders that a run writes to the first that has nothing left, the output folder else."""
        names = [entry.name for entry in fields(self.args) if entry.name in ("reference_cache_dir", "image_cache_dir")]
        places = [self.args.output_dir, *(getattr(self.args, name) for name in names), tempfile.gettempdir()]
        room = {place: free_bytes(place) for place in places if place is not None}
        empty = [place for place, free in room.items() if free is not None and free < NEARLY_NOTHING]
        return str((empty or places)[0])


def shortage(error: BaseException | None, output: Path) -> Shortage | None:
    """What ran out, by the error or by what caused it; None where it is something else."""
    for one in _chain(error):
        if not isinstance(one, CAUGHT):
            continue
        reason = _first_line(one)
        if isinstance(one, (MemoryError, torch.OutOfMemoryError)) or any(mark in str(one) for mark in NO_MEMORY):
            return Shortage(MEMORY, reason)
        if isinstance(one, RuntimeError) and any(mark in str(one) for mark in NO_PEERS):
            return Shortage(PEERS, reason)
        number, path = _number_and_path(one)
        kind = NUMBERS.get(number)
        if kind is None and path is not None and Path(path).absolute().is_relative_to(output.absolute()):
            kind = OWN_NUMBERS.get(number)
        if kind is not None:
            return Shortage(kind, os.strerror(number), path)
        if any(mark in str(one) for mark in NO_SPACE):
            return Shortage(FULL, reason)
        if isinstance(one, RuntimeError) and any(mark in str(one) for mark in TORCH_SAVE):
            free = free_bytes(output)
            if free is not None and free < NEARLY_NOTHING:
                return Shortage(FULL, os.strerror(errno.ENOSPC), str(output))
            return Shortage(LOST, reason, str(output))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _number_and_path(error: BaseException) -> tuple[int, str | None]:
    """The system's number of an error and its path; safetensors has the number in its text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        return error.errno, None if named is None else os.fspath(named)
    found = re.search(r"os error (\d+)|\[errno (\d+)\]", str(error), re.IGNORECASE)
    return (int(found[1] or found[2]) if found else 0), None


def _first_line(error: BaseException) -> str:
    """The sentence of an error that says what happened, without the stack that torch adds."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = (
        re.sub(r"^\[enforce fail at [^\]]*\]\s*\.?\s*(.*?\.\s)?", "", text).strip().rstrip(".") or type(error).__name__
    )
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def _last(words: list[str]) -> str:
    return f" or {words[-1]}" if len(words) > 1 else words[-1]


def where_to_go_on(output_dir: str) -> str:
    """The newest good checkpoint and how to go on from it, as the end of a sentence; looks at sizes, not at bytes."""
    own = checkpoints(Path(output_dir))
    for folder in reversed(own):
        try:
            wrong = fault(folder, int(os.environ.get("WORLD_SIZE", "1")), quick=True)
        except OSError:
            continue
        if wrong is None:
            return f"--resume auto goes on from {folder.name}"
        if wrong == WEIGHTS_ALONE:
            return f"a new run can start from the weights in {folder.name}, which holds them alone (save_only_model)"
    if own:
        return f"no checkpoint in {output_dir} can be gone on from (llmalign verify says why)"
    return "--resume auto starts from the beginning (there is no checkpoint yet)"


def require_writable(output_dir: str) -> None:
    """Raise UserError, on all processes, where the first one cannot write into the output folder; leaves no trace."""
    fault = _why_not_writable(Path(output_dir)) if int(os.environ.get("RANK", "0")) == 0 else None
    fail_together(
        None
        if fault is None
        else f"output_dir {output_dir} cannot be written ({fault}): give another one, or mend that"
    )


def _why_not_writable(folder: Path) -> str | None:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # not made, or another run has put something in it
                parent.rmdir()
    return None


def remove_half_written(output: Path, began: float) -> bool:
    """Remove, on the main process, what was not finished of a checkpoint and of files; whether there was any.

    Files that were there when the run began (`began`, in seconds since the epoch) are another's, and stay.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return False
    doomed = [output / ASIDE] if (output / ASIDE).exists() else []
    with contextlib.suppress(OSError):
        own = [path for path in output.glob("*.tmp")] + [output / name for name in model_files(output)]
        recent = [path for path in own if path.stat().st_mtime >= began - CLOCKS]
        doomed += [path for path in recent if path.suffix == ".tmp" or broken(output, [path.name]) is not None]
    for path in doomed:
        with contextlib.suppress(OSError):  # read-only: then it stays, and a resumed run does not look at it
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return any(not path.exists() for path in doomed)


def estimated_checkpoint(trainer: Any) -> int:
    """About how many bytes a checkpoint has: what is saved of the weights, and Adam's state of what is trained."""
    trained = get_model_param_count(trainer.model, trainable_only=True)
    whole = get_model_param_count(trainer.model)
    width = max((weight.element_size() for weight in trainer.model.parameters()), default=4)
    weights = trained if trained < whole / 2 else whole  # an adapter is saved alone
    return weights * width + (0 if trainer.args.save_only_model else trained * MOMENTS)


def free_bytes(place: str | Path) -> int | None:
    """What is free on the disk of a folder that may not be there yet, None where that cannot be told."""
    path = Path(place).absolute()
    for folder in (path, *path.parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None


def in_units(count: int | None) -> str:
    """Bytes as people read them."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
