"""`llmalign judge` by models on this machine: the higher reward wins, a pair model says P, a new one judges anew."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from llmalign.cli import main
from llmalign.evaluation.annotations import read_annotations, write_json
from llmalign.rewards.model import load_reward_model
from llmalign.rewards.pair_model import load_preference_model, mark_pair_preference

ROWS = 70  # more than are judged at a time
PROMPTS = [f"Tell me of {number}." for number in range(ROWS)]
ENDS = "river boat salt answer France letter drawer soup".split()  # what a reward model with random weights tells apart
THEIRS = [f"A story of the {ENDS[number % 8]}" for number in range(ROWS)]
OURS = [f"Of {number % 7} and the {ENDS[number % 3]}" for number in range(ROWS)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, answers in (("reference", THEIRS), ("outputs", OURS)):
        rows = [{"instruction": p, "output": a, "generator": name} for p, a in zip(PROMPTS, answers, strict=True)]
        write_json(tmp_path / f"{name}.json", rows)
    return [
        "judge", str(tmp_path / "outputs.json"), "--reference", str(tmp_path / "reference.json"),
        "--out", str(tmp_path / "annotations.json"),
    ]  # fmt: skip


def classifier(folder: Path, like: Path, *, of_pairs: bool, template: bool = False, seed: int = 3) -> str:
    config = AutoConfig.from_pretrained(like, num_labels=1)
    if of_pairs:
        mark_pair_preference(config)
    torch.manual_seed(seed)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(like)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def preferences(tmp_path: Path) -> list[float]:
    return [row["preference"] for row in read_annotations(tmp_path / "annotations.json")]


@pytest.mark.parametrize("template", [False, True])
def test_the_higher_reward_wins(files: list[str], tiny_model_dir: Path, tmp_path: Path, template: bool) -> None:
    model = classifier(tmp_path / "reward", tiny_model_dir, of_pairs=False, template=template)
    assert main([*files, "--reward_model", model]) == 0
    reward = load_reward_model(model)

    def rewards(answers: list[str]) -> list[float]:
        if not template:
            return reward(prompts=PROMPTS, completions=answers)
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        return reward(prompts=chats, completions=[[{"role": "assistant", "content": answer}] for answer in answers])

    expected = [2.0 if ours > theirs else 1.0 for ours, theirs in zip(rewards(OURS), rewards(THEIRS), strict=True)]
    assert preferences(tmp_path) == expected and len(set(expected)) == 2


def test_a_pair_model_says_how_likely(files: list[str], tiny_model_dir: Path, tmp_path: Path) -> None:
    model = classifier(tmp_path / "pairs", tiny_model_dir, of_pairs=True)
    assert main([*files, "--preference_model", model]) == 0
    expected = [2 - p for p in load_preference_model(model).score(PROMPTS, THEIRS, OURS)]
    assert preferences(tmp_path) == pytest.approx(expected, abs=1e-5)


def test_what_a_model_judged_before_it_was_trained_on_is_not_kept(
    files: list[str], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*files, "--reward_model", classifier(tmp_path / "reward", tiny_model_dir, of_pairs=False)]
    assert main(arguments) == 0
    before = preferences(tmp_path)
    assert main(arguments) == 0 and f"{ROWS} kept" in capsys.readouterr().out
    classifier(tmp_path / "reward", tiny_model_dir, of_pairs=False, seed=4)
    assert main(arguments) == 2 and "would be lost" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0 and f"{ROWS} judged" in capsys.readouterr().out
    assert preferences(tmp_path) != before


def test_judgements_of_a_function_may_be_none(
    files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "never.py").write_text("def never(prompts, first, second):\n    return [float('nan')] * len(first)\n")
    assert main([*files, "--function", f"{tmp_path}/never.py:never"]) == 1
    assert f"{ROWS} rows have no result" in caplog.text
    row = json.loads((tmp_path / "annotations.json").read_text())[0]
    assert row["preference"] is None and row["reason"] == "the function gave no number"


@pytest.mark.parametrize(
    "kind, options",
    [
        ("--reward_model", ["--both_orders"]), ("--preference_model", ["--cache", "f"]), ("--function", ["--url", "u"]),
        ("--function", ["--letters", "A", "B"]), ("--reward_model", ["--order_seed", "0"]),
        ("--preference_model", ["--patience", "300"]), ("--reward_model", ["--template", "f"]),
        ("--function", ["--api_key_env", ""]),
    ],
)  # fmt: skip
def test_what_a_local_judge_does_not_read_is_refused(files: list[str], capsys, kind: str, options: list[str]) -> None:
    assert main([*files, kind, "none", *options]) == 2
    assert f"{kind} does not read {options[0]}: leave it out" in capsys.readouterr().err


def test_what_an_endpoint_would_not_read_is_refused(files: list[str], capsys) -> None:
    endpoint = [*files, "--judge", "m", "--url", "http://127.0.0.1:9/v1"]
    assert main([*endpoint, "--answers", "text", "--top_logprobs", "9"]) == 2
    assert main([*endpoint, "--both_orders", "--order_seed", "9"]) == 2
    said = capsys.readouterr().err
    assert "--top_logprobs is not read" in said and "--order_seed is not read" in said
