"""What attacks are aimed at."""

import subprocess
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def witness() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user's, outside, with a secret in its environment."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"SECRET": "hunter2"})
    yield process
    assert process.poll() is None, "it was killed"
    process.kill()
    process.wait()
