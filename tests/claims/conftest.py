"""The claims live in scripts/, which is no package of the project: its folder is put on the path here."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.rewards.sandbox.choice import find_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))


LEVEL = logging.getLogger("llmalign").level


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A claim's command is quiet; tests that come after it in the same process read the log."""
    yield
    logging.getLogger("llmalign").setLevel(LEVEL)


@pytest.fixture
def some_backend() -> str:
    """The sandbox that programs are run in; a test that needs one is skipped, with the reason, where there is none."""
    try:
        return find_backend().name
    except UserError as error:
        pytest.skip(str(error))
