"""Cells: one (claim, method, setting, seed) each, computed once, kept as JSON, found again by settings and code."""

import ast
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

Result = dict[str, Any]
REPORTING = frozenset({"cells", "judge", "CLAIM", "LABELS"})


@dataclass(frozen=True)
class Cell:
    """One run of one method; with the seed and the code, `setting` holds every number that its result depends on."""

    claim: str
    method: str
    seed: int
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:]
    return tree


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


def _reports(statement: ast.stmt) -> bool:
    return any(name in REPORTING or name.startswith("_report") for name in _names(statement))


def code_version(files: Iterable[Path]) -> str:
    """Hash of what the Python `files` compute: of their syntax trees, without docstrings and without reporting.

    Comments and layout do not count, nor do top-level names in REPORTING or that begin with `_report`: they pick cells,
    whose settings count by themselves, and describe results.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: (p.name, str(p))):
        digest.update(path.name.encode())
        tree = _without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
        tree.body = [statement for statement in tree.body if not _reports(statement)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def package_files(name: str) -> list[Path]:
    """The Python files of an importable package, without its subpackages."""
    origin = importlib.util.find_spec(name).origin
    return sorted(Path(origin).parent.glob("*.py"))


class Store:
    """The folder where results and models of cells are kept; a file that is torn or of other code is not used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, cell: Cell, code: str, suffix: str) -> Path:
        key = hashlib.sha256(json.dumps({**asdict(cell), "code": code}, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "cells" / cell.claim / f"{cell.name}-{key}{suffix}"

    def load(self, cell: Cell, code: str) -> Result | None:
        """The kept record of this cell, or None where there is none or where it cannot be read."""
        path = self._path(cell, code, ".json")
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("%s is torn and is computed again.", path)
            return None
        if not {"cell", "code", "result"} <= record.keys():
            logger.warning("%s lacks its cell, code or result and is computed again.", path)
            return None
        return record

    def run(self, cell: Cell, code: str, experiment: Callable[[Cell], Result]) -> Result:
        """The cell's record (cell, code, result, seconds, torch version); runs the experiment where none is kept."""
        kept = self.load(cell, code)
        if kept is not None:
            return kept
        wall, cpu = time.perf_counter(), _cpu_seconds()
        result = experiment(cell)
        record = {
            "cell": asdict(cell),
            "code": code,
            "result": result,
            "wall_seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(_cpu_seconds() - cpu, 2),
            "torch": torch.__version__,
        }
        write_atomically(self._path(cell, code, ".json"), json.dumps(record, allow_nan=False))
        # What was read back is what a later run sees: tuples are lists, keys are strings.
        return json.loads(json.dumps(record))

    def model(self, cell: Cell, code: str, build: Callable[[Path], None]) -> Path:
        """The folder that `build` filled for this cell, built aside and renamed: a folder in place is a whole one.

        Of several processes one builds, and the others wait for it.
        """
        path = self._path(cell, code, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if path.exists():
                return path
            aside = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            build(aside)
            aside.rename(path)
        return path


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended: sandboxes are such."""
    return sum(os.times()[:4])


def write_atomically(path: Path, text: str) -> None:
    """Write aside, flush to the disk and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
