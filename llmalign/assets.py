"""Where the recipes, data specs, samples and launch configurations lie, in a checkout and in an installed wheel; and
where what was computed is kept for later runs."""

import os
from pathlib import Path

from llmalign.errors import UserError

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
