"""Rows for training, and the sample files of the project."""

import json
from pathlib import Path

import pytest

from llmalign.embedded import (
    as_conversation,
    group_rows,
    pair_rows,
    parse_prompt,
    proxy_score,
    score,
    sft_rows,
    split,
    write_samples,
)
from llmalign.embedded.stories import openings
from llmalign.errors import UserError


def margins(rows: list[dict], judge=score) -> list[float]:
    return [judge(row["prompt"], row["chosen"]) - judge(row["prompt"], row["rejected"]) for row in rows]


def test_rows_depend_on_their_seed_alone() -> None:
    for make in (sft_rows, pair_rows, group_rows):
        assert make(20, 1) == make(20, 1)
        assert make(20, 1) != make(20, 2)
        assert make(20, 1) == make(30, 1)[:20] or make is not pair_rows


def test_pairs_are_ordered_by_the_scorer_with_a_margin() -> None:
    assert min(margins(pair_rows(300, 0, min_margin=1.5))) >= 1.5
    by_proxy = pair_rows(300, 0, scorer=proxy_score)
    assert min(margins(by_proxy, proxy_score)) >= 0.5
    assert min(margins(by_proxy)) < 0


def test_flips_swap_labels_and_nothing_else() -> None:
    clean, noisy = pair_rows(1000, 7), pair_rows(1000, 7, flip_rate=0.4)
    share = sum(row["flipped"] for row in noisy) / 1000
    assert abs(share - 0.4) < 4 * (0.4 * 0.6 / 1000) ** 0.5
    assert not any(row["flipped"] for row in clean)
    for before, after in zip(clean, noisy, strict=True):
        swapped = {"chosen": after["rejected"], "rejected": after["chosen"]} if after["flipped"] else {}
        assert before == after | swapped | {"flipped": False}


def test_a_flip_rate_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        pair_rows(1, 0, flip_rate=1.2)


def test_groups_hold_different_completions_with_their_scores() -> None:
    for row in group_rows(50, 3, size=5):
        assert len(set(row["completions"])) == len(row["rewards"]) == 5
        assert row["rewards"] == [score(row["prompt"], text) for text in row["completions"]]


def test_train_rows_hold_no_held_out_prompt() -> None:
    held_out = set(split()[1])
    rows = sft_rows(500, 0) + pair_rows(500, 0) + group_rows(100, 0)
    assert not any(parse_prompt(row["prompt"]) in held_out for row in rows)
    assert all(parse_prompt(row["prompt"]) in held_out for row in pair_rows(50, 0, subset=split()[1]))


def test_a_conversation_says_the_same() -> None:
    row = pair_rows(1, 0)[0]
    talk = as_conversation(row)
    assert talk["prompt"] == [{"role": "user", "content": row["prompt"].strip()}]
    assert talk["chosen"] == [{"role": "assistant", "content": row["chosen"]}]
    assert talk["flipped"] is False
    group = group_rows(1, 0)[0]
    said = [messages[0]["content"] for messages in as_conversation(group)["completions"]]
    assert said == group["completions"]


def test_sample_files_are_reproduced_byte_for_byte(repository: Path, tmp_path: Path) -> None:
    shipped = repository / "data" / "samples"
    written = write_samples(tmp_path)
    of_this_world = {path.name for path in shipped.glob("*.jsonl")} - {"animals.jsonl"}  # captions of pictures
    assert {path.name for path in written} == of_this_world
    for path in written:
        assert path.read_bytes() == (shipped / path.name).read_bytes(), path.name


def test_openings_are_all_different_beginnings_of_stories(repository: Path) -> None:
    lines = (repository / "data" / "samples" / "openings.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {tuple(row) for row in rows} == {("prompt",)} and len({row["prompt"] for row in rows}) == len(rows) == 1400
    assert all(row["prompt"].startswith("Once upon a time, there was a ") for row in rows)
    assert openings(5) == [row["prompt"] for row in rows[:5]] != openings(5, seed=1)


def test_sample_files_keep_train_and_test_apart(repository: Path) -> None:
    counts = {}
    for path in sorted((repository / "data" / "samples").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.stem in ("openings", "animals"):  # of stories and pictures, not of this world
            continue
        for row in rows:
            assert (parse_prompt(row["prompt"]) in split()[1]) == (row["split"] == "test")
        counts[path.stem] = (len(rows), sum(row["split"] == "test" for row in rows))
        if path.stem == "pairs":
            assert min(margins(rows)) >= 0.5
        if path.stem == "groups":
            assert all(row["rewards"] == [score(row["prompt"], text) for text in row["completions"]] for row in rows)
    assert counts == {"sft": (400, 100), "pairs": (400, 100), "groups": (200, 50), "prompts": (400, 100)}
