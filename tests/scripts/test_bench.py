"""The benchmark runs, compares trainers that train alike, and writes what it shows."""

import json

from scripts import bench


def test_bench_writes_ratios_to_trl(tmp_path, capsys):
    out = tmp_path / "made" / "bench.json"
    bench.main(["--shapes", "6/5", "--pairs", "2", "--repetitions", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["settings"]["repetitions"] == 1
    timings = {timing["trainer"]: timing for timing in report["timings"]}
    assert set(timings) == set(bench.CONTENDERS)
    for timing in timings.values():
        assert (timing["prompt_tokens"], timing["completion_tokens"]) == (6, 5)
        assert timing["seconds"] > 0 and timing["cpu_seconds"] > 0
        for ratio in (timing["wall_ratio"], timing["cpu_ratio"]):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert timings[bench.BASELINE]["wall_ratio"] == {"median": 1, "low": 1, "high": 1}
    assert "faster than TRL" in capsys.readouterr().out


def test_ratios_are_taken_within_a_repetition():
    # 3/2 and 8/4 in wall time, 1/1 and 3/2 in CPU time.
    timing = bench.summary("ours", (6, 5), [(3.0, 1.0), (8.0, 3.0)], [(2.0, 1.0), (4.0, 2.0)])
    assert timing.wall_ratio == bench.Ratio(1.75, 1.5, 2.0)
    assert timing.cpu_ratio == bench.Ratio(1.25, 1.0, 1.5)
    assert (timing.seconds, timing.cpu_seconds) == (5.5, 2.0)


def test_pairs_have_exactly_the_lengths_asked_for():
    tokenizer = bench.build_tokenizer()
    row = bench.random_pairs(1, 6, 5)[0]
    assert len(tokenizer(row["prompt"])["input_ids"]) == 6
    for side in ("chosen", "rejected"):
        ids = tokenizer(row["prompt"] + row[side])["input_ids"]
        assert len(ids) == 11
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
