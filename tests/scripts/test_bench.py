"""The bench counts what it says, draws what it says, and writes what it measured. No limit on any time."""

import json
import random
import statistics
from dataclasses import replace
from typing import Any

import bench
import pytest
from benching import cases, limit, model, report
from benching.cases import CASES, Case, Group, Shape

SHAPE = Shape("qwen2", hidden=4, layers=1, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
GROUP = Group(3, (2, 3))  # a prompt of 3 tokens and completions of 2 and 3


def test_operations_of_a_step_worked_out_by_hand():
    # Layer: q and o 4x4, k and v 4x2, three of 4x8: 144 parameters. Fed: 3 + 1 + 2 = 6 tokens, scored: 5.
    # Attention: 6 pairs in the prompt, 1 * 3 + 1 and 2 * 3 + 3 in the branches: 19.
    assert limit.visible_pairs(GROUP) == 19
    # Forward: 2 (6 * 144 + 5 * 40) = 2128 in matrices, 4 * 19 * 4 = 304 in attention.
    whole = Case("whole", 1, 1, shape=SHAPE)
    assert limit.step_flops(whole, [GROUP]) == 3 * 2432 + 2432
    assert limit.step_flops(whole, [GROUP, GROUP]) == 2 * 4 * 2432
    for saved in ("cached", "forward_backward"):
        assert limit.step_flops(replace(whole, **{saved: True}), [GROUP]) == 3 * 2432
    # Adapters: 16 * (8 + 6 + 6 + 8 + 12 + 12 + 12) = 1024 parameters, six operations each for 6 tokens.
    assert limit.step_flops(replace(whole, lora=True), [GROUP]) == 2 * 2128 + 3 * 304 + 6 * 6 * 1024 + 2432


def test_lognormal_lengths_have_the_mean_that_is_named():
    draws = random.Random(1)
    lengths = [cases.lognormal_length(draws) for _ in range(20_000)]
    assert statistics.fmean(lengths) == pytest.approx(cases.MEAN, rel=0.03)
    assert min(lengths) >= cases.SHORTEST and max(lengths) == cases.LONGEST


def test_every_process_draws_the_same_batches():
    lognormal = CASES["lognormal"]
    assert lognormal.counted_steps(2) == 8 and CASES["512-128"].counted_steps(2) == 2
    first = cases.batches(lognormal, 9)
    assert first == cases.batches(lognormal, 9) and first[:3] == cases.batches(lognormal, 3)
    assert [len(batch) for batch in first] == [4] * 9
    assert cases.batches(CASES["k8"], 1) == [[Group(512, (128,) * 8)]]


def test_texts_have_exactly_the_lengths_asked_for():
    tokenizer = model.build_tokenizer(50)
    ((prompt, completions),) = cases.texts([Group(6, (5, 1))], 50)
    assert len(tokenizer(prompt)["input_ids"]) == 6
    for completion, length in zip(completions, (5, 1), strict=True):
        ids = tokenizer(prompt + completion)["input_ids"]
        assert len(ids) == 6 + length
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids


def measured(contender: str, seconds: list[float], megabytes: float, losses: tuple[float, ...] = (0.5,)) -> Any:
    return {
        "contender": contender,
        "seconds": seconds,
        "megabytes": megabytes,
        "losses": losses,
        "dtype": "float32",
        "mm_rate": 1e9,
        "layout": "shared_prompt" if contender == "ours" else "padded",
    }


def test_ratios_of_medians_and_of_single_rounds():
    case = Case("x", 1, 1, shape=SHAPE, prompt=3, completion=2)
    found = report.summarise(
        case,
        [
            measured("ours", [1.0, 2.0], 50),
            measured("trl", [2.0, 4.0], 100),
            measured("trl", [9.0, 3.0], 100),
            measured("ours", [2.0, 1.0], 70),
        ],
    )
    # Medians: 1.5 against 3.5; the rounds' own: 3 / 1.5 and 6 / 1.5.
    assert (found.seconds, found.trl_seconds) == (1.5, 3.5)
    assert (found.time_ratio, found.low, found.high) == (3.5 / 1.5, 2.0, 4.0)
    assert found.memory_ratio == 60 / 100
    assert found.layout == "shared_prompt"
    batch = [Group(3, (2, 2))] * cases.PAIRS
    assert found.fraction_of_limit == pytest.approx(limit.step_flops(case, batch) / 1e9 / 1.5)
    assert set(report.entry(found)) == {"case", "time_ratio", "memory_ratio", "fraction_of_limit"}


def test_batches_of_drawn_lengths_are_averaged():
    # Two batches in three rounds: the median of each, then their mean.
    assert report.typical(CASES["lognormal"], [[1.0, 10.0], [2.0, 30.0], [9.0, 20.0]]) == (2.0 + 20.0) / 2


def test_contenders_that_train_differently_are_refused():
    pair = [measured("ours", [1.0], 1, (0.5,)), measured("trl", [1.0], 1, (0.51,))]
    with pytest.raises(RuntimeError, match="ours and trl do not train alike"):
        report.check_alike(CASES["512-128"], pair)


def test_contenders_take_turns():
    assert bench.turns(CASES["512-128"], 2) == ["ours", "trl", "trl", "ours"]
    assert bench.turns(CASES["cached"], 1) == ["fill", "ours", "trl", "trl-precomputed"]


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    assert bench.main(["--device", "cuda", "--dtype", "bfloat16"]) == 2
    assert capsys.readouterr().err.startswith("There is no GPU here")


@pytest.mark.slow
def test_a_case_runs_in_fresh_processes_and_is_written(tmp_path, capsys):
    out, details = tmp_path / "made" / "bench.json", tmp_path / "details.json"
    arguments = ["--quick", "--case", "512-128", "--rounds", "1", "--steps", "1"]
    assert bench.main([*arguments, "--json", str(out), "--details", str(details)]) == 0
    (entry,) = json.loads(out.read_text())
    assert set(entry) == {"case", "time_ratio", "memory_ratio", "fraction_of_limit"}
    assert entry["case"] == "512-128"
    assert min(entry["time_ratio"], entry["memory_ratio"], entry["fraction_of_limit"]) > 0
    ours, theirs = json.loads(details.read_text())["samples"]
    assert (ours["contender"], ours["layout"]) == ("ours", "shared_prompt")
    assert (theirs["contender"], theirs["layout"]) == ("trl", "padded")
    assert "512-128" in capsys.readouterr().out
