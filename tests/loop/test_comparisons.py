"""Comparisons: each asked once, in either order, by what was compared and by whom."""

import math
import sqlite3
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.loop.comparisons import Comparisons, Pair
from tests.loop.games import Oracle, comparisons, longer

NAN = math.nan


def pair(first: str, second: str, prompt="p", **columns) -> Pair:
    return Pair(prompt, first, second, columns)


def test_a_comparison_is_asked_once_in_this_order_or_the_other(tmp_path: Path) -> None:
    known = comparisons(tmp_path, longer)
    assert known.ask([pair("aa", "b"), pair("c", "dd")]) == [0.9, 0.2]
    assert known.ask([pair("c", "dd"), pair("b", "aa"), pair("e", "f")]) == [0.2, pytest.approx(0.1), 0.5]
    assert known.oracle.calls == [[("p", "aa", "b"), ("p", "c", "dd")], [("p", "e", "f")]]
    assert (known.asked, known.found) == (3, 2)


def test_repeated_in_one_batch_it_is_asked_once_too(tmp_path: Path) -> None:
    known = comparisons(tmp_path, longer)
    given = known.ask([pair("aa", "b"), pair("b", "aa"), pair("aa", "b"), pair("aa", "b", "other prompt")])
    assert given == [0.9, pytest.approx(0.1), 0.9, 0.9]
    assert known.oracle.asked == [("p", "aa", "b"), ("other prompt", "aa", "b")] and known.asked == 2


def test_equal_answers_are_one_half_and_cost_nothing(tmp_path: Path) -> None:
    known = comparisons(tmp_path, lambda a, b: 1.0)
    assert known.ask([pair("a", "a"), pair("a", "b"), pair("b", "b")]) == [0.5, 1.0, 0.5]
    assert known.oracle.asked == [("p", "a", "b")] and (known.asked, known.found) == (1, 0)


def test_prompt_columns_and_oracle_make_another_comparison(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "p"}]
    known = comparisons(tmp_path, longer)
    pairs = [pair("a", "b"), pair("a", "b", talk), pair("a", "b", tag=1), pair("a", "b", tag=2)]
    for one in pairs:
        known.ask([one])
    assert [call[0][0] for call in known.oracle.calls] == ["p", talk, "p", "p"]
    assert known.oracle.columns == [{}, {}, {"tag": [1]}, {"tag": [2]}]
    known.ask(pairs[:2])
    known.close()
    same, other = comparisons(tmp_path, longer), comparisons(tmp_path, longer, identity="other")
    assert same.ask(pairs[:2]) == [0.5, 0.5] and same.oracle.calls == []
    assert other.ask(pairs[:2]) == [0.5, 0.5] and len(other.oracle.asked) == 2


def test_columns_reach_the_oracle_row_by_row(tmp_path: Path) -> None:
    known = comparisons(tmp_path, longer)
    known.ask([pair("a", "b", tag=1, level="x"), pair("a", "a", tag=2, level="y"), pair("a", "b", tag=3, level="z")])
    assert known.oracle.columns == [{"tag": [1, 3], "level": ["x", "z"]}]


def test_a_comparison_that_failed_is_asked_again(tmp_path: Path) -> None:
    answers = {("a", "b"): NAN, ("c", "d"): 0.7}
    known = comparisons(tmp_path, lambda a, b: answers[a, b])
    found = known.ask([pair("a", "b"), pair("c", "d"), pair("b", "a")])
    assert math.isnan(found[0]) and found[1] == 0.7 and math.isnan(found[2])
    assert (known.asked, known.found) == (2, 0)
    answers["a", "b"] = 0.25
    assert known.ask([pair("a", "b"), pair("c", "d")]) == [0.25, 0.7]
    assert known.oracle.asked[2:] == [("p", "a", "b")]
    assert (known.asked, known.found) == (3, 1)


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops_at_c(first: str, second: str) -> float:
        if first == "c":
            raise KeyboardInterrupt
        return 0.9

    batch = [pair("a", "b"), pair("c", "d")]
    known = comparisons(tmp_path, stops_at_c)
    with pytest.raises(KeyboardInterrupt):
        known.ask(batch)
    known.close()
    # Stopped between two rows of what is being kept: none of them is.
    torn = comparisons(tmp_path, lambda a, b: 0.9)
    rows = {b"k" * 32: 0.1, b"l" * 32: object()}  # which SQLite cannot keep
    with pytest.raises(sqlite3.Error):
        torn._keep(rows)
    assert torn._look_up(set(rows)) == {}
    torn.close()
    again = comparisons(tmp_path, lambda a, b: 0.9)
    again.ask(batch)
    assert again.oracle.calls == [[("p", "a", "b"), ("p", "c", "d")]]


def test_what_was_answered_is_there_for_another_process(tmp_path: Path) -> None:
    """Without closing, as after a kill."""
    comparisons(tmp_path, longer).ask([pair("aa", "b")])
    after = comparisons(tmp_path, longer)
    assert after.ask([pair("b", "aa")]) == [pytest.approx(0.1)] and after.oracle.calls == []


def test_nothing_is_asked_for_an_empty_batch(tmp_path: Path) -> None:
    known = comparisons(tmp_path, longer)
    assert known.ask([]) == [] and known.ask([pair("a", "a")]) == [0.5] and known.oracle.calls == []


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "comparisons.sqlite"
    path.write_text("these are notes and no database " * 40)
    with pytest.raises(UserError, match=f"{path} cannot be used to keep comparisons in .*; move it away"):
        Comparisons(path, Oracle(longer), "mine")
