"""`llmalign evaluate` from end to end on the embedded model and an adapter of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmalign.cli import main
from llmalign.inference import load_for_inference

JUDGES = """
asked = []

def shorter(prompts, first, second):
    asked.extend(prompts)
    return [float(len(a) < len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second)]
"""
PROMPTS = [{"instruction": f"Tell me about outing {i}", "dataset": f"set {i % 2}"} for i in range(12)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    model, tokenizer = load_for_inference("embedded:tiny", dtype="float32", device="cpu")
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path, adapter: Path) -> list[str]:
    (tmp_path / "judges.py").write_text(JUDGES)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return [
        "evaluate", str(adapter), "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "p.jsonl"),
        "--function", f"{tmp_path}/judges.py:shorter", "--max_new_tokens", "16",
    ]  # fmt: skip


def test_everything_in_one_folder(arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([*arguments, "--pairs", "sample:pairs", "--max_rows", "8"]) == 0
    out = tmp_path / "out"
    found = json.loads((out / "evaluation.json").read_text())
    annotations = json.loads((out / "annotations.json").read_text())
    assert found["winrate"]["n_rows"] == 8 == len(annotations) == found["prompts"]["rows"]
    rate = 100 * sum(row["preference"] - 1 for row in annotations) / 8
    assert found["winrate"]["win_rate"] == found["interval"]["mean"] == pytest.approx(rate)
    assert [row["dataset"] for row in found["per_dataset"]] == ["set 0", "set 1"]
    assert found["model"] == "lora" and found["judge"]["kind"] == "function"
    assert found["accuracy"]["by"] == "log-ratio to the start" and 0 < found["accuracy"]["mean"] < 1
    assert (out / "leaderboard.csv").read_text().count("\n") == 2
    made = (out / "model_outputs.json").stat().st_mtime_ns
    caplog.clear()
    assert main([*arguments, "--max_rows", "8"]) == 0
    assert (out / "model_outputs.json").stat().st_mtime_ns == made and "is there already" in caplog.text
    assert "8 kept from before" in caplog.text
    assert main([*arguments, "--max_rows", "8", "--max_new_tokens", "5"]) == 0
    assert (out / "model_outputs.json").stat().st_mtime_ns != made


def test_a_file_is_a_reference_too(arguments: list[str], tmp_path: Path) -> None:
    rows = [{"instruction": row["instruction"], "output": "x" * 400, "generator": "wordy"} for row in PROMPTS]
    (tmp_path / "ref.json").write_text(json.dumps(rows))
    assert main([*arguments, "--reference", str(tmp_path / "ref.json")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["reference"] == "wordy" and found["winrate"]["win_rate"] == 100


def test_pairs_alone(adapter: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(adapter), "--out", str(tmp_path / "o"), "--pairs", "sample:pairs", "--max_rows", "6"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert found["winrate"] is None and found["accuracy"]["n"] > 6  # --max_rows is of the prompts


@pytest.mark.parametrize(
    "change, said",
    [
        (["evaluate", "embedded:tiny"], "nothing to measure"),
        (["evaluate", "embedded:tiny", "--prompts", "p.txt"], "--prompts need a judge"),
        (["evaluate", "embedded:tiny", "--pairs", "sample:pairs", "--max_truncated", "1"], "as they are"),
        (["evaluate", "embedded:tiny", "--benchmarks", "x", "--nonsense", "1"], "does not know --nonsense"),
    ],
)
def test_what_cannot_be_meant(change: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(change) == 2
    assert said in capsys.readouterr().err


def test_a_start_that_is_not_known_is_asked_for(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([arguments[0], "embedded:tiny", *arguments[2:]]) == 2
    assert "name its reference with --reference" in capsys.readouterr().err


def test_a_stale_reference_is_not_taken_for_another(arguments: list[str], tmp_path: Path) -> None:
    rows = [{"instruction": row["instruction"], "output": "x" * 400, "generator": "wordy"} for row in PROMPTS]
    (tmp_path / "ref.json").write_text(json.dumps(rows))
    names = []
    for reference in ("embedded:tiny", str(tmp_path / "ref.json"), "embedded:tiny"):
        assert main([*arguments, "--reference", reference]) == 0
        names.append(json.loads((tmp_path / "out" / "evaluation.json").read_text())["reference"])
    assert names == ["embedded:tiny", "wordy", "embedded:tiny"]


def test_what_was_measured_before_stays(arguments: list[str], adapter: Path, tmp_path: Path) -> None:
    assert main(arguments) == 0
    file = tmp_path / "out" / "evaluation.json"
    before = json.loads(file.read_text())
    assert main(["evaluate", str(adapter), "--out", str(tmp_path / "out"), "--pairs", "sample:pairs"]) == 0
    after = json.loads(file.read_text())
    assert after["winrate"] == before["winrate"] is not None and after["accuracy"]["n"] == 400


def test_files_of_others_are_not_replaced_unasked(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    paid = tmp_path / "out" / "model_outputs.json"
    paid.write_text(json.dumps([{"instruction": "i", "output": "paid for"}]))
    assert main(arguments) == 2
    assert "was not written by this command" in capsys.readouterr().err and "paid for" in paid.read_text()
    assert main([*arguments, "--overwrite"]) == 0


def test_pairs_that_do_not_fit_are_counted(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "tell me " * (60 if i % 2 else 1), "chosen": "yes " * 30, "rejected": "no"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(adapter), "--out", str(tmp_path / "o"), "--pairs", str(tmp_path / "pairs.jsonl")]
    assert main([*arguments, "--max_length", "24"]) == 0
    found = json.loads((tmp_path / "o" / "evaluation.json").read_text())["accuracy"]
    assert (found["n"], found["dropped"], found["cut"]) == (5, 5, 5)
    assert "Of 10 pairs 5 are left out" in caplog.text


def test_pairs_that_were_trained_on_are_told(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (adapter / "run.json").write_text(
        json.dumps({"model_name_or_path": "embedded:tiny", "dataset_name": "sample:pairs"})
    )
    arguments = ["evaluate", str(adapter), "--out", str(tmp_path / "o"), "--pairs", "sample:pairs"]
    try:
        assert main(arguments) == 0
        assert json.loads((tmp_path / "o" / "evaluation.json").read_text())["accuracy"]["trained_on"]
        assert "is what the model was trained on" in caplog.text
        assert main([*arguments, "--where", "{split: test}"]) == 0
        assert not json.loads((tmp_path / "o" / "evaluation.json").read_text())["accuracy"]["trained_on"]
    finally:
        (adapter / "run.json").unlink()


def test_a_misspelt_option_has_a_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "embedded:tiny", "--prompts", "p.txt", "--fuction", "x.py:f"]) == 2
    assert "--function" in capsys.readouterr().err
