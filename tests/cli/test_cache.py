"""`llmalign cache`: what it fills is what training looks up, and nothing else is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmalign import fill as filling
from llmalign.cli import main
from llmalign.data.reference_cache import ReferenceCache

ROWS = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/reference"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"Describe {i}.", "chosen": f" What a {i} it is." * (i % 3 + 1), "rejected": " No." * (i + 1)}
        for i in range(ROWS)
    ]
    return _written(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def groups(tmp_path: Path) -> str:
    rows = []
    for i in range(ROWS):
        completions = [f" {j} " * j for j in range(1, 3 + i % 2)]
        rows.append({"prompt": f"Count to {i}.", "completions": completions, "rewards": [1.0, 0.5, 0.0][: 2 + i % 2]})
    return _written(tmp_path / "groups.jsonl", rows)


def _written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(tmp_path: Path, model: Path, data: str, method: str = "pair", **values: object) -> dict:
    """Train for a step and return what its references took."""
    settings = {
        "method": method,
        "model_name_or_path": str(model),
        "dataset_name": data,
        "output_dir": str(tmp_path / "run"),
        "precompute_ref_log_probs": True,
        "max_length": 48,
        "max_truncated": 1.0,
        "max_steps": 1,
        "logging_steps": 1,
        "holdout_rows": 1,
        "save_strategy": "no",
        "alarm_prompts": 0,
        "report_to": "none",
        "disable_tqdm": True,
        **values,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    assert main(["train", str(recipe)]) == 0
    return json.loads((Path(str(settings["output_dir"])) / "metrics.json").read_text())["references"]


def cache(data: str, model: Path, *more: str) -> int:
    return main(["cache", data, "--model", str(model), "--max_length", "48", "--max_truncated", "1", *more])


@pytest.mark.parametrize("values", [{}, {"use_peft": True, "learning_rate": 1e-3}, {"method": "rpo", "beta": 0.3}])
def test_training_finds_everything(
    tmp_path: Path, tiny_model_dir: Path, pairs: str, values: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(pairs, tiny_model_dir) == 0
    assert f"{2 * ROWS} log-probs: 0 found, {2 * ROWS} computed" in capsys.readouterr().out
    references = train(tmp_path, tiny_model_dir, pairs, **values)
    assert {name: (report["found"], report["computed"]) for name, report in references.items()} == {
        "train": (2 * ROWS - 2, 0),
        "eval": (2, 0),
    }


def test_training_on_groups_finds_everything(tmp_path: Path, tiny_model_dir: Path, groups: str) -> None:
    assert cache(groups, tiny_model_dir, "--kind", "groups") == 0
    references = train(tmp_path, tiny_model_dir, groups, "copg")
    assert [report["computed"] for report in references.values()] == [0, 0]
    assert sum(report["found"] for report in references.values()) == ROWS // 2 * (2 + 3)


@pytest.mark.parametrize(
    "change", [["--max_length", "47"], ["--bf16", "true"], ["--dtype", "bfloat16"], ["--scoring", "padded"]]
)
def test_what_changes_a_score_is_computed_again(
    tiny_model_dir: Path, pairs: str, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(pairs, tiny_model_dir) == cache(pairs, tiny_model_dir) == 0
    assert f"{2 * ROWS} found, 0 computed" in capsys.readouterr().out
    options = [] if change[0] == "--max_length" else ["--max_length", "48"]
    assert main(["cache", pairs, "--model", str(tiny_model_dir), "--max_truncated", "1", *options, *change]) == 0
    assert f" 0 found, {2 * ROWS} computed" in capsys.readouterr().out


def test_other_weights_under_the_same_name_are_scored_again(
    tmp_path: Path, tiny_model_dir: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(folder)
    cache(pairs, folder)
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 0.01
    model.save_pretrained(folder)
    capsys.readouterr()
    cache(pairs, folder)
    assert f" 0 found, {2 * ROWS} computed" in capsys.readouterr().out


def test_a_stream_is_filled_in_parts_with_the_same_keys(
    tiny_model_dir: Path,
    pairs: str,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(filling, "STREAMED_ROWS", 5)
    assert cache(pairs, tiny_model_dir, "--streaming") == 0
    assert f" 0 found, {2 * ROWS} computed" in capsys.readouterr().out
    assert len(list(own_cache.glob("*/*.safetensors"))) == 3
    assert cache(pairs, tiny_model_dir) == 0
    assert f"{2 * ROWS} found, 0 computed" in capsys.readouterr().out


def test_a_torn_shard_is_made_good(
    tiny_model_dir: Path, pairs: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(pairs, tiny_model_dir)
    (shard,) = own_cache.glob("*/*.safetensors")
    whole = load_file(shard)
    shard.write_bytes(shard.read_bytes()[:-3])
    capsys.readouterr()
    cache(pairs, tiny_model_dir)
    assert f" 0 found, {2 * ROWS} computed" in capsys.readouterr().out
    again = load_file(shard)
    assert all((again[name] == values).all() for name, values in whole.items())


def test_elsewhere_when_told_so(tmp_path: Path, tiny_model_dir: Path, pairs: str, own_cache: Path) -> None:
    assert cache(pairs, tiny_model_dir, "--reference_cache_dir", str(tmp_path / "else")) == 0
    assert list((tmp_path / "else").glob("*/*.safetensors")) and not own_cache.exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--max_rows", "2", "--colums", "x"], "colums"),
        (["--scoring", "fast"], "scoring"),
        (["--bf16", "perhaps"], "bf16"),
        (["--max_truncated", "0", "--max_length", "20"], "max_truncated"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_scored(
    tiny_model_dir: Path,
    pairs: str,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ReferenceCache, "store", None)
    assert main(["cache", pairs, "--model", str(tiny_model_dir), *more]) == 2
    assert said in capsys.readouterr().err
