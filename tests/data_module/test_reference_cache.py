"""The cache of log-probs: hits only what it should, survives torn files and many writers, fills what is missing."""

import dataclasses
import json
import logging
import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from llmalign.assets import cache_folder
from llmalign.data import reference_cache
from llmalign.data.reference_cache import (
    ReferenceCache,
    ScoreKey,
    default_root,
    keep_rows,
    look_up_rows,
    score_ahead,
    sequence_keys,
)
from llmalign.errors import UserError
from llmalign.types import PromptGroups

KEY = ScoreKey(weights="w", dtype="float32", autocast="no", scoring="padded", max_length=64)
OTHER = dataclasses.replace(KEY, weights="other")


def some_rows(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, 50_000, rng.integers(low, high)).tolist()

    return [{"row_id": 100 + i, "prompt": ids(2, 9), "answers": [ids(1, 9), ids(1, 9)]} for i in range(n)]


def groups_of(rows: list[dict]) -> PromptGroups:
    return PromptGroups([row["prompt"] for row in rows], [row["answers"] for row in rows])


def truth(groups: PromptGroups) -> torch.Tensor:
    """A made-up log-prob that depends on every token and its place."""
    return torch.tensor([-float(np.dot(p + c, range(1, len(p + c) + 1)) % 997) - 0.25 for p, c in groups.sequences()])


def filled(root: Path, rows: list[dict], key: ScoreKey = KEY) -> ReferenceCache:
    cache = ReferenceCache(root, key)
    cache.store(groups_of(rows), truth(groups_of(rows)).numpy())
    cache.flush()
    return cache


def fill(cache: ReferenceCache, rows, score: Callable = truth, **options):
    return score_ahead(cache, rows, groups_of, score, **({"tokens_per_batch": 40, "description": "t"} | options))


def shards(cache: ReferenceCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def test_what_was_stored_is_found_by_another_process(tmp_path: Path) -> None:
    rows = some_rows(50)
    filled(tmp_path, rows[:30])
    found = ReferenceCache(tmp_path, KEY).lookup(groups_of(rows))
    np.testing.assert_array_equal(found[:60], truth(groups_of(rows[:30])).numpy())
    assert np.isnan(found[60:]).all() and found.dtype == np.float32


def test_what_was_stored_is_found_before_it_is_written(tmp_path: Path) -> None:
    cache, rows = ReferenceCache(tmp_path, KEY), some_rows(5)
    assert np.isnan(cache.lookup(groups_of(rows))).all()
    cache.store(groups_of(rows), truth(groups_of(rows)).numpy())
    np.testing.assert_array_equal(cache.lookup(groups_of(rows)), truth(groups_of(rows)).numpy())
    assert not shards(cache)


def test_the_boundary_of_prompt_and_completion_matters() -> None:
    keys = sequence_keys(PromptGroups([[1, 2], [1], [1, 2, 3]], [[[3, 4]], [[2, 3, 4]], [[4], [4, 0]]]))
    assert len(set(keys.tolist())) == 4


def test_keys_that_end_in_zero_bytes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(groups: PromptGroups) -> np.ndarray:
        return np.array([bytes([c[0]]).ljust(16, b"\0") for _, c in groups.sequences()], dtype="S16")

    monkeypatch.setattr(reference_cache, "sequence_keys", short)
    groups = PromptGroups([[1]], [[[3], [0], [9]]])
    cache = ReferenceCache(tmp_path, KEY)
    cache.store(groups, np.array([-1.0, -2.0, -3.0]))
    assert cache.lookup(groups).tolist() == [-1, -2, -3]
    cache.flush()
    assert ReferenceCache(tmp_path, KEY).lookup(groups).tolist() == [-1, -2, -3]


@pytest.mark.parametrize(
    "change", [{"weights": "x"}, {"dtype": "bfloat16"}, {"autocast": "bf16"}, {"scoring": "x"}, {"max_length": 65}]
)
def test_every_part_of_the_key_counts(tmp_path: Path, change: dict) -> None:
    rows = some_rows(3)
    filled(tmp_path, rows)
    other = ReferenceCache(tmp_path, dataclasses.replace(KEY, **change))
    assert np.isnan(other.lookup(groups_of(rows))).all()


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    said = json.loads((cache.folder / "key.json").read_text())
    assert said.items() >= dataclasses.asdict(KEY).items() and "log-probs" in said["what"].lower()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "reference" == cache_folder() / "reference"
    monkeypatch.delenv("LLMALIGN_CACHE")
    assert default_root() == Path.home() / ".cache/llmalign/reference"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*reference_cache_dir"):
        ReferenceCache(tmp_path / "file", KEY)


def torn(keep: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def flipped(place: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return flip


def rewritten(values: Callable, noted: dict) -> Callable[[Path], None]:
    """The same shard with other values, its checksum put right: only what is in it gives it away."""

    def rewrite(path: Path) -> None:
        held = load_file(path)
        held["values"] = values(held["values"])
        body = reference_cache._body_digest(held["keys"], held["values"])
        whole = {"count": str(len(held["values"])), "sha256": body, "key": KEY.digest()} | noted
        save_file({k: np.ascontiguousarray(v) for k, v in held.items()}, path, whole)

    return rewrite


DAMAGE = {
    "empty": torn(0),
    "torn in the length": torn(0.003),
    "torn in the header": torn(0.1),
    "torn in the body": torn(0.6),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "last byte flipped": flipped(-1),
    "key flipped": flipped(-700),
    "header flipped": flipped(20),
    "not finite": rewritten(lambda values: values * np.nan, {}),
    "another precision": rewritten(lambda values: values.astype(np.float16), {}),
    "one value fewer": rewritten(lambda values: values[:-1], {}),
    "wrong count": rewritten(lambda values: values, {"count": "3"}),
    "another key": rewritten(lambda values: values, {"key": OTHER.digest()}),
    "text": lambda path: path.write_text("hello " * 100),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_shard_is_never_used_and_computed_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = some_rows(40)
    good = filled(tmp_path, rows[:20])
    (sound,) = shards(good)
    other = filled(tmp_path, rows[20:])
    (broken,) = set(shards(other)) - {sound}
    DAMAGE[name](broken)
    with caplog.at_level(logging.WARNING):
        cache = ReferenceCache(tmp_path, KEY)
    assert str(broken) in caplog.text and str(sound) not in caplog.text
    assert np.isnan(cache.lookup(groups_of(rows))).tolist() == [False] * 40 + [True] * 40
    assert not broken.exists() and broken.with_suffix(".broken").exists()
    assert fill(cache, rows).computed == 40
    again = ReferenceCache(tmp_path, KEY)
    np.testing.assert_array_equal(again.lookup(groups_of(rows)), truth(groups_of(rows)).numpy())


def test_a_shard_put_into_another_keys_folder_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = some_rows(4)
    cache = filled(tmp_path, rows)
    other = ReferenceCache(tmp_path, OTHER)
    (shard,) = shards(cache)
    (other.folder / shard.name).write_bytes(shard.read_bytes())
    other.refresh()
    assert np.isnan(other.lookup(groups_of(rows))).all() and "another key" in caplog.text


def test_files_left_by_a_killed_writer_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled(tmp_path, some_rows(2))
    (cache.folder / ".half.tmp").write_bytes(b"half")
    ReferenceCache(tmp_path, KEY)
    assert not caplog.records


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_row(tmp_path: Path, value: float) -> None:
    cache, rows = ReferenceCache(tmp_path, KEY), some_rows(3)
    logps = truth(groups_of(rows)).numpy()
    logps[3] = value
    with pytest.raises(UserError, match=r"Row 1: .*(nan|inf)"):
        cache.store(groups_of(rows), logps)
    with pytest.raises(UserError, match=r"Row 101: "):
        fill(
            cache,
            rows,
            lambda groups: torch.tensor([value if p == rows[1]["prompt"] else -1.0 for p, _ in groups.sequences()]),
        )
    cache.flush()
    assert np.isnan(cache.lookup(groups_of(rows[1:2]))).all()


def _write_some(root: Path, number: int) -> None:
    cache = ReferenceCache(root, KEY, shard_rows=7)
    rows = some_rows(60)
    for start in range(5 * number, 5 * number + 40, 4):
        part = groups_of(rows[start : start + 4])
        cache.store(part, truth(part).numpy())
        cache.refresh()
    cache.flush()


def test_many_processes_write_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_some, args=(tmp_path, number)) for number in range(4)]
    early = ReferenceCache(tmp_path, KEY)
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    early.refresh()
    groups = groups_of(some_rows(60)[:55])
    np.testing.assert_array_equal(early.lookup(groups), truth(groups).numpy())
    assert not caplog.records and not list(early.folder.glob(".*"))


def test_of_two_values_the_same_one_wins_in_any_order(tmp_path: Path) -> None:
    groups = PromptGroups([[1]], [[[2]]])
    for first, second in ((-1.0, -1.5), (-1.5, -1.0)):
        one, two = ReferenceCache(tmp_path, OTHER), ReferenceCache(tmp_path, OTHER)
        for cache, value in ((one, first), (two, second)):
            cache.store(groups, np.array([value]))
            cache.flush()
        one.refresh()
        assert one.lookup(groups)[0] == -1.5 == ReferenceCache(tmp_path, OTHER).lookup(groups)[0]


@pytest.mark.parametrize("make", [list, Dataset.from_list])
def test_filling_scores_what_is_missing_once(tmp_path: Path, make: Callable) -> None:
    rows = some_rows(30)
    filled(tmp_path, rows[:10])
    cache, seen = ReferenceCache(tmp_path, KEY), []

    def score(groups: PromptGroups) -> torch.Tensor:
        seen.append(groups)
        return truth(groups)

    data = make([*rows, *rows[:15], *rows[20:25]])  # rows that stand there twice
    first = fill(cache, data, score)
    assert (first.computed, first.found) == (40, 60)
    assert sum(len(groups.lengths()) for groups in seen) == 40
    sizes = [sum(groups.unique_tokens()) for groups in seen]
    assert all(size <= 40 or len(groups) == 1 for size, groups in zip(sizes, seen, strict=True)) and len(seen) < 20
    longest = [max(groups.unique_tokens()) for groups in seen]
    assert longest == sorted(longest, reverse=True)
    seen.clear()
    second = fill(ReferenceCache(tmp_path, KEY), data, score)
    assert (second.computed, second.found) == (0, 100) and not seen
    np.testing.assert_array_equal(look_up_rows(cache, data, groups_of), truth(groups_of(list(data))).numpy())


def test_only_the_missing_completions_of_a_row_are_scored(tmp_path: Path) -> None:
    row = some_rows(1)[0]
    cache = filled(tmp_path, [row | {"answers": row["answers"][:1]}])
    seen = []
    report = fill(cache, [row], lambda groups: seen.append(groups) or truth(groups))
    assert report.computed == report.found == 1 and seen[0].completions == [row["answers"][1:]]


def test_an_interrupted_fill_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scored = some_rows(30), []

    def stops(groups: PromptGroups) -> torch.Tensor:
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(len(groups.lengths()))
        return truth(groups)

    with pytest.raises(KeyboardInterrupt):
        fill(ReferenceCache(tmp_path, KEY), rows, stops)
    assert fill(ReferenceCache(tmp_path, KEY), rows).found == sum(scored) > 0


def test_a_fill_that_is_killed_at_any_moment_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "FLUSH_SECONDS", 0.0)
    scored = []

    def score(groups: PromptGroups) -> torch.Tensor:
        on_disk = ReferenceCache(tmp_path, KEY)
        assert not any(np.isnan(on_disk.lookup(earlier)).any() for earlier in scored)
        scored.append(groups)
        return truth(groups)

    fill(ReferenceCache(tmp_path, KEY), some_rows(30), score)
    assert len(scored) > 5


@pytest.mark.parametrize("world, count", [(2, 30), (3, 30), (4, 2)])
@pytest.mark.parametrize("even", [False, True])
def test_ranks_share_the_work(tmp_path: Path, world: int, count: int, even: bool) -> None:
    rows = some_rows(count)
    plans: list = []

    def agree(plan):
        plans.append(plan)
        return plans[0]  # what rank 0 saw; later ranks find an ever fuller cache

    calls = [0] * world
    reports = []
    for rank in range(world):

        def score(groups: PromptGroups, rank: int = rank) -> torch.Tensor:
            calls[rank] += 1
            return truth(groups)

        options = {"rank": rank, "world": world, "agree": agree, "even": even}
        reports.append(fill(ReferenceCache(tmp_path, KEY), rows, score, **options))
    assert {report.computed for report in reports} == {2 * count}
    assert max(calls) - min(calls) <= (0 if even else 1)
    found = ReferenceCache(tmp_path, KEY).lookup(groups_of(rows))
    np.testing.assert_array_equal(found, truth(groups_of(rows)).numpy())


@pytest.mark.parametrize("even", [False, True])
def test_a_fault_of_one_rank_is_told_to_all_and_no_sharded_rank_stops_scoring(tmp_path: Path, even: bool) -> None:
    rows, told, calls = some_rows(40), [], [0, 0]
    for rank in range(2):

        def score(groups: PromptGroups, rank: int = rank) -> torch.Tensor:
            calls[rank] += 1
            return truth(groups) * (math.nan if rank == 1 and calls[1] == 2 else 1)

        options = {"rank": rank, "world": 2, "agree": lambda jobs: jobs, "even": even, "together": told.append}
        fill(ReferenceCache(tmp_path / str(rank), KEY), rows, score, **options)
    assert told[0] is None and re.match(r"Row \d+: the frozen model gives a completion the log-prob nan", told[1])
    assert calls[1] == (calls[0] if even else 2) and calls[0] > 4
    first = np.isfinite(ReferenceCache(tmp_path / "1", KEY).lookup(groups_of(rows)))
    assert 0 < first.sum() <= 12, "what was scored before the fault is kept"


def test_what_another_cache_held_is_kept_too(tmp_path: Path) -> None:
    rows = some_rows(2500)
    cache = filled(tmp_path / "own", rows[:1500])
    keep_rows(cache, rows, groups_of, truth(groups_of(rows)).numpy())
    found = ReferenceCache(tmp_path / "own", KEY).lookup(groups_of(rows))
    np.testing.assert_array_equal(found, truth(groups_of(rows)).numpy())


def test_ranks_that_cannot_agree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="agree"):
        fill(ReferenceCache(tmp_path, KEY), some_rows(2), world=2)


def test_filling_is_deterministic(tmp_path: Path) -> None:
    batches = []
    for name in ("a", "b"):
        seen: list = []
        fill(ReferenceCache(tmp_path / name, KEY), some_rows(30), lambda g, seen=seen: seen.append(g) or truth(g))
        batches.append(seen)
    assert batches[0] == batches[1]
    names = [[path.name for path in (tmp_path / name).glob("*/*.safetensors")] for name in ("a", "b")]
    assert names[0] == names[1]
