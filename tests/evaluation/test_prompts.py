"""Prompts out of every kind of file, and bad ones named."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmalign.data.specs import DataSource
from llmalign.errors import UserError
from llmalign.evaluation.prompts import Prompt, read_prompts

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def test_texts_conversations_and_data_sets(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "dataset": "one"}, {"prompt": CHAT}, {"prompt": CHAT[1:], "dataset": None}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(tmp_path / "p.jsonl")
    assert found == [Prompt("a", "one"), Prompt(CHAT), Prompt(CHAT[1:])]
    assert [one.instruction for one in found] == ["a", "system: be kind\nuser: hello", "hello"]


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"instruction": "one", "dataset": "d"}, {"instruction": "two, or more", "dataset": "d"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    with open(tmp_path / "p.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["instruction", "dataset"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.json", "p.jsonl.gz", "p.csv", "p.parquet"):
        assert read_prompts(tmp_path / name) == [Prompt("one", "d"), Prompt("two, or more", "d")], name
    lines = "\ufeffone\n\n two, or more \r\n"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("p.txt", "p.txt.gz"):
        assert read_prompts(tmp_path / name) == [Prompt("one"), Prompt("two, or more")], name


def test_columns_rows_and_how_many(tmp_path: Path) -> None:
    rows = [{"q": {"text": str(i)}, "kind": "odd" if i % 2 else "even", "prompt": "not this"} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"instruction": "q.text", "dataset": "kind"}
    source = DataSource(str(tmp_path / "p.jsonl"), columns=columns, where={"kind": "odd"}, max_rows=2)
    assert read_prompts(source) == [Prompt("1", "odd"), Prompt("3", "odd")]
    without = DataSource(str(tmp_path / "p.jsonl"), columns={"dataset": None})
    assert read_prompts(without)[0] == Prompt("not this")


def test_repeated_prompts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    with caplog.at_level("INFO"):
        assert len(read_prompts(tmp_path / "p.txt")) == 3
    assert "1 of 3 prompts stand there before" in caplog.text


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"text": "x"}', "p.jsonl, line 1: has no 'instruction' and no 'prompt'; it has: text"),
        ('{"prompt": "a"}\n{"prompt": " "}', "line 2: 'prompt' is empty"),
        ('{"prompt": "a"}\n{"other": "b"}', "line 2: has no 'prompt'"),
        ('{"prompt": 3}', "line 1: 'prompt' must be text"),
        ('{"prompt": [{"role": "user"}]}', "line 1: message 1 of 'prompt' must have"),
        ('{"prompt": [{"role": "assistant", "content": "b"}]}', "line 1: .* nothing to answer"),
        ('{"prompt": "a", "dataset": 3}', "line 1: 'dataset' must be a name"),
        ("", "empty"),
        ("{", "line 1 is not valid JSON"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "name, content", [("p.txt", b"\n"), ("p.txt", b"\xff"), ("p.txt.gz", b"no gzip"), ("q.txt", None)]
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} (is empty|cannot be read)"):
        read_prompts(tmp_path / name)


def test_lines_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(UserError, match="there are no columns"):
        read_prompts(DataSource(str(tmp_path / "p.txt"), columns={"instruction": "x"}))
    with pytest.raises(UserError, match="unknown key 'instructions'"):
        read_prompts(DataSource(str(tmp_path / "p.jsonl"), columns={"instructions": "x"}))
