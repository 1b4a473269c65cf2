"""`llmalign reliability`: numbers, picture and advice from a file, and a sentence for every fault."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmalign import PFPPOConfig
from llmalign.cli import main
from llmalign.rewards.reliability import as_dict, reliability


def rows(count: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(0)
    scores = [[rng.randint(0, 4) / 4 for _ in range(4)] for _ in range(count)]
    return [
        {
            "prompt": f"Question {i}? ",
            "completions": [f"answer {k}" for k in range(4)],
            "rewards": [value + rng.gauss(0, 0.2) for value in own],
            "scores": own,
        }
        for i, own in enumerate(scores)
    ]


@pytest.fixture
def file(tmp_path: Path):
    def _file(content: list[dict[str, Any]], name: str = "scored.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(tmp_path / name)

    return _file


def test_numbers_picture_and_advice(file, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = tmp_path / "new" / "picture.png", tmp_path / "other" / "numbers.json"
    options = ["--out", str(out), "--json", str(numbers), "--resamples", "50", "--n_groups", "8", "--seed", "3"]
    assert main(["reliability", file(rows()), *options]) == 0
    expected = reliability(
        [r["rewards"] for r in rows()], [r["scores"] for r in rows()], n_groups=8, resamples=50, seed=3,
        power=PFPPOConfig.power,
    )  # fmt: skip
    assert json.loads(numbers.read_text()) == as_dict(expected)
    assert out.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "30 prompts, 120 responses, 8 groups" in printed
    for strategy in expected.strategies:
        assert strategy.name in printed and str(strategy.r2) in printed
    assert f"Recommended: {expected.reason}" in printed


def test_columns_rows_and_strategies_can_be_chosen(file, tmp_path: Path) -> None:
    nested = [
        {"prompt": row["prompt"], "split": "a" if i < 20 else "b", "out": [
            {"text": text, "reward": reward, "passed": score}
            for text, reward, score in zip(row["completions"], row["rewards"], row["scores"], strict=True)
        ]}
        for i, row in enumerate(rows())
    ]  # fmt: skip
    numbers = tmp_path / "numbers.json"
    command = [
        "reliability", file(nested), "--columns", "{completions: out.text, rewards: out.reward, scores: out.passed}",
        "--where", "{split: a}", "--strategies", "none,power", "--power", "2", "--resamples", "20",
        "--json", str(numbers),
    ]  # fmt: skip
    assert main(command) == 0
    chosen = rows()[:20]
    expected = reliability([r["rewards"] for r in chosen], [r["scores"] for r in chosen], strategies=["none", "power"],
                           power=2.0, resamples=20)  # fmt: skip
    assert json.loads(numbers.read_text()) == as_dict(expected)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"scores": None}, [], "line 8: 'rewards' must be a list, not null"),
        ({"scores": [1.0, 0.0]}, [], "The scores cannot be read"),
        ({"rewards": [1.0, "x", 0.0, 1.0]}, [], "line 8: 'rewards[1]' must be a number"),
        ({}, ["--columns", "{scores: truth}"], "has no 'truth'"),
        ({}, ["--strategies", "bon"], "'bon' is no strategy; known are: none, best_of_n"),
        ({}, ["--max_truncated", "0.5"], "the doctor's --max_... limits are not for it"),
        ({}, ["--n_group", "5"], "unknown key `n_group`"),
        ({}, ["--n_groups", "2"], "n_groups must be at least 3"),
    ],
)
def test_faults_are_named_in_a_sentence(file, capsys, tmp_path, change, options, words) -> None:
    content = rows(10)
    content[7] |= change
    assert main(["reliability", file(content), "--out", str(tmp_path / "a.png"), *options]) == 2
    said = capsys.readouterr().err
    sentence = next(line for line in said.splitlines() if line.startswith("llmalign: "))
    assert words in sentence and "Traceback" not in said
    assert not (tmp_path / "a.png").exists()


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["reliability", "--help"])
    assert stop.value.code == 0 and "--n_groups" in capsys.readouterr().out
