"""Look a data set over as a trainer would see it, before any training.

The doctor reads rows that a trainer's preparation has tokenized (`prompt_ids` with `chosen_ids` and `rejected_ids` or
with `completion_ids`, or `input_ids` alone; untruncated, end-of-text included) beside the raw rows they came from.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from llmalign.data.overlong import drop_overlong
from llmalign.data.ragged import Ragged, tables
from llmalign.data.report import FAULTS, FIRST_ROWS, Finding, Limits, Report, RowReport, Shares, quantiles
from llmalign.data.show import show_row
from llmalign.errors import UserError

__all__ = ["Finding", "Limits", "Report", "drop_overlong", "examine", "refuse", "show_row"]

BATCH = 1000
STREAM_ROWS = 1000
TOKENS = {
    "pairs": {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"},
    "groups": {"prompt": "prompt_ids", "completions": "completion_ids"},
    "prompts": {"prompt": "prompt_ids"},
    "text": {"text": "input_ids"},
}
NOT_IN = {
    "text": ("identical", "empty_prompt", "not_prefix"),
    "prompts": ("identical", "empty", "truncated", "missing_eos", "doubled_eos", "not_prefix"),
}
RESPONSES = {
    "pairs": ("chosen", "rejected"), "groups": ("completions",), "prompts": (),
    "text": ("completion", "messages", "text"),
}  # fmt: skip


def examine(
    raw: Dataset | IterableDataset, prepared: Dataset | IterableDataset, tokenizer: Any, *, kind: str,
    max_length: int | None, eos_ids: Sequence[int], limits: Limits | None = None, stream_rows: int = STREAM_ROWS,
) -> Report:  # fmt: skip
    """Count the faults of a data set: `raw` as `load` gave it, `prepared` as a trainer tokenized it, both with row_id.

    kind: `pairs`, `groups`, `prompts` or `text`. A group shows a fault where any of its completions does; its
    responses are identical where all are. White space after an end-of-text token, as ChatML templates write it, is not
    a missing end. Rows that the preparation dropped are counted through their row_id; shares are of the raw rows. Of a
    stream the first `stream_rows` rows are examined, which the report says. Raises UserError when there is nothing to
    examine. Not covered: packed rows, and whether the answers are any good.
    """
    if kind not in TOKENS:
        raise UserError(f"The doctor knows {', '.join(TOKENS)}, not {kind!r}.")
    notes = []
    if isinstance(raw, IterableDataset):
        raw = Dataset.from_list(list(raw.take(stream_rows)))
        notes.append(f"a stream, of which the first {len(raw):,} rows were examined.")
    if not len(raw):
        raise UserError("There are no rows to examine.")
    if isinstance(prepared, IterableDataset):
        prepared = _same_rows(raw, prepared)
    check = _Check(tokenizer, kind, max_length, frozenset(eos_ids))
    check.raw(raw)
    if len(prepared):
        check.tokens(prepared)
        if kind != "text" and "prompt" not in prepared.column_names:
            notes.append("the prepared rows have no prompt text, so prompts were not compared with their tokens.")
    kept = set(prepared["row_id"][:]) if len(prepared) else set()
    check.add("dropped", [row_id for row_id in raw["row_id"][:] if row_id not in kept])
    return Report(
        kind=kind,
        rows=len(raw),
        prepared_rows=len(prepared),
        max_length=max_length,
        findings={name: Finding(len(rows), tuple(rows[:FIRST_ROWS])) for name, rows in check.found.items()},
        lengths={name: quantiles(np.concatenate(parts)) for name, parts in check.lengths.items()},
        duplicate_prompts=check.repeated_prompts,
        limits=limits or Limits(),
        notes=tuple(notes),
    )


def refuse(report: RowReport, limits: Shares | None = None) -> None:
    """Raise UserError listing every fault above its limit; return when there is none."""
    problems = report.problems(limits)
    if len(problems) == 1:
        raise UserError(f"refused, {problems[0]}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(f"refused for {len(problems)} reasons:\n{listed}")


def _same_rows(raw: Dataset, prepared: IterableDataset) -> Dataset:
    """What the preparation made of exactly these rows; it may drop rows but keeps their order."""
    ids = set(raw["row_id"][:])
    rows = itertools.takewhile(lambda row: row["row_id"] in ids, prepared)
    return Dataset.from_list(list(itertools.islice(rows, len(raw))))


class _Check:
    """Goes over a data set batch by batch and remembers which rows showed what."""

    def __init__(self, tokenizer: Any, kind: str, max_length: int | None, eos_ids: frozenset[int]) -> None:
        self.tokenizer, self.kind, self.max_length, self.eos_ids = tokenizer, kind, max_length, eos_ids
        self.found: dict[str, list[int]] = {name: [] for name in FAULTS if name not in NOT_IN.get(kind, ())}
        self.lengths: dict[str, list[np.ndarray]] = defaultdict(list)
        self.repeated_prompts = 0
        self._prompts: set[int] = set()
        self._white: dict[int, bool] = {}

    def add(self, fault: str, row_ids: Iterable[int]) -> None:
        self.found[fault].extend(map(int, row_ids))

    def raw(self, rows: Dataset) -> None:
        """Duplicates, identical and empty responses, from the text."""
        names = [name for name in ("prompt", *RESPONSES[self.kind]) if name in rows.column_names]
        seen: set[int] = set()
        for batch in rows.select_columns(["row_id", *names]).iter(batch_size=BATCH):
            for index, row_id in enumerate(batch["row_id"]):
                row = {name: batch[name][index] for name in names}
                key = hash(tuple(map(_frozen, row.values())))
                if key in seen:
                    self.add("duplicates", [row_id])
                seen.add(key)
                responses = _responses(row, self.kind)
                if len(responses) > 1 and all(response == responses[0] for response in responses):
                    self.add("identical", [row_id])
                elif "prompt" not in row and self.kind == "pairs" and isinstance(responses[0], str):
                    if responses[0].startswith(responses[1]) or responses[1].startswith(responses[0]):
                        self.add("empty", [row_id])  # nothing is left of one once the shared beginning is taken off
                if any(_is_empty(response) for response in responses):
                    self.add("empty", [row_id])

    def tokens(self, prepared: Dataset) -> None:
        """Lengths, ends, and whether prompts are prefixes, from the ids."""
        parts = TOKENS[self.kind]
        text = ["prompt"] if self.kind != "text" and "prompt" in prepared.column_names else []
        for table in tables(prepared, ["row_id", *parts.values(), *text], BATCH):
            row_ids = table.column("row_id").to_numpy()
            ragged = {name: Ragged.of(table.column(column)) for name, column in parts.items()}
            self._measure(row_ids, ragged)
            if self.kind != "prompts":
                self._check_ends(row_ids, [part for name, part in ragged.items() if name != "prompt"])
            if text:
                prompts = table.column("prompt").to_pylist()
                self._count_repeated(prompts)
                if self.kind != "prompts":
                    self._check_prompts(row_ids, prompts, ragged["prompt"])

    def _measure(self, row_ids: np.ndarray, parts: dict[str, Ragged]) -> None:
        longest = np.zeros(len(row_ids), dtype=np.int64)
        before = parts["prompt"].lengths if "prompt" in parts else longest
        for name, part in parts.items():
            self.lengths[name].append(part.lengths)
            if name != "prompt":
                np.maximum.at(longest, part.owner, before[part.owner] + part.lengths)
        if "prompt" in parts:
            self.add("empty_prompt", row_ids[before == 0])
        if self.kind == "prompts":
            return
        if "prompt" in parts:
            self.lengths["prompt + longest response"].append(longest)
        if self.max_length is not None:
            self.add("truncated", row_ids[longest > self.max_length])

    def _check_ends(self, row_ids: np.ndarray, parts: list[Ragged]) -> None:
        missing = np.zeros(len(row_ids), dtype=bool)
        doubled = np.zeros(len(row_ids), dtype=bool)
        for part in parts:
            ends = np.array([self._ends_of(part.sequence(index)) for index in range(len(part.owner))], dtype=np.int64)
            missing |= part.any_by_row(ends == 0)
            doubled |= part.any_by_row(ends > 1)
        self.add("missing_eos", row_ids[missing])
        self.add("doubled_eos", row_ids[doubled])

    def _ends_of(self, ids: np.ndarray) -> int:
        """How many end-of-text tokens a response ends with, white space left out; 2 stands for more."""
        count = 0
        for token in map(int, ids[::-1]):
            if token in self.eos_ids:
                count += 1
            elif not self._is_white(token):
                break
            if count == 2:
                break
        return count

    def _is_white(self, token: int) -> bool:
        if token not in self._white:
            special = token in self.tokenizer.all_special_ids
            self._white[token] = not special and not self.tokenizer.decode([token]).strip()
        return self._white[token]

    def _check_prompts(self, row_ids: np.ndarray, prompts: list[Any], tokens: Ragged) -> None:
        if isinstance(prompts[0], str):
            expected = self.tokenizer(prompts)["input_ids"]
        else:
            texts = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            expected = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        changed = [not np.array_equal(ids, tokens.sequence(index)) for index, ids in enumerate(expected)]
        self.add("not_prefix", row_ids[np.array(changed)])

    def _count_repeated(self, prompts: list[Any]) -> None:
        for prompt in prompts:
            key = hash(_frozen(prompt))
            self.repeated_prompts += key in self._prompts
            self._prompts.add(key)


def _responses(row: dict[str, Any], kind: str) -> list[Any]:
    if kind == "groups":
        return row["completions"]
    return [row[name] for name in RESPONSES[kind] if name in row]


def _is_empty(response: Any) -> bool:
    return not (response if isinstance(response, str) else response[-1]["content"]).strip()


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
