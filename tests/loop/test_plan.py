"""What a run will take, counted ahead; and nothing of it done."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from llmalign.loop.config import LoopConfig
from llmalign.loop.plan import Part, Plan, plan, plan_table
from llmalign.recipe import load_recipe
from tests.loop.running import BY_REWARD, Bench, everything


def parts_of(bench: Bench, **keys: Any) -> dict[str, Part]:
    bench.write(**keys)
    with contextlib.chdir(bench.folder):
        parts = plan(load_recipe(bench.recipe_file, loop=LoopConfig)).parts
    return {part.name: part for part in reversed(parts)}  # of two with one name the first


def mean_prompt(bench: Bench) -> int:
    """Tokens of a prompt; all of them are tried."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    rows = [json.loads(line) for line in (bench.folder / "prompts.jsonl").read_text().splitlines()]
    return sum(len(tokenizer(row["prompt"])["input_ids"]) for row in rows) // len(rows)


def test_everything_is_counted_as_by_hand(bench: Bench) -> None:
    """Two rounds of 4 prompts x 4 completions x 6 tokens; three measurements of 3 prompts x 1 completion.

    A tournament of four takes 5 comparisons, a round is measured against two others: 8 x 5 + 2 x 2 x 3 = 52. A pair a
    prompt, under two models: 8 x (prompt + 12) x 2, and the answers of each measurement under two.
    """
    found = parts_of(bench, eval_samples=1)
    prompt = mean_prompt(bench)
    amounts = {name: (part.amount, part.unit) for name, part in found.items()}
    assert amounts["sample"] == (2 * 4 * 4 * 6, "tokens") and amounts["evaluate"] == (3 * 3 * 6, "tokens")
    assert amounts["judge"] == (52, "comparisons")
    assert amounts["train"] == (8 * (prompt + 12) * 2, "tokens")
    pairs, measured = 8 * (prompt + 12) * 2, 3 * 3 * 6 * 2
    assert pairs + 2 * 2 * 3 * 6 <= amounts["cache"][0] <= pairs + measured + 3 * 3 * 2 * (prompt + 1)
    assert all(part.seconds is not None and part.seconds > 0 for part in found.values())


@pytest.mark.parametrize(
    ("keys", "judged", "rows"),
    [
        ({"select": "all_pairs"}, 8 * 6, 8 * 6),
        ({"select": "independent"}, 8 * 2, 8 * 2),
        ({"select": "best_random"}, 8 * 4, 8),
        ({"both_orders": True}, 2 * 8 * 5, 8),
    ],
)
def test_other_selections_take_other_numbers(
    keys: dict[str, Any], judged: int, rows: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parts_of(bench, eval_samples=1, **keys)
    assert found["judge"].amount == judged + 12 * (2 if "both_orders" in keys else 1)
    assert found["train"].amount == rows * (mean_prompt(bench) + 12) * 2


def test_rewards_are_one_an_answer_and_a_group_is_trained_on_whole(bench: Bench) -> None:
    found = parts_of(bench, method="copg", eta=None, beta=0.5, eval_samples=1, **BY_REWARD)
    # Of every answer that is trained on, and of every one that is measured, the start's too.
    assert found["judge"].unit == "rewards" and found["judge"].amount >= 2 * 4 * 4 + 3 * 3
    assert found["train"].amount == 8 * (mean_prompt(bench) + 4 * 6) * 2


@pytest.mark.parametrize("keys", [{}, pytest.param(BY_REWARD, marks=pytest.mark.slow)])
def test_no_run_takes_more_than_was_planned(
    keys: dict[str, Any], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged when rounds are measured counts too: win rates, rewards, and the gap that an exact oracle has.

    The steps are large, so that every round answers in other words than the one before.
    """
    size = {"prompts_per_round": 2, "samples_per_prompt": 2, "eval_samples": 4, "learning_rate": 0.05}
    planned = parts_of(bench, **size, **keys)
    monkeypatch.setenv("ORACLE_LOG", str(tmp_path / "asked.log"))
    bench.run()
    calls = [json.loads(line) for line in (tmp_path / "asked.log").read_text().splitlines()]
    for name in ("sample", "cache"):
        spent = sum(bench.manifest(number, name)["cost"]["tokens"] for number in (1, 2))
        assert 0 < spent <= planned[name].amount, name
    assert 0 < sum(len(prompts) for _, prompts, *_ in calls) <= planned["judge"].amount


def test_the_command_prints_the_plan_and_writes_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.iterate("--dry-run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 rounds of 4 prompts x 4 completions: 32 generations, 40 comparisons, at most 8 pairs" in text
    for stage in ("sample", "judge", "cache", "train", "evaluate", "all"):
        assert f" {stage} " in text
    assert not bench.output.exists()


def test_of_a_run_that_has_begun_what_is_left_is_counted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"eval_prompts": 1, "eval_samples": 1, "prompts_per_round": 3, "num_train_epochs": 1, "save_steps": 500}
    bench.write(**size, rounds=1)
    bench.run()
    before = everything(bench.output)
    bench.write(**size, rounds=3)
    assert bench.iterate("--dry-run") == 0 and everything(bench.output) == before
    text = " ".join(capsys.readouterr().out.split())
    assert "2 more rounds of 3 prompts x 4 completions: 24 generations, 30 comparisons, at most 6 pairs" in text
    found = parts_of(bench, **size, rounds=3)
    assert (found["sample"].amount, found["evaluate"].amount) == (2 * 3 * 4 * 6, 2 * 1 * 6)
    assert found["judge"].amount == 2 * 3 * 5 + 2 * 2 * 1
    assert everything(bench.output) == before


def test_a_judge_over_http_is_not_tried(bench: Bench) -> None:
    judge = {"oracle": "judge", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}
    found = parts_of(bench, **judge)
    assert found["judge"].seconds is None and found["judge"].amount == 8 * 5 + 2 * 2 * 3 * 2


def test_a_plan_that_cannot_be_followed_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(preference_function="oracle.py:perferred")
    assert bench.iterate("--dry-run") == 2
    assert "has no 'perferred'; the nearest is 'preferred'" in capsys.readouterr().err
    assert not bench.output.exists()


@pytest.mark.parametrize(
    ("seconds", "shown", "total"),
    [(0.4, "0 s", "10 s"), (89.0, "89 s", "2 min"), (600.0, "10 min", "10 min"), (7200.0, "2.0 h", "2.0 h")],
)
def test_durations_are_said_in_their_own_unit(seconds: float, shown: str, total: str) -> None:
    parts = [Part("sample", 12345, "tokens", seconds), Part("judge", 7, "comparisons", None), Part("train", 1, "t", 10)]
    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(Plan("title", parts, "note")))
    text = console.file.getvalue()
    assert "12,345 tokens" in text and "unknown" in text and f" {shown} " in text
    assert f"{total} and the judge" in text
