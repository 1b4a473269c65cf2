"""Outputs that are there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from llmalign.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def folder_aside(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` to write into, renamed to it at the end and removed where something is raised.

    With `overwrite` the folder that is there is replaced at the end. Raises UserError as `require_room` does, and where
    nothing can be written; errors of reading, elsewhere, are passed on.
    """
    require_room(target, overwrite=overwrite)
    target = target.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        with _said(target):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        with _said(target, inside=aside):
            yield aside
        with _said(target):
            if target.exists():
                os.rename(target, old)
            os.rename(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)


def require_room(target: Path, *, overwrite: bool = False, sources: Sequence[str | None] = ()) -> None:
    """Raise UserError where `target` is a file, a folder that holds something and is not to be overwritten, or one that
    holds the working folder or one of the `sources`, whether or not it may be overwritten."""
    if target.is_file():
        raise UserError(f"--out {target} is a file; name a folder.")
    own = target.resolve()
    if Path.cwd().is_relative_to(own):
        raise UserError(f"--out {target} holds the folder that this command runs in; name another.")
    for source in sources:
        path = None if source is None else Path(source).expanduser()
        if path is not None and path.exists() and path.resolve().is_relative_to(own):
            raise UserError(f"--out {target} holds {source}, which the result is made from; name another folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"--out {target} is not empty; give --overwrite to replace it, or another --out.")


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end and removed where something is raised.

    Raises UserError for a target that is a folder, and where nothing can be written; errors of reading, elsewhere, are
    passed on.
    """
    require_file(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _said(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with _said(target, inside=aside):
            yield aside
        with _said(target):
            os.replace(aside, target)
    finally:
        with suppress(OSError):  # what cannot be written to has nothing to remove
            aside.unlink(missing_ok=True)


def require_file(target: Path) -> None:
    """Raise UserError where `target` is a folder."""
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; name a file.")


@contextmanager
def _said(target: Path, *, inside: Path | None = None) -> Iterator[None]:
    """Say that `target` cannot be written; with `inside` only where an error is of that path, or of a full disk."""
    try:
        yield
    except SafetensorError as error:
        if inside is not None and "I/O error" not in str(error):
            raise
        raise UserError(f"{target} cannot be written: {error}.") from error
    except OSError as error:
        if inside is not None and error.errno not in _NO_SPACE and not _is_of(error, inside):
            raise
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error


def _is_of(error: OSError, inside: Path) -> bool:
    return isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(inside)
