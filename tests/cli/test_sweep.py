"""`llmalign sweep`: everything is checked first, the cache is filled once, a broken run stops no other."""

import json
from pathlib import Path

import pytest

from llmalign import sweep as sweeping
from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.recipe import Recipe
from llmalign.sweep import best, parse_grid, plan, sweep


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"Describe {i}.", "chosen": f" What a lovely {i} it is.", "rejected": " No." * (i % 3 + 1)}
        for i in range(24)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method": "rpo",
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": str(data),
        "holdout_rows": 2,
        "eta": 0.5,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "max_length": 128,
        "alarm_prompts": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "grid"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return str(path)


def pretended(accuracy: float) -> dict:
    after = {"rows": 100.0, "rewards/accuracies": accuracy, "rewards/margins": 1.0, "drift/chosen": 0.1, "loss": 0.5}
    return {"after": after, "seconds": 3.0, "references": {"train": {"found": 1, "computed": 0, "seconds": 0.0}}}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that only pretend to train; the names of those that were started."""
    started: list[str] = []

    def run(recipe: Recipe, resume: str | None = None) -> dict:
        folder = Path(recipe.config["output_dir"])
        started.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(pretended(recipe.config["beta"])))
        return pretended(recipe.config["beta"])

    monkeypatch.setattr(sweeping, "run", run)
    return started


def test_a_grid_over_one_cache(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert main(["sweep", recipe, "beta=.05,1e-1,.3", "--learning_rate", "2e-3"]) == 0
    said = json.loads((tmp_path / "grid/sweep.json").read_text())
    runs = said["runs"]
    assert [run["name"] for run in runs] == ["beta=0.05", "beta=0.1", "beta=0.3"]
    assert [run["values"]["beta"] for run in runs] == [0.05, 0.1, 0.3]
    computed = [[report["computed"] for report in run["references"].values()] for run in runs]
    assert computed == [[44, 4], [0, 0], [0, 0]]
    assert all(run["status"] == "finished" and run["low"] <= run["accuracy"] <= run["high"] for run in runs)
    assert said["best"] in {run["name"] for run in runs}
    for run in runs:
        noted = json.loads((Path(run["output_dir"]) / "run.json").read_text())
        assert (noted["beta"], noted["learning_rate"]) == (run["values"]["beta"], 2e-3)
    shown = capsys.readouterr().out
    assert "Best by accuracy: beta=" in shown and shown.count("finished") == 3
    assert [m for m in caplog.messages if m.startswith("References")] == [
        f"References: looked up in {tmp_path / 'cache/reference'}; what is not there is scored by the first run that "
        "needs it."
    ]


def test_each_combination_once_in_order(recipe: str, runs: list[str]) -> None:
    entries = sweep(recipe, ["beta=.1,.2", "learning-rate=1e-4,1e-5"])
    assert runs == [entry.name for entry in entries]
    assert runs == [f"beta={b},learning_rate={r}" for b in (0.1, 0.2) for r in ("0.0001", "1e-05")]


@pytest.mark.parametrize(
    "grid, said",
    [
        (["beta=.1,-1"], "beta must be a positive"),
        (["beta=.1,much"], "`beta` takes a number"),
        (["bta=.1,.2"], "the nearest is `beta`"),
        (["beta=.1,"], "key=value1,value2"),
        (["beta"], "key=value1,value2"),
        (["beta=.1,1e-1"], "beta=0.1 twice"),
        (["beta=.1", "beta=.2"], "names `beta` twice"),
        (["output_dir=a,b"], "cannot be swept"),
        (["beta=.1", "--beta", "2"], "given twice"),
        (["dataset_name={weight: 1},x"], "path"),
        (["beta=.1,.2", "--streaming", "true", "--max_steps", "0", "--holdout_rows", "0"], "set `max_steps`"),
    ],
)
def test_a_bad_value_stops_everything(
    recipe: str, tmp_path: Path, runs: list[str], grid: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", recipe, *grid]) == 2
    assert said in capsys.readouterr().err
    assert not runs and not (tmp_path / "grid").exists()


def test_a_sweep_goes_on_where_it_was_killed(recipe: str, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend = sweeping.run

    def killed(recipe: Recipe, resume: str | None = None) -> dict:
        if len(runs) == 2:
            raise KeyboardInterrupt
        return pretend(recipe, resume)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(recipe, ["beta=.1,.2,.3"])
    entries = sweep(recipe, ["beta=.1,.2,.3"])
    assert runs == ["beta=0.1", "beta=0.2", "beta=0.3"]
    assert [entry.measured()["accuracy"] for entry in entries] == [0.1, 0.2, 0.3]


def test_finished_runs_of_another_recipe_are_not_taken_for_these(recipe: str, tmp_path: Path) -> None:
    assert main(["sweep", recipe, "beta=.05", "--max_steps", "1"]) == 0
    assert plan(recipe, ["beta=.05"], ["--max_steps", "1"])[0].status == "finished"
    with pytest.raises(UserError, match="max_steps 1 -> 2"):
        plan(recipe, ["beta=.05,.1"])


@pytest.mark.parametrize(
    "error", [UserError("no such luck"), pytest.param(RuntimeError("out of memory"), marks=pytest.mark.slow)]
)
def test_a_run_that_fails_is_reported_and_the_others_run(
    recipe: str,
    tmp_path: Path,
    runs: list[str],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend = sweeping.run

    def fails(recipe: Recipe, resume: str | None = None) -> dict:
        if recipe.config["beta"] == 0.2:
            raise error
        return pretend(recipe, resume)

    monkeypatch.setattr(sweeping, "run", fails)
    assert main(["sweep", recipe, "beta=.1,.2,.3"]) == 1
    said = json.loads((tmp_path / "grid/sweep.json").read_text())
    assert [run["status"] for run in said["runs"]] == ["finished", "failed", "finished"]
    assert str(error) in said["runs"][1]["error"] and said["best"] == "beta=0.3"
    assert "failed:" in capsys.readouterr().out
    monkeypatch.setattr(sweeping, "run", pretend)
    assert main(["sweep", recipe, "beta=.1,.2,.3"]) == 0
    assert runs == ["beta=0.1", "beta=0.3", "beta=0.2"]


def test_the_cache_is_used_unless_the_recipe_says_otherwise(recipe: str) -> None:
    def used(*overrides: str) -> bool | None:
        return plan(recipe, ["learning_rate=1e-4"], overrides)[0].recipe.config.get("precompute_ref_log_probs")

    assert used() is True
    assert used("--precompute_ref_log_probs", "false") is False
    assert used("--streaming", "true") is None


def test_values_that_hold_commas() -> None:
    grid = parse_grid(["lora_target_modules=[q_proj,v_proj],[k_proj]", "where={a: 1, b: 2}, {a: 2}"])
    assert grid == {"lora_target_modules": ["[q_proj,v_proj]", "[k_proj]"], "where": ["{a: 1, b: 2}", "{a: 2}"]}


def test_the_best_run_and_what_it_cannot_be_told_from(recipe: str, runs: list[str]) -> None:
    entries = sweep(recipe, ["beta=.2,.9,.95"])
    winner = best(entries)
    assert winner is not None and winner.name == "beta=0.95"
    caption = str(sweeping.table(entries).caption)
    assert "beta=0.95 (0.950; within its interval: beta=0.9)" in caption
    for entry in entries:
        entry.metrics = {}
    assert best(entries) is None and "none is the best" in str(sweeping.table(entries).caption)
