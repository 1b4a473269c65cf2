"""What is found in folders and files, and what happens with what cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.report import collect
from tests.report.conftest import annotation, write

ROWS = [annotation(number, preference) for number, preference in enumerate([2.0, 2.0, 2.0, 1.0, 1.5, None])]


def test_a_run_with_its_evaluation(make_run: Callable[..., Path]) -> None:
    run = collect([make_run(rows=ROWS)])[0]
    assert (run.name, run.method, run.start, run.faults) == ("rpo", "rpo", "embedded:tiny", [])
    assert len(run.history) == 4 and len(run.rows) == 6
    # 3 wins, a tie and a loss of 5 judged: (3 + .5) / 5
    assert run.evaluation["winrate"]["win_rate"] == pytest.approx(70)
    assert run.evaluation["lengths"] == {"model": len("model answer 0"), "reference": len("reference answer 0")}


def test_what_evaluate_wrote_is_taken_as_it_is(make_run: Callable[..., Path]) -> None:
    folder = make_run(rows=ROWS)
    told = {"model": "tuned", "winrate": {"win_rate": 12.5, "n_total": 5}, "interval": {"low": 1, "high": 20}}
    write(folder / "evaluation" / "evaluation.json", told)
    run = collect([folder])[0]
    assert run.evaluation == told and run.faults == []


def test_judgements_that_do_not_belong_to_the_evaluation_are_named(make_run: Callable[..., Path]) -> None:
    folder = make_run(rows=ROWS)
    write(folder / "evaluation" / "evaluation.json", {"winrate": {"win_rate": 12.5, "n_total": 4}})
    (fault,) = collect([folder])[0].faults
    assert "4 judged rows" in fault and "has 5" in fault


def test_accuracy_alone_and_rows_beside_it(make_run: Callable[..., Path]) -> None:
    folder = make_run(rows=ROWS)
    write(folder / "evaluation" / "evaluation.json", {"winrate": None, "accuracy": {"mean": 0.6}})
    run = collect([folder])[0]
    assert run.evaluation["accuracy"] == {"mean": 0.6} and run.evaluation["winrate"]["n_wins"] == 3


def test_newest_checkpoint_stands_in_for_a_run_that_was_cut_off(make_run: Callable[..., Path]) -> None:
    folder = make_run(trainer_state=None)
    for step in (2, 10, 9):
        write(folder / f"checkpoint-{step}" / "trainer_state.json", {"log_history": [{"step": step, "loss": 1.0}]})
    assert collect([folder])[0].history == [{"step": 10, "loss": 1.0}]
    write(folder / "checkpoint-10" / "trainer_state.json", '{"log_hist')
    run = collect([folder])[0]
    assert run.history == [{"step": 9, "loss": 1.0}]
    assert len(run.faults) == 1 and "checkpoint-10" in run.faults[0]


def test_rounds_count_their_steps_through(tmp_path: Path) -> None:
    write(tmp_path / "it" / "rounds.json", {"method": "inpo", "rounds": [{"round": 0}, {"round": 1}, {"round": 2}]})
    for number in (1, 2, 10):
        steps = [{"step": step, "loss": float(number)} for step in (1, 2)]
        write(tmp_path / "it" / f"round-{number}" / "train" / "trainer_state.json", {"log_history": steps})
    run = collect([tmp_path / "it"])[0]
    assert [(entry["step"], entry["loss"]) for entry in run.history] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 10.0), (6, 10.0)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["run", "metrics", "trainer_state", "rounds", "reliability"])
@pytest.mark.parametrize("content", ['{"half": ', "[1, 2]", "\x00\x01", '"text"', "[" * 100_000])
def test_a_broken_file_is_named_and_the_rest_is_shown(
    make_run: Callable[..., Path],
    name: str,
    content: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_run(rows=ROWS, **{name: content})
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert f"{name}.json" in caplog.text and page.count(f"{name}.json") >= 1 and 'role="alert"' in page
    assert "70.0" in page  # the win rate is still there


@pytest.mark.parametrize(
    "content",
    [
        {"before": 3, "after": [1]}, {"after": {"x": "y", "rewards/accuracies": "high"}, "data": 7, "seconds": "long"},
        {"steps": None, "seconds": float("inf"), "before": {}, "after": {"held_rows": 0, "held_rewards/accuracies": 2}},
        {"steps": 10**400, "after": {"held_rewards/accuracies": float("nan")}, "data": {"train": []}},
    ],
)  # fmt: skip
def test_values_of_other_kinds_break_nothing(make_run: Callable[..., Path], content: Any, tmp_path: Path) -> None:
    rounds = {"rounds": [3, {"round": "one", "kl": 4}, {"round": 1, "reward": {"mean": float("nan")}}]}
    evaluation = {
        "winrate": [1],
        "interval": 3,
        "per_dataset": {"a": 1},
        "lengths": None,
        "judge": "me",
        "versions": [],
    }
    state = {"log_history": [7, {"step": "x"}, {"step": 1, "loss": float("nan"), "reward": "good", "kl": None}]}
    folder = make_run(metrics=content, rounds=rounds, trainer_state=state, evaluation=evaluation)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "NaN" not in (tmp_path / "page.html").read_text(encoding="utf-8").split("<script")[0]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a" / "rpo" / "run.json", {"method": "rpo"}).parent,
        write(tmp_path / "b" / "rpo" / "run.json", {"method": "rpo"}).parent,
        write(tmp_path / "a" / "rpo" / "evaluation" / "annotations.json", ROWS),
        write(tmp_path / "tuned.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
    ]
    assert [run.name for run in collect(paths)] == ["a/rpo (1)", "b/rpo", "a/rpo (3)", "tuned"]


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "page.html")]) == 2
    assert "nothing to report" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    broken = write(tmp_path / "annotations.json", '[{"instruction": "a"}]')
    with pytest.raises(UserError, match="row 0 of .* has no 'output_1'"):
        collect([broken])
    with pytest.raises(UserError, match="is not there"):
        collect([tmp_path / "absent"])
    run = write(tmp_path / "run" / "run.json", {"method": "dpo"}).parent
    with pytest.raises(UserError, match="named twice"):
        collect([run, tmp_path / "empty" / ".." / "run"])
    assert "nothing that a report shows" in collect([run, tmp_path / "empty"])[1].faults[0]


def test_wrong_calls(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make_run())
    assert main(["report", folder, "--nonsense", "1"]) == 2
    assert main(["report", folder, "--max_rows", "0"]) == 2
    assert main(["report", folder, "--out", str(tmp_path)]) == 2
    assert main(["report", folder, "--out", str(write(tmp_path / "file", "") / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_image_rows_stay_inside_of_their_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.png", "x")
    row = {"prompt": "a fox", "images": ["../secret.png", "a.png", str(tmp_path / "secret.png")]}
    write(tmp_path / "samples" / "images.jsonl", json.dumps(row) + "\n" + json.dumps({"prompt": 3, "images": []}))
    write(tmp_path / "samples" / "a.png", "x")
    run = collect([tmp_path / "samples"])[0]
    assert [path.name for path in run.pictures[0].images] == ["a.png"]
    assert "names 2 images" in run.faults[0] and "row 1" in run.faults[1]


def test_real_runs_of_rounds_and_of_reliability(tmp_path: Path, repository: Path) -> None:
    from llmalign.report.page import render
    from llmalign.rewards.reliability import as_dict, reliability

    data = json.loads((repository / "tests" / "data" / "reliability.json").read_text(encoding="utf-8"))
    result = reliability(data["rewards"], data["scores"], n_groups=data["n_groups"], resamples=50)
    run = collect([write(tmp_path / "reliability.json", as_dict(result))])[0]
    page = render([run])
    assert f"{result.recommended} (recommended)" in page and f"{result.strategies[0].r2.value:.2f} [" in page
