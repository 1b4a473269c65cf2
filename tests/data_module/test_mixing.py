"""Lists of data sets, weights, filters, and streams."""

import multiprocessing
from collections import Counter

import datasets
import pytest
from torch.utils.data import DataLoader

from llmalign.data.formats import DataSource, load
from llmalign.errors import UserError


def rows(name: str, count: int, **more) -> list[dict]:
    return [{"prompt": f"{name}{index} ", "chosen": "a", "rejected": "b", **more} for index in range(count)]


def prompts(found) -> list[str]:
    return [row["prompt"].strip() for row in found]


def test_a_list_is_put_end_to_end_and_rows_are_numbered_through(write):
    found = load([write("x.jsonl", rows("x", 3)), write("y.jsonl", rows("y", 2))], kind="pairs")
    assert prompts(found) == ["x0", "x1", "x2", "y0", "y1"] and found["row_id"][:] == [0, 1, 2, 3, 4]


def test_where_keeps_the_numbers_of_the_file(write):
    path = write("x.jsonl", [row | {"split": "test" if i % 2 else "train"} for i, row in enumerate(rows("x", 6))])
    found = load(DataSource(path, where={"split": "test"}), kind="pairs")
    assert prompts(found) == ["x1", "x3", "x5"] and found["row_id"][:] == [1, 3, 5]
    assert len(load(DataSource(path, where={"split": ["test", "train"]}), kind="pairs")) == 6
    assert prompts(load(DataSource(path, where={"split": "test"}, max_rows=2), kind="pairs")) == ["x1", "x3"]


def test_where_that_matches_nothing_says_what_there_is(write):
    path = write("x.jsonl", rows("x", 2, split="train"))
    with pytest.raises(UserError, match="no row where split = 'trian'; split is one of 'train'"):
        load(DataSource(path, where={"split": "trian"}), kind="pairs")
    with pytest.raises(UserError, match="line 1: has no 'spilt'"):
        load(DataSource(path, where={"spilt": "train"}), kind="pairs")


@pytest.mark.parametrize(
    "sizes, weights, counts",
    [((100, 100), (3, 1), (100, 33)), ((10, 100), (1, 1), (10, 10)), ((60, 10, 100), (2, 1, 1), (20, 10, 10))],
)
def test_weights_are_shares_and_no_row_is_taken_twice(write, caplog, sizes, weights, counts):
    caplog.set_level("INFO")
    sources = [
        DataSource(write(f"{n}.jsonl", rows(n, size)), weight=weight)
        for n, size, weight in zip("xyz", sizes, weights, strict=False)
    ]
    found = load(sources, kind="pairs", seed=5)
    taken = Counter(prompt[0] for prompt in prompts(found))
    assert tuple(taken[n] for n in "xyz"[: len(sizes)]) == counts
    assert len(set(found["row_id"][:])) == len(found)
    for source, size, count in zip(sources, sizes, counts, strict=True):
        assert f"{count} of {size} rows of {source.path}" in caplog.text


def test_a_mix_is_interleaved_and_depends_on_the_seed_alone(write):
    sources = [DataSource(write(f"{n}.jsonl", rows(n, 50)), weight=1) for n in "xy"]
    first, again, other = (prompts(load(sources, kind="pairs", seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    changes = sum(a[0] != b[0] for a, b in zip(first, first[1:], strict=False))
    assert changes > 25  # 49.5 expected of a fair shuffle, 1 of two blocks
    assert [int(p[1:]) for p in first if p[0] == "x"] == list(range(50))  # each source in its own order


def test_a_weight_too_small_for_a_single_row(write):
    sources = [DataSource(write(f"{n}.jsonl", rows(n, 3)), weight=weight) for n, weight in (("x", 1), ("y", 99))]
    with pytest.raises(UserError, match="leave no row of .*x.jsonl"):
        load(sources, kind="pairs")


def test_sets_of_different_form_are_not_mixed(write, chat):
    text = write("x.jsonl", rows("x", 2))
    talk = write("y.jsonl", [{"prompt": chat("Hi"), "chosen": chat("A", first="assistant"),
                              "rejected": chat("B", first="assistant")}])  # fmt: skip
    with pytest.raises(UserError, match="y.jsonl and .*x.jsonl cannot be mixed: one has conversations"):
        load([text, talk], kind="pairs")
    with pytest.raises(UserError, match="cannot be mixed"):
        load([text, write("z.jsonl", rows("z", 2, flipped=True))], kind="pairs")
    left_out = DataSource(write("w.jsonl", rows("w", 2, flipped=True)), columns={"flipped": None})
    assert len(load([text, left_out], kind="pairs")) == 4


def test_some_weights_are_not_enough(write):
    sources = [DataSource(write("x.jsonl", rows("x", 2)), weight=1), DataSource(write("y.jsonl", rows("y", 2)))]
    with pytest.raises(UserError, match="to all or to none"):
        load(sources, kind="pairs")


def test_a_stream_gives_the_rows_of_the_file(write):
    path = write("x.jsonl", rows("x", 5))
    stream, whole = load(path, kind="pairs", streaming=True), load(path, kind="pairs")
    assert isinstance(stream, datasets.IterableDataset)
    assert prompts(stream) == prompts(whole) == prompts(stream)
    assert stream.features == whole.features
    assert prompts(load(DataSource(path, max_rows=2), kind="pairs", streaming=True)) == ["x0", "x1"]


def test_a_stream_s_row_ids_do_not_depend_on_how_it_is_split(write, tmp_path):
    for index in range(4):
        write(f"set/part{index}.jsonl", rows(f"x{index}_", 3))
    stream = load(str(tmp_path / "set"), kind="pairs", streaming=True)
    ids = [row["row_id"] for row in stream]
    assert len(set(ids)) == 12 and all(0 <= row_id < 2**63 for row_id in ids)
    assert stream.n_shards == 4
    loader = DataLoader(stream.with_format("torch"), batch_size=None, num_workers=2)
    assert sorted(int(row["row_id"]) for row in loader) == sorted(ids)


def test_a_stream_raises_when_it_gets_to_the_faulty_row(write):
    stream = iter(load(write("x.jsonl", [*rows("x", 2), {"prompt": "p"}]), kind="pairs", streaming=True))
    next(stream), next(stream)
    with pytest.raises(UserError, match="x.jsonl, line 3: has no 'chosen'"):
        next(stream)


def test_weighted_streams_use_no_row_twice_and_end_with_the_first(write):
    sources = [DataSource(write(f"{n}.jsonl", rows(n, 200)), weight=w) for n, w in (("x", 3), ("y", 1))]
    found = prompts(load(sources, kind="pairs", streaming=True, seed=3))
    assert len(set(found)) == len(found) and found.count("x199") == 1
    share = sum(prompt[0] == "x" for prompt in found) / len(found)
    assert 0.65 < share < 0.85  # .75 expected, standard error .027
    assert found == prompts(load(sources, kind="pairs", streaming=True, seed=3))
    unweighted = [DataSource(source.path) for source in sources]
    with pytest.raises(UserError, match="give weights"):
        load(unweighted, kind="pairs", streaming=True)


def test_short_groups_leave_a_stream_as_they_come(write):
    good = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
    path = write("x.jsonl", [good, {"prompt": "q", "completions": ["a"], "rewards": [1.0]}, good])
    assert prompts(load(path, kind="groups", streaming=True)) == ["p", "p"]


def test_several_processes_can_read_at_once(write, tmp_path):
    """Ranks of one job start together; each must get whole, equal data."""
    path = write("x.jsonl", rows("x", 500))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.starmap(_count, [(path, str(tmp_path / "cache"))] * 2)
    assert counts == [500, 500]


def _count(path: str, cache: str) -> int:
    datasets.config.HF_DATASETS_CACHE = cache
    return len(load(path, kind="pairs"))
