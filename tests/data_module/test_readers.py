"""Every kind of file and folder gives the same rows, and every fault names the file and the line."""

import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llmalign.data.formats import load
from llmalign.errors import UserError

ROWS = [
    {"prompt": "Name a fruit. ", "chosen": "An apple.", "rejected": 'A brick,\nor "two".'},
    {"prompt": "Größe? ", "chosen": "Fünf.", "rejected": "Ω"},
    {"prompt": "Say no. ", "chosen": "No.", "rejected": "Yes."},
]


def as_csv(rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def content(dataset) -> list[dict]:
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in dataset]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file(write, tmp_path, name):
    if name == "a.parquet":
        path = str(tmp_path / name)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path = write(name, as_csv(ROWS) if ".csv" in name else json.dumps(ROWS) if name == "a.json.gz" else ROWS)
    found = load(path, kind="pairs")
    assert content(found) == ROWS
    assert found["row_id"][:] == [0, 1, 2] and found.features["row_id"].dtype == "int64"


def test_json_lines_under_the_name_of_json_are_read(write):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert content(load(write("a.json", lines), kind="pairs")) == ROWS


def test_a_byte_order_mark_and_blank_lines_are_passed_over(write):
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)
    assert content(load(write("a.jsonl", lines), kind="pairs")) == ROWS


def test_a_rewritten_file_is_read_again(write):
    path = write("a.jsonl", ROWS)
    load(path, kind="pairs")
    changed = [ROWS[0] | {"chosen": "An orange"}, *ROWS[1:]]  # as many bytes as before
    assert content(load(write("a.jsonl", changed), kind="pairs")) == changed


def test_a_folder_is_its_files_in_order_and_hidden_ones_are_not(write, tmp_path):
    for index, row in enumerate(ROWS):
        write(f"set/part-{2 - index}.jsonl", [row])
    write("set/.hidden/a.jsonl", "not json")
    write("set/README.md", "# not data")
    assert content(load(str(tmp_path / "set"), kind="pairs")) == ROWS[::-1]


def test_a_folder_s_splits_are_names_of_files_or_folders(write, tmp_path):
    write("set/train-00000.jsonl", ROWS[:1])
    write("set/test.jsonl", ROWS[1:2])
    write("set/validation/part.jsonl", ROWS[2:])
    write("set/testimony.jsonl", "not json")
    for split, rows in (("train", ROWS[:1]), ("test", ROWS[1:2]), ("validation", ROWS[2:])):
        assert content(load({"path": str(tmp_path / "set"), "split": split}, kind="pairs")) == rows
    assert content(load(str(tmp_path / "set"), kind="pairs")) == ROWS[:1]
    with pytest.raises(UserError, match="no files of the split 'dev'"):
        load({"path": str(tmp_path / "set"), "split": "dev"}, kind="pairs")


def test_a_folder_with_a_test_file_alone_is_not_trained_on(write, tmp_path):
    write("set/test.jsonl", ROWS)
    with pytest.raises(UserError, match="no files of the split 'train'"):
        load(str(tmp_path / "set"), kind="pairs")


def test_saved_data_sets(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved.select([0]), "test": saved.select([1, 2])}).save_to_disk(str(tmp_path / "two"))
    assert content(load(str(tmp_path / "one"), kind="pairs")) == ROWS
    assert content(load({"path": str(tmp_path / "two"), "split": "test"}, kind="pairs")) == ROWS[1:]
    with pytest.raises(UserError, match="no split 'dev'; it has: train, test"):
        load({"path": str(tmp_path / "two"), "split": "dev"}, kind="pairs")
    with pytest.raises(UserError, match="has no splits"):
        load({"path": str(tmp_path / "one"), "split": "test"}, kind="pairs")


def refusal(path: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        load({"path": path, **options}, kind="pairs")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.jsonl.gz", "", "a.jsonl.gz is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", "  ", "a.json is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "prompt,chosen,rejected\n", "a.csv is empty"),
        ("a.jsonl", json.dumps(ROWS[0]) + '\n{"prompt": "a", "cho', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", json.dumps(ROWS[0]) + "\n[1]\n", "a.jsonl, line 2 must be a mapping"),
        ("a.json", '[{"prompt": "a",\n "chosen": }]', "line 2, column 12"),
        ("a.json", json.dumps([ROWS[0], 3]), "a.json, row 2 must be a mapping"),
        ("a.json", '"text"', "must hold a list of rows"),
        ("a.csv", 'prompt,chosen,rejected\na,b,c\na,b\n', "a.csv, line 3 has 2 cells, the header 3"),
        ("a.csv", 'prompt,chosen,chosen\na,b,c\n', "names a column twice"),
        ("a.csv", 'prompt,chosen,rejected\na,b,"c\n', "is not valid CSV"),
        ("a.txt", "hello", "is of no kind that can be read"),
    ],
)  # fmt: skip
def test_a_faulty_file_gets_one_sentence_with_its_line(write, name, text, words):
    assert words in refusal(write(name, text))


def test_an_empty_parquet_file(tmp_path):
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ROWS[0]])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert "is empty" in refusal(str(tmp_path / "a.parquet"))


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a whole Parquet file" in refusal(str(path))


@pytest.mark.parametrize("damage", ["cut", "checksum", "not gzip"])
def test_a_damaged_gzip_file(tmp_path, damage):
    rows = [{"prompt": f"Question {index}? ", "chosen": str(index**9), "rejected": "no"} for index in range(3000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    broken = {"cut": whole[: len(whole) // 2], "checksum": whole[:-8] + b"\0" * 8, "not gzip": b"{}" + whole[2:]}
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(broken[damage])
    assert "a.jsonl.gz is a truncated or damaged gzip file" in refusal(str(path))


def test_a_failed_read_leaves_no_half_written_rows(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(ROWS[0]) + "\n") * 3000 + "{", encoding="utf-8")
    assert "line 3001" in refusal(str(path))
    assert not [file for file in cache.rglob("*") if file.suffix in (".arrow", ".json")]


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "is not UTF-8 text" in refusal(str(path))


def test_half_a_surrogate_pair(write):
    path = write("a.jsonl", '{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}\n')
    assert "line 1: 'chosen' holds half of a surrogate pair" in refusal(path)


def test_what_is_not_there(tmp_path, write):
    assert "There is no file or folder" in refusal(str(tmp_path / "a.jsonl"))
    assert "There is no file or folder" in refusal("./nothing")
    assert "neither a file, nor a folder" in refusal("some data: mine")
    (tmp_path / "empty").mkdir()
    assert "holds no file that can be read" in refusal(str(tmp_path / "empty"))
    assert "There is no sample sample:pears" in refusal("sample:pears")
    assert "one file and has no split 'test'" in refusal(write("a.jsonl", ROWS), split="test")


def test_a_hub_name_without_a_network_gets_one_sentence():
    said = refusal("some-owner/no-such-pairs")
    assert said.startswith("some-owner/no-such-pairs is no local file or folder") and "network" in said


def test_a_file_that_may_not_be_read(tmp_path, write):
    path = Path(write("a.jsonl", ROWS))
    path.unlink()
    path.mkdir()
    assert "holds no file that can be read" in refusal(str(path))


def test_a_folder_may_mix_kinds_of_files(write, tmp_path):
    flagged = [row | {"flipped": bool(index % 2)} for index, row in enumerate(ROWS)]
    write("set/a.jsonl", flagged[:1])
    write("set/b.csv", as_csv(flagged[1:]))
    found = load(str(tmp_path / "set"), kind="pairs")
    assert content(found) == ROWS and found["flipped"][:] == [False, True, False]
