"""Comparisons by an oracle, each asked once: kept in SQLite by what was compared and by whom."""

import hashlib
import json
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.errors import UserError
from llmalign.rewards.model import Content
from llmalign.rewards.preference import Oracle


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and what else of its row the oracle is given."""

    prompt: Content
    first: str
    second: str
    columns: dict[str, Any]


class Comparisons:
    """P(first beats second) of pairs, from the file where it is known, in this order or the other, else of the oracle.

    A batch is kept whole or not at all, so that a run which is stopped asks its oracle the same batches again and gets
    the same numbers. `identity` stands for the oracle; another one's comparisons are not seen. Raises UserError where
    the file is no such database. A comparison that failed (NaN) is not kept.
    """

    def __init__(self, path: Path, oracle: Oracle, identity: str) -> None:
        #: comparisons that the oracle was asked for, and that were known
        self.asked = self.found = 0
        self.oracle, self._identity = oracle, identity
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path)
            self._database.execute(
                "create table if not exists comparisons (key blob primary key, p real) without rowid"
            )
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} cannot be used to keep comparisons in ({error}); move it away") from error

    def __enter__(self) -> "Comparisons":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def ask(self, pairs: Sequence[Pair]) -> list[float]:
        """P(first beats second) of each pair, NaN where the oracle could not say; equal answers are 0.5."""
        keys = [self._key(pair.prompt, pair.first, pair.second, pair.columns) for pair in pairs]
        turned = [self._key(pair.prompt, pair.second, pair.first, pair.columns) for pair in pairs]
        known = self._look_up({*keys, *turned})
        wanted: dict[bytes, Pair] = {}
        for pair, key, other in zip(pairs, keys, turned, strict=True):
            if pair.first != pair.second and not any(one in known or one in wanted for one in (key, other)):
                wanted[key] = pair
        fresh = dict(zip(wanted, self._judged(list(wanted.values())), strict=True))
        self._keep({key: p for key, p in fresh.items() if not math.isnan(p)})
        known |= fresh
        results = []
        for pair, key, other in zip(pairs, keys, turned, strict=True):
            if pair.first == pair.second:
                results.append(0.5)
                continue
            results.append(known[key] if key in known else 1 - known[other])
            self.found += key not in fresh and other not in fresh
        self.asked += len(fresh)
        return results

    def _judged(self, pairs: list[Pair]) -> list[float]:
        if not pairs:
            return []
        names = list(pairs[0].columns)
        columns = {name: [pair.columns[name] for pair in pairs] for name in names}
        prompts, first, second = zip(*((pair.prompt, pair.first, pair.second) for pair in pairs), strict=True)
        return self.oracle.preferences(list(prompts), list(first), list(second), **columns)

    def _key(self, prompt: Content, first: str, second: str, columns: dict[str, Any]) -> bytes:
        content = json.dumps([self._identity, prompt, first, second, columns], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).digest()

    def _look_up(self, keys: set[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        for key in keys:
            row = self._database.execute("select p from comparisons where key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = row[0]
        return found

    def _keep(self, fresh: dict[bytes, float]) -> None:
        with self._database:
            self._database.executemany("insert or ignore into comparisons values (?, ?)", fresh.items())
