"""Where the recipes, data specs, samples and launch configurations lie, in a checkout and in an installed wheel; and
where what was computed is kept for later runs."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """Folder that holds `trainers/`, `data/` and `accelerate_configs/`.

    The build puts copies under `llmalign/_assets`; a checkout or an editable install
    has the folders beside the package.
    """
    packaged = PACKAGE / "_assets"
    return packaged if packaged.is_dir() else PACKAGE.parent


def path(relative: str) -> Path:
    """Path of one shipped file or folder, such as `data/samples/pairs.jsonl`.

    Raises UserError when nothing of that name is shipped.
    """
    found = root() / relative
    if not found.exists():
        raise UserError(f"{relative} is not shipped with llmalign (looked in {root()}).")
    return found


def cache_folder() -> Path:
    """What is worth keeping between runs: the environment variable LLMALIGN_CACHE, else ~/.cache/llmalign."""
    chosen = os.environ.get("LLMALIGN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "llmalign"


def content_key(sources: Iterable[Path], *libraries: Any) -> str:
    """Sixteen hex digits that change with the source files and with the versions of the libraries (modules)."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    for library in libraries:
        digest.update(f"{library.__name__} {library.__version__}\n".encode())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def ensure_folder(name: str, build: Callable[[Path], object], said: str, takes: str) -> Path:
    """The folder `name` in the cache, filled by `build(folder)` on first use and found there afterwards.

    The build happens aside and is renamed into place, so a reader never sees half of it; of several processes that
    build at once the first one wins and the others take its copy. `said` and `takes` are what the log calls it, and how
    long it says that it takes.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    logger.info("Building %s in %s (once, %s).", said, target, takes)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(aside)
        os.replace(aside, target)
    except OSError:
        if not target.is_dir():
            raise
        logger.info("Another process built %s first; its copy is used.", target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
