"""What rounds are refused for, each time in one sentence."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main
from tests.loop.running import Bench

JUDGE = {"oracle": "judge", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}


def test_two_processes_do_not_share_a_folder(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.output.mkdir()
    with (bench.output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bench.iterate() == 2
    assert "another process works in out; wait for it" in capsys.readouterr().err
    assert [path.name for path in bench.output.iterdir()] == [".lock"]


def test_another_run_s_folder_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.output / "checkpoint-3").mkdir(parents=True)
    assert bench.iterate() == 2
    assert "holds another run (checkpoint-3)" in capsys.readouterr().err
    assert not (bench.output / "loop.json").exists()


def test_a_file_where_the_folder_should_be_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.output.write_text("notes")
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert (
        "out" in said
        and said.count("llmalign: ") == 1
        and "Traceback" not in said
        and bench.output.read_text() == "notes"
    )


def test_a_recipe_of_one_kind_is_not_run_as_the_other(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bench.recipe_file)
    assert main(["train", path]) == 2
    assert f"names an oracle, so it is a recipe of several rounds: llmalign iterate {path}" in capsys.readouterr().err
    assert main(["iterate", "trainers/inpo/smoke.yaml"]) == 2
    assert "the recipe names no oracle: set oracle to one of preference_function," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"preference_function": "oracle.py:absent"}, "has no 'absent'"),
        ({"preference_function": "absent.py:preferred"}, "there is no file absent.py"),
        ({"preference_function": "nowhere.module:preferred"}, "there is no module 'nowhere.module'"),
        ({"preference_function": "math:dist"}, "math:dist"),
        ({"preference_function": "oracle.py:raises"}, "oracle.py:raises"),
        ({"preference_function": "oracle.py:short"}, "oracle.py:short gave 1 numbers for"),
        ({"preference_function": "oracle.py:beyond"}, "gave 1.5 for pair 0 of its call; P must lie in [0, 1]"),
        ({"oracle": "reward", "reward_funcs": ["oracle.py:raises"]}, "put the oracle right, and start"),
        ({"oracle": "preference_model", "preference_model": "/absent/model"}, "/absent/model"),
        ({"oracle": "reward", "reward_models": ["/absent/model"]}, "/absent/model"),
        ({"model_name_or_path": "/absent/model"}, "/absent/model"),
        ({"dataset_name": "/absent/prompts.jsonl"}, "/absent/prompts.jsonl"),
        ({"oracle_columns": ["word"]}, "word"),
        ({"max_length": 10}, "there are 0 prompts that fit"),
        ({"method": "dpo", "eta": None}, "use method: pair with loss: dpo"),
        ({**JUDGE, "judge_url": "localhost:8000"}, "http://"),
        ({**JUDGE, "judge_template": "no.txt"}, "no.txt"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_sentence(
    keys: dict[str, Any], sentence: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(**{"eval_samples": 1, **keys})
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("llmalign: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    "keys",
    [
        {"preference_function": "oracle.py:absent"},
        {"oracle": "preference_model", "preference_model": "/absent/model"},
        {"oracle": "reward", "reward_models": ["/absent/model"]},
        {**JUDGE, "judge_url": "localhost:8000"},
        {"model_name_or_path": "/absent/model"},
    ],
)
def test_what_is_not_there_is_found_before_anything_is_written(keys: dict[str, Any], bench: Bench) -> None:
    bench.write(**keys)
    assert bench.iterate() == 2
    assert not bench.output.exists() or not any(bench.output.iterdir())


def test_an_oracle_that_is_put_right_is_gone_on_with(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function that fails stops the run; mended, the same command goes on, and nothing else was lost."""
    path = bench.folder / "oracle.py"
    good = path.read_text()
    path.write_text(good.replace("0.9 if gap", "1.9 if gap"))
    bench.write(rounds=1, prompts_per_round=3)
    assert bench.iterate() == 2
    assert "P must lie in [0, 1]" in capsys.readouterr().err
    path.write_text(good)
    # A module that was imported is kept by the process, as no second command would.
    import sys

    for name in [name for name in sys.modules if name.startswith("llmalign_reward_oracle")]:
        del sys.modules[name]
    bench.run()


def test_an_oracle_that_cannot_judge_everything_goes_through(bench: Bench) -> None:
    """NaN for some pairs: they are left out and counted, in training, in win rates and in the gap."""
    bench.write(
        rounds=1, prompts_per_round=4, preference_function="oracle.py:sometimes", select="all_pairs", max_failed=0.9
    )
    told = bench.run()
    assert told["rounds"][1]["counts"]["judge"]["failed"] > 0
