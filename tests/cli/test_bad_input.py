"""Every kind of bad input: one sentence that names the row or the key, exit status 2, nothing written."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main

PAIR = {"prompt": "Say something kind. ", "chosen": "What a lovely day it is.", "rejected": "No."}
GROUP = {
    "prompt": "Say something kind. ",
    "completions": ["What a lovely day.", "No.", "Well."],
    "rewards": [1.0, 0.0, 0.5],
}


def pairs(**changes: Any) -> list[dict[str, Any]]:
    """Twenty good pairs, the row in the middle changed; a value of None takes the column away."""
    rows = [{**PAIR, "prompt": f"Say something kind about {i}. "} for i in range(20)]
    rows[10] = {key: value for key, value in {**rows[10], **changes}.items() if value is not None}
    return rows


def groups(**changes: Any) -> list[dict[str, Any]]:
    rows = [{**GROUP, "prompt": f"Say something kind about {i}. "} for i in range(20)]
    rows[10] = {**rows[10], **changes}
    return rows


CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": f"Say something kind about {i}."}],
        "chosen": [{"role": "assistant", "content": "What a lovely day it is."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for i in range(20)
]


class Bench:
    """One run of the command line on the tiny model, with its recipe and data in a folder of its own."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.data = folder / "rows.jsonl"
        self.output = folder / "out"

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recipe(self, method: str) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(
            f"method: {method}\nmodel_name_or_path: {self.model}\ndataset_name: {self.data}\n"
            f"output_dir: {self.output}\nmax_steps: 1\nmax_length: 128\nreport_to: none\ndisable_tqdm: true\n"
        )
        return path

    def refused(self, *overrides: str, method: str = "rpo") -> str:
        """The sentence with which a run is refused."""
        before = {path for path in self.output.rglob("*")}
        status = main(["train", str(self.recipe(method)), *overrides])
        said = self.capsys.readouterr().err
        assert status == 2 and said.count("llmalign: ") == 1 and "Traceback" not in said
        assert {path for path in self.output.rglob("*")} == before, "something was written"
        return said[said.index("llmalign: ") :]


@pytest.fixture
def bench(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    bench = Bench(tmp_path, tiny_model_dir, capsys)
    bench.write(pairs())
    return bench


@pytest.mark.parametrize(
    ("rows", "method", "words"),
    [
        (pairs(rejected=None), "rpo", ["rows.jsonl", "rejected"]),
        ([{"question": "a", "answer": "b"}], "rpo", ["rows.jsonl", "chosen"]),
        (pairs(chosen=3), "rpo", ["rows.jsonl", "11", "chosen", "text"]),
        ([], "rpo", ["rows.jsonl"]),
        (pairs(rejected=""), "rpo", ["1 of 20 rows", "empty response", "row_id 10"]),
        (pairs(rejected=PAIR["chosen"]), "rpo", ["1 of 20 rows", "same text", "max_identical", "row_id 10"]),
        (pairs(prompt="word " * 200), "rpo", ["1 of 20 rows", "max_length 128", "row_id 10"]),
        (groups(rewards=[1.0, float("nan"), 0.0]), "copg", ["rows.jsonl", "11", "rewards", "nan"]),
        (groups(rewards=[1.0, float("inf"), 0.0]), "copg", ["rows.jsonl", "11", "rewards", "inf"]),
        (groups(rewards=[1.0, 0.0]), "copg", ["rows.jsonl", "11", "rewards"]),
        (pairs(), "copg", ["rows.jsonl", "completions"]),
        (pairs(), "sft", ["rows.jsonl"]),
    ],
    ids=[
        "missing column", "no such columns", "wrong type", "empty file", "empty completion", "identical", "long prompt",
        "reward nan", "reward inf", "rewards too few", "pairs for groups", "pairs for text",
    ],
)  # fmt: skip
def test_bad_rows(bench: Bench, rows: list[dict[str, Any]], method: str, words: list[str]) -> None:
    bench.write(rows)
    # A limit that one row of twenty would pass is no test of that row.
    sentence = bench.refused("--max_truncated", "0", "--max_dropped", "0", method=method)
    assert all(word in sentence for word in words), sentence


def test_truncated_gzip(bench: Bench) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs() * 50).encode())
    bench.data = bench.folder / "rows.jsonl.gz"
    bench.data.write_bytes(whole[: len(whole) // 2])
    sentence = bench.refused()
    assert "rows.jsonl.gz" in sentence


def test_half_a_json_line(bench: Bench) -> None:
    bench.data.write_text(json.dumps(PAIR) + "\n" + '{"prompt": "x", "cho\n')
    sentence = bench.refused()
    assert "rows.jsonl" in sentence and "2" in sentence


def test_file_that_is_not_there(bench: Bench) -> None:
    assert "absent.jsonl" in bench.refused("--dataset_name", str(bench.folder / "absent.jsonl"))


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("rdpo", ["--flip_rate", "0.5"], ["flip_rate", "0.5"]),
        ("rpo", ["--beta", "0"], ["beta", "positive"]),
        ("inpo", ["--tau", "-0.1"], ["tau", "-0.1"]),
        ("pair", ["--loss", "ipo", "--tau", "-0.1"], ["tau", "-0.1"]),
        ("rppo", [], ["rppo", "nearest is rpo"]),
        ("rpo", ["--label_smoothing", "0.1"], ["label_smoothing", "not honoured", "flip_rate"]),
        ("rpo", ["--loss_type", "ipo"], ["loss_type", "not honoured"]),
        ("rpo", ["--rpo_alpha", "1"], ["rpo_alpha", "irpo"]),
        ("rpo", ["--betta", "1"], ["betta", "nearest is `beta`"]),
        ("rpo", ["--eval_strategy", "sometimes"], ["sometimes"]),
        ("rpo", ["--attn_implementation", "flash_attention_2"], ["flash-attn", "pip install"]),
        ("rpo", ["--load_in_4bit", "true", "--use_peft", "true"], ["bitsandbytes", "pip install"]),
        ("rpo", ["--model_name_or_path", "/absent/model"], ["/absent/model"]),
        ("rpo", ["--resume", "/absent/checkpoint"], ["/absent/checkpoint"]),
        ("rpo", ["--max_length", "8", "--overlong", "drop"], ["max_length 8"]),
        ("rpo", ["--streaming", "true", "--max_steps", "-1"], ["streaming", "max_steps"]),
        ("rpo", ["--scoring", "fast"], ["llmalign: the command line: scoring must be one of"]),
    ],
)
def test_bad_keys(bench: Bench, method: str, overrides: list[str], words: list[str]) -> None:
    sentence = bench.refused(*overrides, method=method)
    assert all(word in sentence for word in words), sentence


def altered(model: Path, folder: Path, **tokenizer_changes: Any) -> Path:
    """A copy of a model whose tokenizer lacks something."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    path = copy / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **tokenizer_changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return copy


def test_model_without_tokenizer(bench: Bench) -> None:
    copy = altered(bench.model, bench.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    bench.model = copy
    assert "tokenizer" in bench.refused() and str(copy) not in str(bench.output)


def test_no_pad_and_no_eos(bench: Bench) -> None:
    bench.model = altered(bench.model, bench.folder, eos_token=None, pad_token=None)
    assert "neither a pad token nor an EOS token" in bench.refused()


@pytest.mark.parametrize("method", ["preference", "sft"])
def test_an_end_that_the_tokenizer_does_not_have(bench: Bench, method: str) -> None:
    bench.write([{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}] * 4)
    assert "eos_token ' ' is no token of the tokenizer" in bench.refused("--eos_token", " ", method=method)


def test_conversations_without_chat_template(bench: Bench) -> None:
    bench.model = altered(bench.model, bench.folder, chat_template=None)
    (bench.model / "chat_template.jinja").unlink(missing_ok=True)
    bench.write(CONVERSATIONS)
    assert "no chat template" in bench.refused()


def test_folder_that_holds_another_run(bench: Bench) -> None:
    (bench.output / "checkpoint-3").mkdir(parents=True)
    sentence = bench.refused()
    assert str(bench.output) in sentence and "--resume auto" in sentence


def test_fault_in_an_evaluation_set_is_found_before_training(bench: Bench) -> None:
    held = bench.folder / "held.jsonl"
    held.write_text(json.dumps({**PAIR, "rejected": ""}) + "\n")
    sentence = bench.refused("--eval_datasets", f"{{held: {held}}}")
    assert "The held data" in sentence and "empty response" in sentence


def test_best_model_without_an_evaluation_set(bench: Bench) -> None:
    keys = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "500"]
    assert "needs an evaluation set" in bench.refused(*keys)


def test_attention_that_nobody_knows(bench: Bench) -> None:
    assert "flesh" in bench.refused("--attn_implementation", "flesh")


def test_adapter_on_modules_that_are_not_there(bench: Bench) -> None:
    assert "nowhere" in bench.refused("--use_peft", "true", "--lora_target_modules", "nowhere")
