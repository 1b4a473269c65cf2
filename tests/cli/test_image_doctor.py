"""`llmalign doctor` on images: status, output, limits, and what it refuses."""

from pathlib import Path

import pytest

from llmalign.cli import main
from tests.data_module.pictures import pair, png, write_lines, write_parquet


def doctor(*arguments: object) -> int:
    return main(["doctor", *map(str, arguments)])


def test_good_pairs_need_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair(i, i % 2) for i in range(4)])
    assert doctor(source, "--kind", "image_pairs", "--resolution", 16, "--row", 3) == 0
    out = capsys.readouterr().out
    assert "4 rows of image_pairs" in out and "smaller than resolution" in out and "Nothing above its limit." in out
    assert "row 3\ncaption: 'picture 3', 9 characters\nchosen: PNG RGB, 24 x 16 pixels" in out
    assert "label: 1, the probability" in out


def test_faults_are_listed_and_the_status_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair(i) for i in range(8)] + [pair(8, jpg_1=png()[:80]), pair(9, caption=None)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    command = [source, "--kind", "image_pairs", "--resolution", 17]
    assert doctor(*command) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "1 of 10 rows (10.0%) have an image that is missing or cannot be read; `max_unreadable` allows 0.0%" in out
    assert "row_id 8" in out and "`max_missing_caption`" in out and "9 of 10 rows (90.0%) have an image whose" in out
    allowed = ["--max_unreadable", "0.1", "--max-missing-caption=0.1", "--max_small", "1"]
    assert doctor(*command, *allowed) == 0
    assert doctor(*command, *allowed[:-1], "0.89") == 1
    capsys.readouterr()
    assert doctor(*command, *allowed, "--row", 8) == 0
    assert "80 bytes; is a damaged or truncated PNG file" in capsys.readouterr().out


def test_ties_are_counted_and_images_read_from_winners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_parquet(tmp_path / "a.parquet", [pair(0), pair(1, 0.5), pair(2, 0.0)])
    assert doctor(source, "--kind", "image_pairs") == 1
    assert "1 of 3 rows (33.3%) are ties" in " ".join(capsys.readouterr().out.split())
    assert doctor(source, "--kind", "images", "--row", 2) == 0
    out = capsys.readouterr().out
    assert "2 rows of images" in out and "row 2" in out and "ties" not in out


def test_columns_and_max_rows_are_those_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"words": f"w{i}", "a": png(i), "b": png(i + 9)} for i in range(5)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    columns = "{caption: words, chosen: a, rejected: b}"
    assert doctor(source, "--kind", "image_pairs", "--columns", columns, "--max_rows", 3) == 0
    assert "3 rows of image_pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "image_pairs", "--model", "m"], "--model is for text"),
        (["--kind", "images", "--max_length", "9"], "--max_length is for text"),
        (["--kind", "image_pairs", "--resolution", "0"], "--resolution must be at least 1, got 0"),
        (
            ["--kind", "image_pairs", "--max_missing_eos", "1"],
            "unknown key `max_missing_eos`; the nearest is `max_missing_caption`",
        ),
        (["--kind", "image_pairs", "--max_ties", "2"], "`max_ties` is a share of rows"),
        (["--kind", "image_pairs", "--max_ties", "many"], "`max_ties` takes a number"),
        (["--kind", "image_pairs", "--splitt", "x"], "`splitt`"),
        (["--kind", "image_pairs", "--row", "99"], "row_id 99; the last one is 0"),
        (["--kind", "pairs"], "name one with --model"),
        (["--kind", "prompts", "--model", "m", "--resolution", "64"], "--resolution is for images; prompts are text"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    source = write_parquet(tmp_path / "a.parquet", [pair(0)])
    assert doctor(source, *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
