"""The doctor of images counts each fault in rows made to have it."""

import io
import json

import pytest
from datasets import Dataset
from PIL import Image
from rich.console import Console

from llmalign.data.doctor import refuse
from llmalign.data.image_doctor import IMAGE_FAULTS, ImageLimits, examine_images, show_image_row
from llmalign.data.images import load_image_rows
from llmalign.data.report import Limits
from llmalign.errors import UserError
from tests.data_module.pictures import file_of, pair, picture, png, write_lines, write_parquet


def report_on(tmp_path, rows, kind="image_pairs", **options):
    ties = "soft" if kind == "image_pairs" else "drop"
    loaded = load_image_rows(write_parquet(tmp_path / "a.parquet", rows), kind=kind, ties=ties, lenient=True)
    return examine_images(loaded, kind=kind, **options)


def counts(report) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (found.count, found.rows) for name, found in report.findings.items() if found.count}


def printed(show, *values) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(*values, console)
    return console.file.getvalue()


def test_healthy_rows_have_no_faults(tmp_path):
    report = report_on(tmp_path, [pair(0), pair(1, 0.0)], resolution=16)
    assert counts(report) == {} and report.problems() == [] and report.rows == 2
    assert set(report.findings) == set(IMAGE_FAULTS) - {"truncated"}, "what was not checked is absent"
    assert report.measured["width"] == (24, 24, 24, 24) and report.measured["height"] == (16,) * 4
    assert report.formats == {"PNG": 4} and report.captions == 2 and report.frequent == {}
    refuse(report)
    assert "Nothing above its limit." in printed(report.render)


def test_every_fault_of_pairs_is_counted_with_its_rows(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = picture(18).transpose(Image.Transpose.ROTATE_90)
    rows = [
        pair(0),
        pair(0),  # 1: repeats row 0
        pair(2, jpg_1=png(4)),  # 2: the same file on both sides
        pair(3, jpg_1=file_of(picture(6), "BMP")),  # 3: another file of the same pixels
        pair(4, 0.5),  # 4: a tie
        pair(5, None),  # 5: no label
        pair(6, 0.0, caption=None),  # 6: no caption
        pair(7, caption=" \n"),  # 7: an empty caption
        pair(8, jpg_1=png(17, (24, 17))),  # 8: two sizes
        pair(9, jpg_0=file_of(upright, exif=turned)),  # 9: one size, once turned upright
        pair(10, jpg_0=png(20, (40, 15)), jpg_1=png(21, (40, 15))),  # 10: smaller than 16
        pair(11, jpg_0=None),  # 11: missing
        pair(12, jpg_1=png()[:80]),  # 12: truncated
        pair(13, jpg_0=b"x"),  # 13: no image
        pair(0, jpg_0=png(1), jpg_1=png(0)),  # 14: row 0 the other way round is no repetition
    ]
    report = report_on(tmp_path, rows, resolution=16)
    assert counts(report) == {
        "unreadable": (3, (11, 12, 13)),
        "missing_caption": (1, (6,)),
        "empty_caption": (1, (7,)),
        "unlabelled": (1, (5,)),
        "ties": (1, (4,)),
        "identical": (2, (2, 3)),
        "sizes_differ": (1, (8,)),
        "small": (1, (10,)),
        "duplicates": (1, (1,)),
    }
    assert report.captions == 12 and report.repeated_captions == 2 and report.frequent == {"picture 0": 3}
    assert report.measured["rows of a caption"] == (1, 1, 3, 3)
    assert report.formats == {"PNG": 26, "BMP": 1} and report.measured["height"][-1] == 17


def test_sentences_name_rows_limit_and_way_out(tmp_path):
    report = report_on(tmp_path, [pair(i, jpg_0=png(i, (8, 8)) if i < 7 else png(i)) for i in range(10)], resolution=16)
    small, sizes = sorted(report.problems(), key=lambda text: "two images" in text)
    assert small == (
        "7 of 10 rows (70.0%) have an image whose shorter side is below the resolution 16 and is enlarged; `max_small` "
        "allows 5.0%; row_id 0, 1, 2, 3, 4, ...; lower the resolution, or take them out of the data."
    )
    assert sizes.startswith("7 of 10 rows (70.0%) have two images of different size") and "`max_sizes_differ`" in sizes
    with pytest.raises(UserError, match="refused for 2 reasons"):
        refuse(report)
    assert report.problems(ImageLimits(small=0.7, sizes_differ=0.7)) == []
    assert report.problems(ImageLimits(small=0.69, sizes_differ=1.0)) == [small.replace("5.0%", "69.0%")]


def test_every_sentence_can_be_written(tmp_path):
    """Above a limit of 0, each fault has words, and nothing is left unfilled."""
    rows = [
        pair(0), pair(0, caption="picture 0"), pair(1, 0.5), pair(2, None), pair(3, caption=None), pair(4, caption=""),
        pair(5, jpg_1=png(10)), pair(6, jpg_1=png(0, (9, 9))), pair(7, jpg_0=None),
    ]  # fmt: skip
    strict = ImageLimits(**dict.fromkeys(ImageLimits.__dataclass_fields__, 0.0))
    report = report_on(
        tmp_path, rows, resolution=12, limits=strict, count_tokens=lambda t: list(map(len, t)), max_tokens=3
    )
    sentences = report.problems()
    assert len(sentences) == len(IMAGE_FAULTS) == len(ImageLimits.__dataclass_fields__)
    assert not any("{" in text or "None" in text for text in sentences)
    shown = printed(report.render)
    assert all(label in shown for label, _, _ in IMAGE_FAULTS.values()) and "picture 0" in shown


def test_captions_are_counted_in_tokens_by_the_caller(tmp_path):
    rows = [pair(0, caption="one two"), pair(1, caption="one two three"), pair(2, caption=None)]
    report = report_on(tmp_path, rows, count_tokens=lambda texts: [len(t.split()) for t in texts], max_tokens=2)
    assert counts(report)["truncated"] == (1, (1,)) and report.measured["caption, tokens"] == (3, 3, 3, 3)
    assert any("more than 2 tokens" in text for text in report.problems())
    with pytest.raises(UserError, match="both or neither"):
        report_on(tmp_path, rows, max_tokens=2)


def test_images_alone(tmp_path):
    rows = [{"caption": f"c{i}", "image": png(i)} for i in range(4)]
    rows += [{"caption": "c0", "image": png(0)}, {"caption": "c5", "image": b"x"}]
    report = report_on(tmp_path, rows, kind="images", resolution=17)
    assert counts(report) == {"unreadable": (1, (5,)), "small": (5, (0, 1, 2, 3, 4)), "duplicates": (1, (4,))}
    assert not {"ties", "identical", "sizes_differ", "unlabelled"} & set(report.findings)


def test_rows_that_training_reads_are_examined_too(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [pair(0), pair(1, 0.5), pair(2, jpg_0=png()[:80])])
    report = examine_images(load_image_rows(source, kind="image_pairs"), kind="image_pairs")
    assert counts(report) == {"unreadable": (1, (2,))} and "small" not in report.findings


def test_the_report_is_json(tmp_path):
    report = report_on(tmp_path, [pair(0), pair(0)], resolution=16)
    told = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert told["findings"]["duplicates"] == {"count": 1, "rows": [1]} and told["frequent_captions"] == {"picture 0": 2}
    assert told["measured"]["width"] == {"0.05": 24, "0.5": 24, "0.95": 24, "1.0": 24} and told["resolution"] == 16


def test_what_is_called_alike_in_text_and_images_has_one_limit():
    text, images = vars(Limits()), vars(ImageLimits())
    shared = text.keys() & images.keys()
    assert shared == {"identical", "truncated", "duplicates"} and all(text[name] == images[name] for name in shared)
    with pytest.raises(UserError, match="`max_ties` is a share"):
        ImageLimits(ties=1.5)


def test_nothing_to_examine():
    with pytest.raises(UserError, match="no rows to examine"):
        examine_images(Dataset.from_dict({"row_id": []}), kind="images")
    with pytest.raises(UserError, match="not 'pairs'"):
        examine_images(Dataset.from_dict({"row_id": [0]}), kind="pairs")


def test_a_row_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = [
        pair(0, 0.0, caption="[bold]a fox[/bold]", jpg_1=file_of(picture(1).convert("L"), "JPEG", exif=exif)),
        pair(1, 0.5, jpg_0=png()[:80]),
        pair(2, 3.0, caption=None, jpg_1=None),
    ]
    loaded = load_image_rows(write_parquet(tmp_path / "a.parquet", rows), kind="image_pairs", ties="soft", lenient=True)
    first, second, third = (printed(show_image_row, row).splitlines() for row in loaded)
    assert first[:2] == ["row 0", "caption: '[bold]a fox[/bold]', 18 characters"]
    jpeg, other = len(loaded[0]["chosen"]), len(loaded[0]["rejected"])
    assert first[2] == f"chosen: JPEG L, 16 x 24 pixels, turned upright, {jpeg:,} bytes"
    assert first[3:] == [
        f"rejected: PNG RGB, 24 x 16 pixels, {other:,} bytes",
        "label: 1, the probability that chosen is the better one",
    ]
    assert second[2] == "chosen: 80 bytes; is a damaged or truncated PNG file" and second[4] == "label: 0.5, a tie"
    assert third[1] == "caption: none" and third[3] == "rejected: none" and third[4] == "label: none"
    assert third[5].startswith("fault: 'caption' is null; 'label_0' is 3") and "'jpg_1' is null" in third[5]
