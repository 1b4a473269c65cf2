"""AlpacaEval's constants for length control: the difficulty of each instruction, and baselines made to win by length.

They belong to their authors (CC BY-NC 4.0) and are not part of this package: they come from a file or from the Hub.
"""

import csv
import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row
from llmalign.evaluation.length_control import Array, Gamed

REPOSITORY, REVISION = "tatsu-lab/alpaca_eval", "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
HUB_FILE = "df_gamed.csv"
KEYS = ("difficulty", "gamed_std_delta_len", "gamed_index", "gamed_preference")
HASHES = "alpaca_eval_instructions.txt"
_HASH = re.compile(r"[0-9a-f]{12}")
_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Constants:
    """`difficulty` (805,) by AlpacaEval's number of an instruction, and the gamed rows."""

    difficulty: Array
    gamed: Gamed


class InstructionIndex:
    """From a row to the number of its instruction among AlpacaEval's 805, None where it is not one of them.

    By the instruction's text, by the first 12 hexadecimal digits of its SHA-1 in the text's place, or by
    `instruction_id`.
    """

    def __call__(self, row: Row) -> int | None:
        """The instruction's number."""
        text = row["instruction"]
        if isinstance(text, str):
            name = text if _HASH.fullmatch(text) else hashlib.sha1(text.encode("utf-8", "replace")).hexdigest()[:12]
            if name in self.known:
                return self.known[name]
        number = row.get("instruction_id")
        usable = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.known)
        return number if usable else None

    @cached_property
    def known(self) -> dict[str, int]:
        """The numbers by hash; the texts themselves are not part of this package."""
        lines = (files("llmalign.evaluation") / HASHES).read_text(encoding="ascii").split()
        return {name: number for number, name in enumerate(lines)}


instruction_index = InstructionIndex()


def load_constants(path: Path | str | None = None) -> Constants:
    """The constants from a .json or .json.gz file, or else from the Hub's data set, at one revision.

    Raises UserError where the file lacks something, and where the Hub cannot be reached.
    """
    return _from_json(Path(path)) if path is not None else _from_csv(_fetch())


def _from_json(path: Path) -> Constants:
    try:
        raw = path.read_bytes()
        content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"the constants in {path} cannot be read: {error}") from error
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"the constants in {path} lack {missing[0]!r}; they have {', '.join(KEYS)}")
    return _constants(*(content[key] for key in KEYS), source=str(path))


def _from_csv(path: Path) -> Constants:
    """The Hub's table: a gamed row a line, with its instruction's number and difficulty."""
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    try:
        by_number = {int(float(row["index"])): float(row["instruction_difficulty"]) for row in rows}
        columns = [[float(row[name]) for row in rows] for name in ("std_delta_len", "index", "preference")]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{HUB_FILE} of {REPOSITORY} has another form than expected ({error})") from error
    return _constants([by_number[number] for number in sorted(by_number)], *columns, source=HUB_FILE)


def _constants(difficulty: Any, lengths: Any, index: Any, preferences: Any, *, source: str) -> Constants:
    try:
        values, places = np.array(difficulty, dtype=float), np.array(index, dtype=float).astype(int)
        gamed = Gamed(np.tanh(np.array(lengths, dtype=float)), values[places], np.array(preferences, dtype=float))
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"the constants in {source} do not fit together: {error}") from error
    arrays = (values, gamed.lengths, gamed.difficulty, gamed.preferences)
    same = len(gamed.lengths) == len(gamed.difficulty) == len(gamed.preferences)
    if len(values) != len(instruction_index.known) or not same or not all(np.isfinite(one).all() for one in arrays):
        raise UserError(
            f"the constants in {source} are not AlpacaEval's: they need {len(instruction_index.known)} difficulties "
            "and as many gamed lengths as preferences, all finite"
        )
    return Constants(values, gamed)


def _fetch() -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    unreachable: Any = (OSError, *HfHubHTTPError.__bases__)  # of whichever HTTP library lies below
    cached = try_to_load_from_cache(REPOSITORY, HUB_FILE, repo_type="dataset", revision=REVISION)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Asked once before: the download would try again and again for half a minute where there is no network.
        url = hf_hub_url(REPOSITORY, HUB_FILE, repo_type="dataset", revision=REVISION)
        get_hf_file_metadata(url, timeout=_TIMEOUT)
        return Path(hf_hub_download(REPOSITORY, HUB_FILE, repo_type="dataset", revision=REVISION))
    except unreachable as error:
        raise UserError(
            f"AlpacaEval's constants cannot be fetched from the data set {REPOSITORY} ({type(error).__name__}); name a "
            "file with --constants, or do without difficulties with --no_constants"
        ) from error
