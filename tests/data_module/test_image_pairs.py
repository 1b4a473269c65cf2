"""Pairs out of prompts with several images: which, what is written, and what is said of rows that give none."""

import csv
import errno
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from llmalign.data import image_pairs
from llmalign.data.image_pairs import write_image_pairs
from llmalign.data.images import load_image_rows
from llmalign.data.pair_files import PairOptions, form_of, write_pairs
from llmalign.data.specs import DataSource
from llmalign.errors import UserError
from tests.data_module.pictures import file_of, png, write_parquet

Rows = list[dict[str, Any]]
PNGS = [png(seed) for seed in range(6)]


def grey(level: int) -> bytes:
    return file_of(Image.new("RGB", (4, 4), (level, level, level)))


def write(folder: Path, rows: Rows, name: str = "images.jsonl") -> DataSource:
    """JSON lines with the images, given as bytes, in files of their own beside them; texts stay as they are."""
    for index, row in enumerate(rows):
        if isinstance(row.get("images"), list):
            rows[index] = {**row, "images": [beside(folder, index, *one) for one in enumerate(row["images"])]}
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(folder / name))


def beside(folder: Path, index: int, place: int, data: Any) -> Any:
    if not isinstance(data, bytes):
        return data
    (folder / f"{index:03d}-{place}.png").write_bytes(data)
    return f"{index:03d}-{place}.png"


def read(path: Path) -> Rows:
    return pyarrow.parquet.read_table(path).to_pylist()


def brightness(prompts: list[str], images: list[Image.Image]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def test_pairs_hold_the_files_and_every_row_is_counted(tmp_path: Path) -> None:
    source = write(tmp_path, [
        {"prompt": "one", "images": PNGS[:3], "rewards": [0.5, -1.0, 2.0], "seeds": [1, 2, 3]},
        {"prompt": "tied", "images": PNGS[:2], "rewards": [1.0, 1.0]},
        {"prompt": "alone", "images": PNGS[:1], "rewards": [1.0]},
        {"prompt": "", "images": PNGS[2:5], "rewards": [None, 0.25, 0.5]},
        {"prompt": "unscored", "images": PNGS[:2], "rewards": None},
        {"prompt": "same", "images": [PNGS[0], PNGS[0]], "rewards": [1.0, 2.0]},
        {"prompt": "nan", "images": PNGS[:2], "rewards": [math.nan, 2.0]},
        {"prompt": "none", "images": [], "rewards": []},
    ])  # fmt: skip
    report = write_image_pairs(source, tmp_path / "deep" / "pairs.parquet")
    assert read(tmp_path / "deep" / "pairs.parquet") == [
        {"prompt": "one", "chosen": PNGS[2], "rejected": PNGS[1], "chosen_reward": 2.0, "rejected_reward": -1.0,
         "margin": 3.0, "row_id": 0},
        {"prompt": "", "chosen": PNGS[4], "rejected": PNGS[3], "chosen_reward": 0.5, "rejected_reward": 0.25,
         "margin": 0.25, "row_id": 3},
    ]  # fmt: skip
    assert (report.rows, report.rows_with_pairs, report.pairs, report.margins) == (8, 2, 2, 3.25)
    assert report.dropped == Counter({"unscored": 4, "alone": 4, "ties": 1, "identical": 1})
    schema = pyarrow.parquet.read_schema(tmp_path / "deep" / "pairs.parquet")
    assert [str(schema.field(name).type) for name in ("prompt", "chosen", "rejected", "margin", "row_id")] == [
        "string", "binary", "binary", "double", "int64",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pairs.parquet"]  # nothing is left aside


def test_a_reward_takes_the_place_of_the_rows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [[10, 200, 30], [90, 80], [5, 250, 100, 60], [7, 9]]
    rows = [
        {"caption": f"row {i}", "images": [grey(level) for level in own], "rewards": None}
        for i, own in enumerate(levels)
    ]
    source = write(tmp_path, rows)
    calls: list[tuple[list[str], int]] = []

    def score(prompts: list[str], images: list[Image.Image]) -> list[float | None]:
        assert all(image.mode == "RGB" for image in images)
        calls.append((prompts, len(images)))
        return [None if value > 0.97 else value for value in brightness(prompts, images)]

    def made() -> Rows:
        calls.clear()
        write_image_pairs(source, tmp_path / "pairs.parquet", score=score, overwrite=True)
        return read(tmp_path / "pairs.parquet")

    together = made()
    assert [(row["chosen"], row["rejected"]) for row in together] == [
        (grey(200), grey(10)), (grey(90), grey(80)), (grey(100), grey(5)), (grey(9), grey(7)),
    ]  # fmt: skip
    assert together[2]["chosen_reward"] == pytest.approx(100 / 255) and together[2]["margin"] == pytest.approx(95 / 255)
    prompts = [f"row {i}" for i, own in enumerate(levels) for _ in own]
    assert calls == [(prompts, 11)]  # all images of all rows at once, each with its own prompt
    monkeypatch.setattr(image_pairs, "SCORED_AT_ONCE", 5)
    assert made() == together and calls == [(prompts[:5], 5), (prompts[5:], 6)]
    monkeypatch.setattr(image_pairs, "SCORED_AT_ONCE", 1)
    assert made() == together and [count for _, count in calls] == [3, 2, 4, 2]


@pytest.mark.parametrize("wrong", [[1.0], [1.0] * 3, []])
def test_a_reward_of_another_length_is_refused(tmp_path: Path, wrong: list[float]) -> None:
    source = write(tmp_path, [{"prompt": "p", "images": PNGS[:2]}])
    with pytest.raises(UserError, match=rf"The reward gave {len(wrong)} numbers for 2 images"):
        write_image_pairs(source, tmp_path / "pairs.parquet", score=lambda prompts, images: wrong)


@pytest.mark.parametrize("form", ["bytes", "mapping", "saved", "columns", "json", "csv"])
def test_every_kind_of_source(tmp_path: Path, form: str) -> None:
    rewards, source = [0.5, 2.0, 1.0], DataSource(str(tmp_path / "in.parquet"))
    images: list[Any] = PNGS[:3]
    if form == "mapping":
        images = [{"bytes": data, "path": "elsewhere.png"} for data in images]
    if form in ("bytes", "mapping"):
        write_parquet(tmp_path / "in.parquet", [{"text": "p", "images": images, "rewards": rewards}])
    elif form == "columns":
        row = {"p": "p", **{f"i{k}": data for k, data in enumerate(images)}, "s": {"r": rewards}}
        write_parquet(tmp_path / "in.parquet", [row])
        source = DataSource(source.path, columns={"prompt": "p", "images": ["i0", "i1", "i2"], "rewards": "s.r"})
    elif form == "saved":
        features = datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "rewards": datasets.List(datasets.Value("float64")),
            }
        )
        rows = {"prompt": ["p"], "images": [[{"bytes": data, "path": None} for data in images]], "rewards": [rewards]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        source = DataSource(str(tmp_path / "saved"))
    elif form == "json":
        write(tmp_path, [{"prompt": "p", "images": images, "rewards": rewards}])
        lines = (tmp_path / "images.jsonl").read_text().splitlines()
        (tmp_path / "in.json").write_text(f"[{','.join(lines)}]")
        source = DataSource(str(tmp_path / "in.json"))
    else:
        paths = [beside(tmp_path, 0, place, data) for place, data in enumerate(images)]
        with (tmp_path / "in.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["prompt", "images", "rewards"], ["p", json.dumps(paths), json.dumps(rewards)]])
        source = DataSource(str(tmp_path / "in.csv"))
    write_image_pairs(source, tmp_path / "pairs.parquet")
    (row,) = read(tmp_path / "pairs.parquet")
    assert (row["prompt"], row["chosen"], row["rejected"], row["margin"]) == ("p", PNGS[1], PNGS[0], 1.5)


def test_csv_columns_of_one_image_and_one_reward_each(tmp_path: Path) -> None:
    for place, data in enumerate(PNGS[:2]):
        beside(tmp_path, 0, place, data)
    (tmp_path / "in.csv").write_text("q,a,b,x,y\np,000-0.png,000-1.png,1.5,2\nr,000-0.png,000-1.png,1,\n")
    columns = {"prompt": "q", "images": ["a", "b"], "rewards": ["x", "y"]}
    report = write_image_pairs(DataSource(str(tmp_path / "in.csv"), columns=columns), tmp_path / "pairs.parquet")
    assert [row["chosen"] for row in read(tmp_path / "pairs.parquet")] == [PNGS[1]] and report.dropped["unscored"] == 1


def test_rows_are_chosen_and_keep_their_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "images": PNGS[:2], "rewards": [i, 0], "keep": i != 2} for i in range(1, 7)]
    source = write(tmp_path, rows)
    source = DataSource(source.path, where={"keep": True}, max_rows=3)
    write_image_pairs(source, tmp_path / "pairs.parquet")
    assert [row["row_id"] for row in read(tmp_path / "pairs.parquet")] == [0, 2, 3]
    with pytest.raises(UserError, match="has no row where keep = 'maybe'; keep is one of True, False"):
        write_image_pairs(DataSource(source.path, where={"keep": "maybe"}), tmp_path / "none.parquet")


def test_strategies_margin_and_limit(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "p", "images": PNGS[:4], "rewards": [2.0, 0.0, 3.0, 1.0]}])

    def made(**options: Any) -> list[tuple[int, int]]:
        write_image_pairs(source, tmp_path / "p.parquet", options=PairOptions(**options), overwrite=True)
        return [(PNGS.index(row["chosen"]), PNGS.index(row["rejected"])) for row in read(tmp_path / "p.parquet")]

    assert made() == [(2, 1)]
    assert made(strategy="all_pairs") == [(0, 1), (2, 0), (0, 3), (2, 1), (3, 1), (2, 3)]
    assert made(strategy="all_pairs", margin=2.0) == [(0, 1), (2, 1), (2, 3)]
    assert len(made(strategy="all_pairs", max_pairs=2)) == 2
    assert {made(strategy="best_random", seed=seed)[0] for seed in range(20)} == {(2, 0), (2, 1), (2, 3)}


def test_a_row_has_the_same_pairs_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "images": PNGS[:5], "rewards": [k * (i + 1) for k in range(5)]} for i in range(50)]
    whole, part = write(tmp_path, list(rows)), write(tmp_path, rows[:1] * 20 + rows[20:], "part.jsonl")

    def made(source: DataSource, seed: int = 0) -> Rows:
        options = PairOptions("all_pairs", max_pairs=3, seed=seed)
        write_image_pairs(source, tmp_path / "p.parquet", options=options, overwrite=True)
        return read(tmp_path / "p.parquet")

    first = made(whole)
    content = (tmp_path / "p.parquet").read_bytes()
    assert len(first) == 150  # more than are written together
    assert [row for row in made(part) if row["row_id"] >= 20] == [row for row in first if row["row_id"] >= 20]
    assert made(whole, seed=1) != first and made(whole) == first
    assert (tmp_path / "p.parquet").read_bytes() == content


def test_pairs_are_read_back_as_training_reads_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "images": [grey(10 * i + 5), grey(10 * i), grey(10 * i + 2)]} for i in range(4)]
    write_image_pairs(write(tmp_path, rows), tmp_path / "pairs.parquet", score=brightness)
    found = load_image_rows(str(tmp_path / "pairs.parquet"), kind="image_pairs")
    assert found[:] == {
        "row_id": [0, 1, 2, 3],
        "caption": ["p0", "p1", "p2", "p3"],
        "chosen": [grey(10 * i + 5) for i in range(4)],
        "rejected": [grey(10 * i) for i in range(4)],
        "label": [1.0] * 4,
    }


GOOD = {"prompt": "p", "images": PNGS[:2], "rewards": [1, 2]}
CUT = PNGS[0][:300]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": [PNGS[0], b"no image"]}, "line 2: 'images[1]' is no image that can be read"),
        ({"images": [PNGS[0], CUT]}, "line 2: 'images[1]' is a damaged or truncated PNG file"),
        (
            {"images": [PNGS[0], "absent.png"]},
            "line 2: 'images[1]' is the path 'absent.png', and there is no such file",
        ),
        (
            {"images": [PNGS[0], "../x.png"]},
            "line 2: 'images[1]' is the path '../x.png'; paths must be relative",
        ),
        ({"images": [PNGS[0], "/etc/hostname"]}, "is the path '/etc/hostname'; paths must be relative"),
        ({"images": [PNGS[0], None]}, "line 2: 'images[1]' is null"),
        ({"images": [PNGS[0], 3]}, "line 2: 'images[1]' must be the bytes of an image"),
        ({"images": "a.png"}, "line 2: 'images' must be a list, not str"),
        ({"images": None}, "line 2: 'images' must be a list, not NoneType"),
        ({"prompt": None}, "line 2: 'prompt' is null"),
        ({"prompt": 3}, "line 2: 'prompt' must be text"),
        ({"prompt": [{"role": "user", "content": "p"}]}, "line 2: 'prompt' is a list, but the rest"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    source = write(tmp_path, [GOOD, {**GOOD, **row}])
    with pytest.raises(UserError) as refused:
        write_image_pairs(source, tmp_path / "new" / "pairs.parquet", score=brightness)
    assert words in str(refused.value) and f"{source.path}, " in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({**GOOD, "rewards": [1.0]}, None, "line 1: has 2 images and 1 rewards"),
        ({**GOOD, "rewards": []}, None, "line 1: has 2 images and 0 rewards"),
        ({**GOOD, "rewards": [1.0, "x"]}, None, "line 1: 'rewards[1]' must be a number or null"),
        ({"prompt": "p", "images": PNGS[:2]}, None, "line 1: has no 'rewards': score the images with --reward"),
        (GOOD, {"rewards": None}, "line 1: has no 'rewards': score the images with --reward"),
        (GOOD, {"prompt": None}, "line 1: has no 'prompt', nor 'caption' or 'text'; it has: prompt, images, rewards"),
        (GOOD, {"images": "files"}, "line 1: has no 'files'"),
        (GOOD, {"image": "files"}, "unknown key 'image' (did you mean 'images'?)"),
        ({"prompt": "p", "rewards": [1]}, None, "line 1: has no 'images'; it has: prompt, rewards"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, row: dict[str, Any], columns: Any, words: str) -> None:
    source = DataSource(write(tmp_path, [dict(row)]).path, columns=columns)
    with pytest.raises(UserError) as refused:
        write_image_pairs(source, tmp_path / "pairs.parquet")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([GOOD], {"margin": 4.0}, "gives no pair (rows: 1; pairs below the margin: 1): lower --margin."),
        ([{**GOOD, "rewards": [1, 1]}], {}, "pairs of equal rewards: 1): use a reward or a judge that tells"),
        ([{**GOOD, "images": PNGS[:1] * 2}], {}, "pairs of the same image: 1): sample more varied images."),
        (
            [{**GOOD, "rewards": None}], {},
            "images without a finite reward: 2; prompts with fewer than two images left: 1): score the images first.",
        ),
        (
            [{**GOOD, "images": PNGS[:1], "rewards": [1]}], {},
            "prompts with fewer than two images left: 1): give every prompt two or more scored images.",
        ),
        ([GOOD], {"margin": -1.0}, "margin must be zero or a positive finite number"),
        ([GOOD], {"strategy": "best"}, "'best' is no strategy"),
        ([GOOD], {"max_pairs": 2}, "is for all_pairs"),
    ],
)  # fmt: skip
def test_no_pair_says_why_and_leaves_nothing(tmp_path: Path, rows: Rows, options: dict[str, Any], words: str) -> None:
    source = write(tmp_path, list(rows))
    with pytest.raises(UserError) as refused:
        write_image_pairs(source, tmp_path / "new" / "pairs.parquet", options=PairOptions(**options))
    assert words in str(refused.value) and not (tmp_path / "new").exists()


def test_a_reward_that_gives_no_number_is_not_blamed_on_the_rows(tmp_path: Path) -> None:
    source = write(tmp_path, [dict(GOOD)])
    with pytest.raises(UserError, match="images without a finite reward: 2; .* the reward gave no number"):
        write_image_pairs(source, tmp_path / "p.parquet", score=lambda prompts, images: [math.nan, None])


def test_what_is_there_is_replaced_only_on_request_and_only_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path, [dict(GOOD)]), tmp_path / "pairs.parquet"
    write_image_pairs(source, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="is there already; give --overwrite"):
        write_image_pairs(source, out)
    with pytest.raises(UserError, match=r"--out must end in \.parquet for these pairs, got .*pairs\.jsonl"):
        write_image_pairs(source, tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match=r"--out must end in \.jsonl or \.jsonl\.gz for these pairs"):
        write_pairs(source, out, form="groups")
    # A fault after more pairs than are written together: the file is there still, as it was.
    late = write(tmp_path, [*({**GOOD, "prompt": str(i)} for i in range(120)), {**GOOD, "images": None}], "late.jsonl")
    with pytest.raises(UserError, match="line 121: 'images' must be a list"):
        write_image_pairs(late, out, overwrite=True)
    assert out.read_bytes() == before

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmalign.data.pair_files.os.replace", full)
    with pytest.raises(UserError, match="pairs.parquet cannot be written: No space left on device"):
        write_image_pairs(source, out, options=PairOptions("all_pairs"), overwrite=True)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*.part"))


def test_images_are_told_by_their_column(tmp_path: Path) -> None:
    source = write(tmp_path, [dict(GOOD)])
    assert form_of(source) == "images"
    with pytest.raises(UserError, match="has images; `write_image_pairs` makes pairs of them"):
        write_pairs(source, tmp_path / "pairs.jsonl")
    both = write(tmp_path, [{**GOOD, "completions": ["a", "b"]}], "both.jsonl")
    with pytest.raises(UserError, match="line 1 has the columns of groups and of images; say which with --kind"):
        form_of(both)
