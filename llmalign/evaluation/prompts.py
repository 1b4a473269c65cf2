"""Prompts to answer: texts or conversations out of files, data sets and plain lines, each with its data set's name."""

import gzip
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.data import checks
from llmalign.data.checks import Content, Fault
from llmalign.data.formats import at, matches, nothing_matches
from llmalign.data.readers import open_shards
from llmalign.data.specs import DataSource, check_keys
from llmalign.errors import UserError
from llmalign.judges.template import render

logger = logging.getLogger(__name__)

NAMES = ("instruction", "prompt")  # the first that a data set has holds the prompt
DATASET = "dataset"
LINES = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Prompt:
    """A text or a conversation to answer, and the data set that it says it is from."""

    content: Content
    dataset: str | None = None

    @property
    def instruction(self) -> str:
        """What outputs and annotations know it by: the text; of a conversation its only message, or all as lines."""
        return render(self.content, answer=True)

    def messages(self, system: str | None = None) -> list[dict[str, str]]:
        """The conversation to answer; a system message of its own comes before `system`, which is then left out."""
        own = [{"role": "user", "content": self.content}] if isinstance(self.content, str) else list(self.content)
        has_one = own[0]["role"] in ("system", "developer")
        return own if system is None or has_one else [{"role": "system", "content": system}, *own]


def read_prompts(data: DataSource | Path | str) -> list[Prompt]:
    """The prompts of a file or a source: a line each of a .txt file, else its rows' column `instruction` or `prompt`.

    `columns` may map `instruction`, `prompt` and `dataset`; other columns are not read. Raises UserError, naming file
    and row, for a row without a prompt, an empty one, or one that ends with the assistant's words.
    """
    source = data if isinstance(data, DataSource) else DataSource(str(data))
    prompts = _lines(source) if source.path.endswith(LINES) else _rows(source)
    repeated = len(prompts) - len({prompt.instruction for prompt in prompts})
    if repeated:
        logger.info("%d of %d prompts stand there before; each is answered.", repeated, len(prompts))
    return prompts


def _lines(source: DataSource) -> list[Prompt]:
    if source.columns or source.where or source.split:
        raise UserError(f"{source.path} holds lines, so there are no columns, rows or splits to choose in it.")
    file = Path(source.path).expanduser()
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    found = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{file} is empty: it holds no prompts.")
    return found[: source.max_rows]


def _rows(source: DataSource) -> list[Prompt]:
    check_keys(source.columns or {}, (*NAMES, DATASET), "`columns` for prompts")
    found = []
    for prompt in _read(source):
        found.append(prompt)
        if len(found) == source.max_rows:
            break
    return found


def _read(source: DataSource) -> Iterator[Prompt]:
    shards = open_shards(source, streaming=False)
    columns = source.columns or {}
    name: str | None = None
    for shard in shards:
        for number, row in shard.rows():
            try:
                if matches(row, source.where):
                    name = name or _prompt_column(row, columns)
                    yield _prompt(row, name, columns)
            except Fault as fault:
                raise at(shard, number, fault) from None
    if name is None:
        raise nothing_matches(shards, source)


def _prompt_column(row: dict[str, Any], columns: dict[str, Any]) -> str:
    """Where the prompt is, by the first row and what `columns` says."""
    for name in NAMES:
        if columns.get(name) is not None:
            return str(columns[name])
    for name in NAMES:
        if name not in columns and row.get(name) is not None:
            return name
    raise Fault(
        f"has no 'instruction' and no 'prompt'; it has: {', '.join(row)}; say with `columns: {{instruction: NAME}}` "
        "what holds the prompt"
    )


def _prompt(row: dict[str, Any], name: str, columns: dict[str, Any]) -> Prompt:
    value = checks.pick(row, name)
    content = checks.content(name, value, isinstance(value, list))
    last = content if isinstance(content, str) else content[-1]["content"]
    if not last.strip():
        raise Fault(f"{name!r} is empty")
    if not isinstance(content, str) and content[-1]["role"] == "assistant":
        raise Fault(f"{name!r} ends with the assistant's words, so there is nothing to answer")
    dataset = row.get(DATASET) if DATASET not in columns else columns[DATASET] and checks.pick(row, columns[DATASET])
    if not isinstance(dataset, str | None):
        raise Fault(f"{DATASET!r} must be a name, not {type(dataset).__name__}")
    return Prompt(content, dataset)
