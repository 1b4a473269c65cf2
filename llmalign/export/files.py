"""Outputs that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmalign.errors import UserError


@contextmanager
def folder_aside(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` to write into, renamed to it at the end and removed where something is raised.

    With `overwrite` the folder that is there is replaced at the end. Raises UserError for a target that is a file or
    holds something, and where nothing can be written.
    """
    require_room(target, overwrite=overwrite)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)


def require_room(target: Path, *, overwrite: bool = False) -> None:
    """Raise UserError where `target` is a file, or a folder that holds something and is not to be overwritten."""
    if target.is_file():
        raise UserError(f"--out {target} is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"--out {target} is not empty; give --overwrite to replace it, or another --out.")


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end and removed where something is raised.

    Raises UserError for a target that is a folder, and where nothing can be written.
    """
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; name a file.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        aside.unlink(missing_ok=True)
