"""Which names are of the Hub and which are of this machine."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llmalign.errors import UserError

DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".txt")


def loads_elsewhere(name: str) -> bool:
    """Whether others may load a model by this name: a well-formed one on the Hub that is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith("runs/") and not Path(name).exists()


def is_hub_name(name: str) -> bool:
    """Whether a name is user/name on the Hub and no file or folder of this machine."""
    return "/" in name and Path(name).suffix not in DATA_SUFFIXES and loads_elsewhere(name)


def check_base(base: str | None) -> None:
    """Raises UserError for a --base that is a folder here or cannot be a name on the Hub; None is none."""
    if base is not None and not loads_elsewhere(base):
        raise UserError(
            f"--base {base} is no name on the Hub, or is a folder here: give the base's own, such as user/name"
        )
