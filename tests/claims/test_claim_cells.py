"""Cells: computed once, found again by settings and code, never read when torn."""

import json
from pathlib import Path

import pytest
from claims.cells import Cell, Store, code_version, write_atomically
from claims.report import interval, values

CELL = Cell("claim", "method", 3, {"lr": 1e-3})


class Experiment:
    """Counts how often it runs; each run gives another answer."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, cell: Cell) -> dict:
        self.runs += 1
        return {"answer": self.runs, "seed": cell.seed}


def test_a_cell_is_not_run_twice(tmp_path: Path) -> None:
    experiment = Experiment()
    first = Store(tmp_path).run(CELL, "code", experiment)
    second = Store(tmp_path).run(CELL, "code", experiment)
    assert experiment.runs == 1
    assert first == second
    assert second["result"] == {"answer": 1, "seed": 3}
    assert second["cell"] == {"claim": "claim", "method": "method", "seed": 3, "setting": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        (Cell("claim", "method", 4, {"lr": 1e-3}), "code"),
        (Cell("claim", "method", 3, {"lr": 2e-3}), "code"),
        (Cell("claim", "other", 3, {"lr": 1e-3}), "code"),
        (CELL, "other code"),
    ],
)
def test_another_seed_setting_method_or_code_is_another_cell(tmp_path: Path, cell: Cell, code: str) -> None:
    experiment = Experiment()
    store = Store(tmp_path)
    store.run(CELL, "code", experiment)
    assert store.run(cell, code, experiment)["result"]["answer"] == 2


@pytest.mark.parametrize("torn", ["", '{"cell": {"claim": "cl', '{"cell": {}, "code": "code"}', "[1, 2"])
def test_a_torn_file_is_computed_again(tmp_path: Path, torn: str) -> None:
    experiment = Experiment()
    store = Store(tmp_path)
    store.run(CELL, "code", experiment)
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(torn)
    assert store.run(CELL, "code", experiment)["result"]["answer"] == 2
    assert json.loads(kept.read_text())["result"]["answer"] == 2


def test_a_failed_experiment_leaves_nothing(tmp_path: Path) -> None:
    def fails(cell: Cell) -> dict:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        Store(tmp_path).run(CELL, "code", fails)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_result_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).run(CELL, "code", lambda cell: {"loss": float("nan")})
    assert not list(tmp_path.rglob("*.json"))


def test_a_model_is_built_once_and_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    built = []

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "whole").write_text("x")

    with pytest.raises(RuntimeError, match="killed"):
        store.model(CELL, "code", breaks)
    path = store.model(CELL, "code", build)
    assert store.model(CELL, "code", build) == path
    assert len(built) == 1
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_code_version_sees_what_is_computed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "experiment.py"

    def version(text: str) -> str:
        path.write_text(text)
        return code_version([path])

    plain = version("STEP = 1\ndef f(x):\n    return x + STEP\ndef judge(r):\n    return r\n")
    assert plain == version(
        '"""A page."""\nSTEP = 1  # why\ndef f(x):\n    """Doc."""\n    return x + STEP\ndef judge(r):\n    return 2\n'
    )
    assert plain != version("STEP = 1\ndef f(x):\n    return x - STEP\ndef judge(r):\n    return r\n")
    assert plain != version("STEP = 2\ndef f(x):\n    return x + STEP\ndef judge(r):\n    return r\n")


def test_interval_is_students() -> None:
    # 1, 2, 3: deviation 1, t(2) = 4.303, so half = 4.303 / sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.303 / 3**0.5)
    assert interval([5.0]).text(1) == "5.0 [5.0, 5.0]"
    with pytest.raises(ValueError, match="1 to 30"):
        interval([])


def test_values_picks_by_method_and_setting_in_order_of_seed() -> None:
    records = [
        {"cell": {"method": m, "seed": s, "setting": {"rate": r}}, "result": {"x": f"{m}{s}{r}"}}
        for m in "ab"
        for s in (2, 1)
        for r in (0.0, 0.4)
    ]
    assert values(records, "x", method="a", rate=0.4) == ["a10.4", "a20.4"]
