"""What the tests of rounds share: a collector that has little to look through, and a folder with a recipe in it."""

import gc
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.loop.running import Bench

#: all pairs of a round in one step, whose numbers are logged
ONE_BATCH = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1}


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
    monkeypatch.setattr("llmalign.loop.rounds.plot_rounds", lambda *args: None)


@pytest.fixture
def bench(tmp_path: Path, tiny_model_dir: Path, plain: None) -> Bench:
    """A recipe of two rounds, of the smallest size in which everything happens."""
    return Bench(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run of two rounds that is over; tests look at it and change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("finished")
        patch.setenv("ORACLE_LOG", str(folder / "asked.log"))
        bench = Bench(folder, tiny_model_dir)
        bench.write(**ONE_BATCH)
        assert bench.iterate() == 0
        return bench


@pytest.fixture
def again(finished: Bench, tmp_path: Path, plain: None) -> Bench:
    """A copy of the finished run, to be spoilt and gone on from."""
    bench = Bench(tmp_path / "again", finished.model)
    shutil.copytree(finished.output, bench.output)
    bench.write(**ONE_BATCH)
    return bench
