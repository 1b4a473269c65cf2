"""What the Hub's tests share: a local Hub, commands in a process that knows it, and a run to push."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmalign.embedded import ensure_tiny
from tests.hub.server import WRITER, LocalHub

# Commands and Python in one process, because the client reads its settings when it is imported.
DRIVER = """
import contextlib, io, json, logging, sys
from llmalign.cli import main
results = []
for one in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if isinstance(one, str):
            exec(one, {})
            status = 0
        else:
            logging.getLogger().handlers.clear()
            status = main(one)
    results.append([status, out.getvalue(), err.getvalue()])
print("RESULTS" + json.dumps(results))
"""
Result = tuple[int, str, str]


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    served = LocalHub()
    yield served
    served.close()


@pytest.fixture
def drive(hub: LocalHub, tmp_path: Path) -> Callable[..., list[Result]]:
    """Runs commands (lists of words) and pieces of Python with a token, and gives status, output and errors of each."""

    def run(*commands: Any, token: str | None = WRITER) -> list[Result]:
        known = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
        }
        settings = {
            **known, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "LLMALIGN_CACHE": str(ensure_tiny().parent), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], env=settings if token is None else {**settings, "HF_TOKEN": token},
            input=json.dumps(commands), capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return [tuple(one) for one in json.loads(done.stdout.rsplit("RESULTS", 1)[1])]

    return run


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run's folder: the embedded model with records that hold a secret and paths, checkpoints and a pickle."""
    folder = tmp_path / "secret-place" / "rpo"
    shutil.copytree(ensure_tiny(), folder)
    recipe = {
        "method": "rpo", "beta": 0.1, "eta": 0.5, "hub_token": "hf_verysecret", "output_dir": str(folder), "seed": 42,
        "model_name_or_path": str(tmp_path / "secret-place" / "start"), "dataset_name": "trl-lib/some-pairs",
        "learning_rate": 1e-5,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(recipe))
    measured = {"method": "rpo", "steps": 6, "output_dir": str(folder), "before": {"loss": 2.0}, "after": {"loss": 1.5}}
    (folder / "metrics.json").write_text(json.dumps(measured))
    (folder / "curves.png").write_bytes(b"\x89PNG")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"state")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "annotations.json").write_text("[]")
    return folder
