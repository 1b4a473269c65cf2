"""What the tests of rounds share: a collector that has little to look through, and a folder with a recipe in it."""

import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.loop.running import Bench


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Every stage collects garbage: what libraries and earlier tests made, most of all objects, is left out of that."""
    import_module("llmalign.loop.plan")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: what they show is tested elsewhere, and they take longer than all else of a tiny run."""
    monkeypatch.setattr("llmalign.train._draw", lambda *args, **kwargs: None)
    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("llmalign.loop.iterate"), "plot_rounds", lambda *args: None)


@pytest.fixture
def bench(tmp_path: Path, tiny_model_dir: Path, plain: None) -> Bench:
    """A recipe of two rounds, of the smallest size in which everything happens."""
    return Bench(tmp_path, tiny_model_dir)
