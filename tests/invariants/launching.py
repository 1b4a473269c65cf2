"""What tests that launch several processes share."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmalign.deepspeed_ops import path_with_ninja

ROOT = Path(__file__).parents[2]
#: mark of a quick test under DeepSpeed
WITH_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'llmalign[deepspeed]'"
)
#: marks of a test under DeepSpeed that takes minutes
NEEDS_DEEPSPEED = (pytest.mark.slow, WITH_DEEPSPEED)


def environment() -> dict[str, str]:
    """That of launched processes: this checkout, one thread each, DeepSpeed on the CPU, and one ninja for all."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path_with_ninja()}
    return os.environ | own


@functools.cache
def build_ops(*, offload: bool = False) -> None:
    """Let DeepSpeed's operations be compiled, once for all tests; seconds where they are there."""
    command = [sys.executable, "-m", "llmalign.deepspeed_ops", *(["--offload"] if offload else [])]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"DeepSpeed's operations cannot be compiled here: {done.stderr.strip().splitlines()[-1]}")
