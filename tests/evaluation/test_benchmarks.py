"""Tasks of lm-eval on a loaded model; its numbers are worked out again from the model's log-probs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmalign.errors import UserError
from llmalign.evaluation.benchmarks import require_benchmarks, run_benchmarks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs lm-eval: pip install 'llmalign[benchmarks]'")
ROWS = [
    {"question": "The river was", "one": "calm", "other": "salt", "right": 0},
    {"question": "A good soup needs", "one": "boat", "other": "carrots and onions", "right": 1},
    {"question": "It is", "one": "Paris", "other": "patience", "right": 0},
    {"question": "She read the", "one": "letter", "other": "question", "right": 0},
    {"question": "What is the", "one": "drawer of France", "other": "capital", "right": 1},
]
TASK = """\
task: two_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[one, other]}}}}"
doc_to_target: right
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task whose rows are a file beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "two_choices.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """The share of rows whose right answer has the larger sum of log-probs after its question."""
    right = []
    for row in rows:
        sums = []
        for answer in (row["one"], row["other"]):
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {answer}")["input_ids"]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        right.append((sums[1] > sums[0]) == row["right"])
    return sum(right) / len(right)


@needs_harness
@pytest.mark.slow
def test_scores_are_the_models(tiny_model: Any, tiny_tokenizer: Any, tasks: Path) -> None:
    found = run_benchmarks(tiny_model, tiny_tokenizer, ["two_choices"], include_path=tasks, batch_size=2)
    assert found["two_choices"]["acc"] == pytest.approx(accuracy(tiny_model, tiny_tokenizer, ROWS))
    assert set(found["two_choices"]) == {"acc", "acc_stderr"}
    some = run_benchmarks(tiny_model, tiny_tokenizer, ["two_choices"], include_path=tasks, limit=2)
    assert some["two_choices"]["acc"] == pytest.approx(accuracy(tiny_model, tiny_tokenizer, ROWS[:2]))


@needs_harness
@pytest.mark.slow
def test_an_adapter_beside_its_base(tiny_model: Any, tiny_tokenizer: Any, tasks: Path) -> None:
    before = accuracy(tiny_model, tiny_tokenizer, ROWS)
    config = {"r": 4, "lora_alpha": 64, "init_lora_weights": False, "target_modules": "all-linear"}
    for seed in range(20):  # until its answers are others
        torch.manual_seed(seed)
        adapter = get_peft_model(tiny_model, LoraConfig(**config)).eval()
        expected = accuracy(adapter, tiny_tokenizer, ROWS)
        if expected != before:
            break
        tiny_model = adapter.unload()
    assert expected != before
    found = run_benchmarks(adapter, tiny_tokenizer, ["two_choices"], include_path=tasks)
    assert found["two_choices"]["acc"] == pytest.approx(expected)


@needs_harness
@pytest.mark.slow
def test_what_cannot_be_run_is_said(tiny_model: Any, tiny_tokenizer: Any, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task 'two_choises'; the nearest are two_choices"):
        run_benchmarks(tiny_model, tiny_tokenizer, ["two_choises"], include_path=tasks)
    with pytest.raises(UserError, match="benchmarks arc_easy cannot be run"):  # no network
        run_benchmarks(tiny_model, tiny_tokenizer, ["arc_easy"], limit=1)
    with pytest.raises(UserError, match="no benchmark is named"):
        run_benchmarks(tiny_model, tiny_tokenizer, [])
    with pytest.raises(UserError, match="no folder of benchmark tasks"):
        run_benchmarks(tiny_model, tiny_tokenizer, ["a"], include_path=tmp_path / "none")
    with pytest.raises(UserError, match="at least 1, not 0"):
        run_benchmarks(tiny_model, tiny_tokenizer, ["a"], limit=0)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_a_missing_harness_is_said(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"pip install 'llmalign\[benchmarks\]'"):
        run_benchmarks(tiny_model, tiny_tokenizer, ["arc_easy"])
    with pytest.raises(UserError, match="not installed"):
        require_benchmarks()
