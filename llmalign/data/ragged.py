"""Columns of token lists as flat arrays, so that thousands of rows are measured without a Python list for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths laid end to end: sequence n is values[offsets[n] : offsets[n + 1]].

    values: (tokens,), offsets: (N + 1,), owner: (N,) the row of the batch that each sequence belongs to.
    """

    values: np.ndarray
    offsets: np.ndarray
    owner: np.ndarray
    rows: int

    @classmethod
    def of(cls, column: Any) -> "Ragged":
        """From an Arrow column of lists of ids, or of lists of such lists (completions of a group)."""
        lists = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
        rows = len(lists)
        owner = np.arange(rows)
        if pyarrow.types.is_list(lists.type.value_type) or pyarrow.types.is_large_list(lists.type.value_type):
            outer = lists.offsets.to_numpy()
            owner = np.repeat(owner, np.diff(outer))
            lists = lists.values.slice(outer[0], outer[-1] - outer[0])
        return cls(lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy(), owner, rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, (N,)."""
        return np.diff(self.offsets)

    def sequence(self, index: int) -> np.ndarray:
        """The ids of one sequence."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def any_by_row(self, mask: np.ndarray) -> np.ndarray:
        """Whether any sequence of a row is marked, (rows,) bool."""
        return np.bincount(self.owner[mask], minlength=self.rows) > 0


def tables(dataset: Dataset, columns: Sequence[str], batch_size: int) -> Iterator[Any]:
    """The columns as Arrow tables of `batch_size` rows."""
    yield from dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=batch_size)
