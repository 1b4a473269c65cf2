"""Whatever a recipe and a data set hold, `llmalign train` trains or says in one sentence of its own what is wrong."""

import collections
import logging
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.fuzz.running import half_written, run
from tests.fuzz.strategies import Case, cases
from tests.trainers import tiny

#: no shrinking: a case takes as long as a run, and is printed whole
SETTINGS = {
    "database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    logging.getLogger("llmalign").setLevel(logging.NOTSET)


def check(case: Case, folder: Path) -> int:
    """Run a case; its exit status. A library's error passes through and fails the test with its traceback."""
    try:
        outcome = run(case, folder)
    except BaseException as error:
        error.add_note(f"{case.words}\n{case.recipe}\n{case.data[:2000]!r}")
        raise
    about = f"{case.words}\n{case.recipe}\n{case.data[:2000]!r}\n{outcome.said[-3000:]}"
    assert outcome.status in (0, 2), about
    assert "Traceback" not in outcome.said, about
    if outcome.status == 2:
        assert any(
            line.startswith(("llmalign: ", "llmalign train: error: ")) and len(line) > 20
            for line in outcome.said.splitlines()
        ), about
        assert not (folder / "run" / "metrics.json").exists(), about
    else:
        assert (folder / "run" / "metrics.json").is_file(), about
    assert not half_written(folder), (half_written(folder), about)
    assert not (folder / "it-ran").exists(), about
    return outcome.status


def fuzz(count: int, folder: Path, *, derandomize: bool) -> collections.Counter[int]:
    """Run this many different cases; how often each exit status came."""
    model = tiny.save(folder / "model")
    found: collections.Counter[int] = collections.Counter()
    seen: set[Case] = set()

    @settings(max_examples=count, derandomize=derandomize, **SETTINGS)
    @given(cases(model))
    def one(case: Case) -> None:
        assume(case not in seen)  # hypothesis draws much again that it drew before
        found[check(case, folder / "case")] += 1
        seen.add(case)

    one()
    return found


def test_some_recipes_and_data_sets(tmp_path: Path) -> None:
    found = fuzz(6, tmp_path, derandomize=True)
    assert sum(found.values()) == 6


@pytest.mark.slow
def test_two_thousand_recipes_and_data_sets(tmp_path: Path) -> None:
    found = fuzz(2000, tmp_path, derandomize=False)
    assert sum(found.values()) == 2000
    assert found[0] >= 200, f"nearly all are refused, so that little is tried: {found}"
