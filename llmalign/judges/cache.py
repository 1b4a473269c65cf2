"""A judge's answers on disk, and what its budgets have spent: one SQLite file, for any number of processes.

Every answer is a transaction of its own in write-ahead mode: a process killed at any instant leaves the file whole and
loses only what had not arrived.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmalign.errors import UserError
from llmalign.judges.chat import Answer

APPLICATION_ID = 0x6C6D616A  # "lmaj", in the file's header: no other program's database is taken for one
FORMAT = 1
BUSY_SECONDS = 60.0
_KEYS_PER_QUERY = 500
_TABLES = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE budgets (name TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {FORMAT}",
    f"PRAGMA application_id = {APPLICATION_ID}",
)


class AnswerCache:
    """Answers by request key, and spendings by budget name; safe to share between threads and processes.

    Raises UserError for a file that is not such a database, and where it cannot be read or written. Not covered: two
    processes that ask the same question at the same moment both pay for it, and network file systems.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the judge's answers cannot be kept in {self.path} ({error.strerror}); name another cache file"
            ) from error
        with self._said():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._said():
                self._open()
        except UserError:
            self._connection.close()
            raise

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that are kept, by key, each marked as cached."""
        found: dict[str, Answer] = {}
        with self._lock, self._said():
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
                found |= {key: Answer.from_json(answer) for key, answer in rows}
        return found

    def keep(self, key: str | None, answer: Answer, budget: str) -> None:
        """Write an answer and book its tokens, both or neither; with `key` None only the tokens are booked."""
        with self._transaction():
            if key is not None:
                self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer.to_json()))
            tokens = answer.prompt_tokens + answer.completion_tokens
            self._connection.execute("UPDATE budgets SET tokens = tokens + ? WHERE name = ?", (tokens, budget))

    def forget(self, keys: Sequence[str]) -> None:
        """Drop answers, so that they are asked for again; what they cost stays on the books."""
        with self._transaction():
            self._connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])

    def take(self, budget: str, max_requests: int | None, max_tokens: int | None) -> bool:
        """Book one request unless the budget is spent, over all processes; whether it was booked."""
        with self._transaction():
            self._connection.execute("INSERT OR IGNORE INTO budgets VALUES (?, 0, 0)", (budget,))
            booked = self._connection.execute(
                "UPDATE budgets SET requests = requests + 1 WHERE name = ?1 "
                "AND (?2 IS NULL OR requests < ?2) AND (?3 IS NULL OR tokens < ?3)",
                (budget, max_requests, max_tokens),
            )
            return booked.rowcount == 1

    def give_back(self, budget: str) -> None:
        """Take one request off the books: it never left."""
        with self._transaction():
            self._connection.execute("UPDATE budgets SET requests = requests - 1 WHERE name = ?", (budget,))

    def spent(self, budget: str) -> tuple[int, int]:
        """Requests and tokens that a budget has spent, over all processes and runs."""
        with self._lock, self._said():
            row = self._connection.execute("SELECT requests, tokens FROM budgets WHERE name = ?", (budget,)).fetchone()
        return (0, 0) if row is None else (row[0], row[1])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _open(self) -> None:
        # Before anything is changed, and at one instant: another process may be making the tables.
        with self._transaction("DEFERRED"):
            self._recognise()
        self._write_ahead()
        # Whole after a kill; only a power cut may take the last answers.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            if not self._recognise():
                for statement in _TABLES:
                    self._connection.execute(statement)

    def _recognise(self) -> bool:
        """Whether the tables are there; False for a new file."""
        mark, form, tables = (
            self._connection.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if mark == 0 and tables == 0:
            return False
        if mark != APPLICATION_ID:
            raise UserError(f"{self.path} is another program's database; name another file for the judge's answers")
        if form != FORMAT:
            raise UserError(
                f"{self.path} holds a judge's answers in format {form}, and this version reads {FORMAT}; name another "
                "file"
            )
        return True

    def _write_ahead(self) -> None:
        # The switch fails at once, whatever the timeout, while another process makes it.
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        with self._lock, self._said():
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} cannot be used for the judge's answers ({error}); name another file, or delete it if it "
                "is broken"
            ) from error
