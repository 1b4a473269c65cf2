"""The answers' file: whole, shared, and never another program's."""

import sqlite3
import threading
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.judges import Answer
from llmalign.judges.cache import AnswerCache

ANSWER = Answer("A", {"A": -0.25, "\ufffd": -3.0}, 10, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "answers.sqlite"


def test_what_is_kept_is_found_by_whoever_opens_the_file(path: Path) -> None:
    cache = AnswerCache(path)
    cache.keep("k", ANSWER, "b")
    other = AnswerCache(path)
    assert other.find(["k", "absent"]) == {"k": Answer("A", {"A": -0.25, "\ufffd": -3.0}, 10, 1, cached=True)}
    other.keep("k2", ANSWER, "b")
    assert set(cache.find(["k", "k2"])) == {"k", "k2"}


def test_more_keys_than_one_query_takes(path: Path) -> None:
    cache = AnswerCache(path)
    for number in range(0, 1300, 2):
        cache.keep(str(number), ANSWER, "b")
    assert set(cache.find([str(number) for number in range(1300)])) == {str(number) for number in range(0, 1300, 2)}


def test_an_answer_is_committed_at_once(path: Path) -> None:
    AnswerCache(path).keep("k", ANSWER, "b")
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT count(*) FROM answers").fetchone() == (1,)
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_budget_bounds_and_is_shared(path: Path) -> None:
    caches = [AnswerCache(path), AnswerCache(path)]
    assert [cache.take("b", 3, None) for cache in caches * 2] == [True, True, True, False]
    assert caches[0].take("another", 1, None) and caches[0].take("b", None, None)
    assert caches[1].spent("b") == (4, 0) and caches[1].spent("unheard of") == (0, 0)
    caches[0].give_back("b")
    assert caches[1].spent("b") == (3, 0)


def test_tokens_are_booked_with_the_answer(path: Path) -> None:
    cache = AnswerCache(path)
    assert cache.take("b", None, 22)
    cache.keep("k", ANSWER, "b")
    assert cache.take("b", None, 22)
    cache.keep(None, ANSWER, "b")
    assert cache.spent("b") == (2, 22)
    assert not cache.take("b", None, 22) and cache.take("b", None, 23)


def test_threads_share_one_cache(path: Path) -> None:
    cache = AnswerCache(path)

    def work(start: int) -> None:
        for number in range(start, start + 40):
            cache.take("b", None, None)
            cache.keep(str(number), ANSWER, "b")
            assert cache.find([str(number)])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 160, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.spent("b") == (160, 160 * 11) and len(cache.find(list(map(str, range(160))))) == 160


def test_many_open_a_new_file_at_once(path: Path) -> None:
    together, opened, errors = threading.Barrier(8), [], []

    def work() -> None:
        together.wait()
        try:
            opened.append(AnswerCache(path))
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(opened) == 8


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all, but long enough to be looked at " * 40)
    before = path.read_bytes()
    with pytest.raises(UserError, match="notes.txt cannot be used for the judge's answers .*name another file"):
        AnswerCache(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE answers (question, answer)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match="is another program's database"):
        AnswerCache(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["other.sqlite"]


def test_a_later_format_is_refused(path: Path) -> None:
    AnswerCache(path).close()
    with sqlite3.connect(path) as later:
        later.execute("PRAGMA user_version = 2")
    with pytest.raises(UserError, match="format 2, and this version reads 1"):
        AnswerCache(path)


def test_a_file_broken_later_is_said(path: Path) -> None:
    cache = AnswerCache(path)
    for number in range(300):
        cache.keep(f"{number:064d}", ANSWER, "b")
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(UserError, match="delete it if it is broken"):
        AnswerCache(path).find(["0" * 64])


@pytest.mark.parametrize("kind", ["a folder", "below a file"])
def test_a_place_where_no_file_can_be(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another"):
        AnswerCache(tmp_path if kind == "a folder" else tmp_path / "file" / "answers.sqlite")
