"""Runs a case through the command line in this process, and looks at what it leaves behind."""

import contextlib
import gc
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open

from llmalign.cli import main
from tests.fuzz.strategies import ALWAYS, Case

REWARD = "def reward(prompts, completions, **columns):\n    return [float(len(str(text))) for text in completions]\n"


@dataclass(frozen=True)
class Outcome:
    """What a command answered and said."""

    status: int
    said: str


def run(case: Case, folder: Path) -> Outcome:
    """Write the case's files into an empty `folder`, run it there and return what became of it; library errors pass."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(case.recipe, encoding="utf-8")
    (folder / case.data_name).write_bytes(case.data)
    for name, picture in case.pictures:
        (folder / name).write_bytes(picture)
    (folder / "reward.py").write_text(REWARD)
    words = ["train", "recipe.yaml", *case.words]
    given = set(case.words)
    words += [word for key, value in ALWAYS.items() if f"--{key}" not in given for word in (f"--{key}", value)]
    said = io.StringIO()
    environment, here = dict(os.environ), Path.cwd()
    os.chdir(folder)
    _forget()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = main(words)
    except SystemExit as end:  # argparse's own refusals
        status = end.code if isinstance(end.code, int) else 2
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()
    return Outcome(status, said.getvalue())


def _forget() -> None:
    """Let the next run choose precision and device anew: accelerate keeps them for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def half_written(folder: Path) -> list[str]:
    """What in a folder is not whole: temporary files, JSON and weights cut off."""
    faults = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".tmp", ".part")) or path.name == "_incomplete":
            faults.append(f"{path} was left behind")
        elif path.suffix == ".json" and path.parent != folder:
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                faults.append(f"{path}: {error}")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.suffix == ".yaml" and path.parent != folder:
            yaml.safe_load(path.read_text(encoding="utf-8"))
    return faults
