"""Rows of images in every form that is read, what is refused, and image files as pixels."""

import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from llmalign.data.checks import Fault
from llmalign.data.images import decode, load_image_rows, open_image, pixels
from llmalign.errors import UserError
from tests.data_module.pictures import file_of, pair, picture, png, write_lines, write_parquet


def load(source, kind="image_pairs", **options):
    return load_image_rows(source, kind=kind, **options)


def save_as_features(folder: Path, rows: list[dict]) -> str:
    features = {"caption": datasets.Value("string"), "label_0": datasets.Value("float64")}
    features |= {"jpg_0": datasets.Image(), "jpg_1": datasets.Image()}
    table = [
        {**row, "jpg_0": {"bytes": row["jpg_0"], "path": None}, "jpg_1": {"bytes": row["jpg_1"], "path": None}}
        for row in rows
    ]
    datasets.Dataset.from_list(table, features=datasets.Features(features)).save_to_disk(folder)
    return str(folder)


def write_form(folder: Path, form: str, rows: list[dict]) -> str:
    if form == "bytes":
        return write_parquet(folder / "a.parquet", rows)
    if form == "structs":
        changed = [{**row, **{k: {"bytes": row[k], "path": "not read"} for k in ("jpg_0", "jpg_1")}} for row in rows]
        return write_parquet(folder / "a.parquet", changed)
    if form == "features":
        return save_as_features(folder / "saved", rows)
    lines = Path(write_lines(folder / "a.jsonl", rows))
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    if form == "json":
        (folder / "b.json").write_text(json.dumps(written))
        return str(folder / "b.json")
    if form == "csv":
        columns = list(written[0])
        cells = [columns, *([str(row[name]) for name in columns] for row in written)]
        (folder / "b.csv").write_text("".join(",".join(line) + "\n" for line in cells))
        return str(folder / "b.csv")
    return str(lines)


@pytest.mark.parametrize("form", ["bytes", "structs", "features", "jsonl", "json", "csv"])
def test_every_form_gives_the_same_rows(tmp_path, form):
    rows = load(write_form(tmp_path, form, [pair(0, 1.0), pair(1, 0.0), pair(2, 0.25)]))
    assert rows.column_names == ["row_id", "caption", "chosen", "rejected", "label"]
    assert rows.features["label"].dtype == "float32" and rows.features["chosen"].dtype == "binary"
    assert rows.to_list() == [
        {"row_id": 0, "caption": "picture 0", "chosen": png(0), "rejected": png(1), "label": 1.0},
        {"row_id": 1, "caption": "picture 1", "chosen": png(3), "rejected": png(2), "label": 1.0},
        {"row_id": 2, "caption": "picture 2", "chosen": png(5), "rejected": png(4), "label": 0.75},
    ]


def test_ties_are_left_out_and_counted_or_kept(tmp_path, caplog):
    caplog.set_level("INFO")
    source = write_parquet(tmp_path / "a.parquet", [pair(0), pair(1, 0.5), pair(2, 0.5), pair(3, 0.51)])
    kept = load(source)
    assert kept["row_id"][:] == [0, 3] and kept["label"][:] == pytest.approx([1.0, 0.51])
    assert "left out 2 of 4 pairs, which are ties" in caplog.text
    soft = load(source, ties="soft")
    assert soft["row_id"][:] == [0, 1, 2, 3] and soft[1]["label"] == 0.5
    assert soft[1]["chosen"] == png(2) and soft[1]["rejected"] == png(3)
    with pytest.raises(UserError, match="nothing but ties"):
        load({"path": source, "where": {"label_0": 0.5}})


def test_preferred_images_with_and_without_a_label(tmp_path):
    rows = [
        {"prompt": "a", "chosen": png(0), "rejected": png(1)},
        {"prompt": "", "chosen": png(2), "rejected": png(3), "label": 0.9},
        {"prompt": "c", "chosen": png(4), "rejected": png(5), "label": 0.1},  # the label outdoes the names
        {"prompt": "d", "chosen": png(6), "rejected": png(7), "label": 0.5},
    ]
    found = load(write_lines(tmp_path / "a.jsonl", rows))
    assert found["caption"][:] == ["a", "", "c"]
    assert found["label"][:] == pytest.approx([1.0, 0.9, 0.9])
    assert found["chosen"][:] == [png(0), png(2), png(5)] and found["rejected"][:] == [png(1), png(3), png(4)]
    without = load({"path": str(tmp_path / "a.jsonl"), "columns": {"label": None}})
    assert without["label"][:] == [1.0] * 4 and without[2]["chosen"] == png(4)


def test_columns_where_and_max_rows(tmp_path):
    rows = [
        {"words": f"w{i}", "shots": {"left": png(2 * i), "right": png(2 * i + 1)}, "p": 0.8, "keep": i != 1}
        for i in range(5)
    ]
    columns = {"caption": "words", "jpg_0": "shots.left", "jpg_1": "shots.right", "label_0": "p"}
    source = {
        "path": write_parquet(tmp_path / "a.parquet", rows),
        "columns": columns,
        "where": {"keep": True},
        "max_rows": 3,
    }
    found = load(source)
    assert found["row_id"][:] == [0, 2, 3] and found["caption"][:] == ["w0", "w2", "w3"]
    assert found[1]["chosen"] == png(4) and found["label"][:] == pytest.approx([0.8] * 3)


def test_sources_one_after_another_and_mixed(tmp_path):
    first = write_parquet(tmp_path / "a.parquet", [pair(i) for i in range(4)])
    second = write_lines(tmp_path / "b.jsonl", [pair(i, caption=f"other {i}") for i in range(10, 14)])
    both = load([first, second])
    assert both["row_id"][:] == list(range(8)) and both[4]["caption"] == "other 10" and both[4]["chosen"] == png(20)
    mixed = [{"path": first, "weight": 1}, {"path": second, "weight": 2}]
    once, again = load(mixed, seed=1), load(mixed, seed=1)
    assert len(once) == 6 and sum(text.startswith("other") for text in once["caption"]) == 4
    assert once["row_id"][:] == again["row_id"][:] != load(mixed, seed=2)["row_id"][:]


def test_images_alone_and_winners(tmp_path):
    alone = write_lines(tmp_path / "a.jsonl", [{"text": "a fox", "image": png(0), "label": 7}])
    assert load(alone, kind="images").to_list() == [{"row_id": 0, "caption": "a fox", "image": png(0)}]
    pairs = write_parquet(tmp_path / "b.parquet", [pair(0, 0.0), pair(1, 0.5), pair(2, 1.0)])
    winners = load(pairs, kind="images")
    assert winners["row_id"][:] == [0, 2] and winners["image"][:] == [png(1), png(4)]
    assert load(pairs, kind="captions").to_list() == [{"row_id": i, "caption": f"picture {i}"} for i in range(3)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "pairs"}, "no kind of image data"),
        ({"ties": "keep"}, "drop or soft"),
        ({"kind": "images", "ties": "soft"}, "pairs without a winner"),
    ],
)
def test_faulty_options_get_one_sentence(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        load_image_rows(str(tmp_path), **{"kind": "image_pairs", **options})


def good_and(row: dict) -> list[dict]:
    return [pair(0), row]


@pytest.mark.parametrize(
    "row, words",
    [
        (pair(1, None), "'label_0' is null"),
        (pair(1, 1.5), "'label_0' is 1.5, and a label is a probability from 0 to 1"),
        (pair(1, -0.1), "'label_0' is -0.1"),
        (pair(1, float("nan")), "'label_0' is nan"),
        (pair(1, caption=None), "'caption' is null"),
        (pair(1, jpg_1=None), "'jpg_1' is null"),
        (pair(1, jpg_0=b"no image"), "'jpg_0' is no image that can be read (known are: JPEG, PNG"),
        (pair(1, jpg_0=b""), "'jpg_0' is no image that can be read"),
        (pair(1, jpg_0=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "'jpg_0' is no image"),
    ],
)
def test_a_faulty_row_is_named(tmp_path, row, words):
    source = write_parquet(tmp_path / "a.parquet", good_and(row))
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value).startswith(f"{source}, row 2: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label_0": True}, "'label_0' must be a number"),
        ({"label_0": "1"}, "'label_0' must be a number"),
        ({"caption": 3}, "'caption' must be text"),
        ({"caption": "half \ud800"}, "'caption' holds half of a surrogate pair"),
        ({"jpg_0": 3}, "'jpg_0' must be the bytes of an image, {bytes, path} or a path, not int"),
        ({"jpg_0": {"bytes": None, "path": None}}, "'jpg_0' is null"),
        ({"jpg_0": {"url": "x"}}, "not dict"),
        ({"jpg_0": "images/absent.png"}, "'images/absent.png', and there is no such file"),
        ({"jpg_0": "images"}, "there is no such file"),
        ({"jpg_0": ""}, "there is no such file"),
        ({"jpg_0": "images/../../out.png"}, "and stay inside the folder"),
        ({"jpg_0": "images/../images/in.png"}, "and stay inside the folder"),
        ({"jpg_0": "/etc/passwd"}, "and stay inside the folder"),
        (
            {"jpg_0": "{folder}/images/a-0-jpg_0.png"},
            "and stay inside the folder",
        ),  # absolute, though inside
        ({"jpg_0": "images/link.png"}, "and stay inside the folder"),
        ({"jpg_0": "images/circle.png"}, "cannot be read"),
        ({"jpg_0": "images/a\0b.png"}, "cannot be read"),
        ({"jpg_0": {"bytes": None, "path": "../out.png"}}, "and stay inside the folder"),
        ({"jpg_0": None}, "'jpg_0' is null"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, change, words):
    (tmp_path / "out.png").write_bytes(png())
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "images" / "circle.png").symlink_to(folder / "images" / "circle.png")
    source = write_lines(folder / "a.jsonl", [pair(0), pair(1)])
    first, second = map(json.loads, Path(source).read_text().splitlines())
    if isinstance(change.get("jpg_0"), str):
        change = {"jpg_0": change["jpg_0"].replace("{folder}", str(folder))}
    Path(source).write_text(json.dumps(first) + "\n" + json.dumps({**second, **change}) + "\n")
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value).startswith(f"{source}, line 2: ") and words in str(caught.value)


def test_a_link_that_stays_inside_is_followed(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [pair(0)])
    real, name = tmp_path / "images" / "a-0-jpg_0.png", tmp_path / "images" / "elsewhere.png"
    real.rename(name)
    real.symlink_to(name)
    assert load(source)[0]["chosen"] == png(0)


def test_paths_out_of_other_than_text_files_are_not_followed(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    source = write_parquet(tmp_path / "a.parquet", [pair(0, jpg_0="x.png")])
    with pytest.raises(UserError, match="followed only out of text files"):
        load(source)


@pytest.mark.parametrize(
    "row, columns, words",
    [
        ({"caption": "a", "chosen": "x"}, None, "has neither 'jpg_0' and 'jpg_1' and 'label_0' nor 'chosen' and"),
        ({"chosen": "x", "rejected": "y"}, None, "has no 'caption', nor 'prompt' or 'text'; it has: chosen, rejected"),
        ({"caption": "a", "jpg_0": "x", "jpg_1": "y"}, None, "say with `columns` what stands for them"),
        ({**dict.fromkeys(("caption", "jpg_0", "jpg_1", "label_0", "chosen", "rejected"), "x")}, None, "chosen: null"),
        ({"caption": "a"}, {"jpg0": "x"}, "unknown key 'jpg0' (did you mean 'jpg_0'?)"),
        ({"caption": "a"}, {"jpg_0": ["x", "y"]}, "must give one name for 'jpg_0'"),
        (pair(0, jpg_0="x", jpg_1="y"), {"jpg_0": "absent"}, "has no 'absent'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, row, columns, words):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        load({"path": str(tmp_path / "a.jsonl"), "columns": columns})
    assert words in str(caught.value)


def test_a_csv_label_is_read_as_a_number(tmp_path):
    source = write_form(tmp_path, "csv", [pair(0)])
    Path(source).write_text(Path(source).read_text().replace("1.0", "often"))
    with pytest.raises(UserError, match="'label_0' must be a number"):
        load(source)


def test_rows_that_do_not_exist(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [pair(0)])
    with pytest.raises(UserError, match="has no row where caption = 'none'; caption is one of 'picture 0'"):
        load({"path": source, "where": {"caption": "none"}})
    with pytest.raises(UserError, match="has no 'words'"):
        load({"path": source, "where": {"words": "none"}})


def test_rows_are_cached_until_an_image_changes(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [pair(0), pair(1)])
    first = load(source)
    assert load(source)._fingerprint == first._fingerprint
    assert load(source).cache_files == first.cache_files
    (tmp_path / "images" / "a-1-jpg_0.png").write_bytes(png(99))
    assert load(source)[1]["chosen"] == png(99) and first[1]["chosen"] == png(2)
    saved = save_as_features(tmp_path / "saved", [pair(0)])
    assert load(saved).cache_files == load(saved).cache_files


def test_image_features_are_neither_decoded_nor_written_anew(tmp_path):
    jpeg = file_of(picture(5), "JPEG", quality=40)
    source = save_as_features(tmp_path / "saved", [pair(0, jpg_0=jpeg), pair(1, jpg_0=png()[:60])])
    rows = load(source)
    assert rows[0]["chosen"] == jpeg and rows[1]["chosen"] == png()[:60]


def test_lenient_rows_say_what_is_wrong(tmp_path):
    rows = [pair(0), pair(1, 0.0, caption=None), pair(2, 9.0), pair(3, jpg_0=None, jpg_1=b"x"), pair(4, 0.5)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    found = load(source, lenient=True, ties="soft")
    assert found["row_id"][:] == [0, 1, 2, 3, 4]
    assert found["caption"][1] is None and found["label"][2] is None and found["chosen"][3] is None
    assert found["chosen"][1] == png(3) and found["rejected"][3] == b"x"
    assert found["fault"][0] is None and found["fault"][1] == "'caption' is null"
    assert found["fault"][2].startswith("'label_0' is 9") and found["fault"][3] == "'jpg_0' is null"
    assert load(source, lenient=True)["row_id"][:] == [0, 1, 2, 3]
    winners = load(source, kind="images", lenient=True)
    assert winners["row_id"][:] == [0, 1, 2, 3] and winners["image"][2] is None and winners["image"][1] == png(3)


def rgb(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_palette_grey_and_alpha_become_rgb():
    grey = picture(1).convert("L")
    assert (rgb(decode(file_of(grey))) == np.asarray(grey)[..., None]).all()
    palette = picture(1).quantize(16)
    assert (rgb(decode(file_of(palette))) == np.asarray(palette.convert("RGB"))).all()
    colours = np.zeros((1, 3, 4), dtype=np.uint8)
    colours[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)]  # 51 = 255 / 5
    expected = [(200, 0, 0), (255, 255, 255), (244, 204, 204)]  # white + (colour - white) / 5
    assert rgb(decode(file_of(Image.fromarray(colours))))[0].tolist() == [list(colour) for colour in expected]
    keyed = Image.fromarray(np.array([[[9, 9, 9], [7, 7, 7]]], dtype=np.uint8))
    assert rgb(decode(file_of(keyed, transparency=(9, 9, 9))))[0].tolist() == [[255] * 3, [7] * 3]


def test_grey_of_16_bits_keeps_its_range():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    assert rgb(decode(file_of(Image.fromarray(values))))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    "orientation, turn", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)]
)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_honoured(orientation, turn, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    found = rgb(decode(file_of(picture(2), format, exif=exif, **options)))
    assert (found == turn(np.asarray(picture(2)))).all()


def test_exif_orientation_of_a_jpeg():
    halves = Image.new("RGB", (32, 16))
    halves.paste("white", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what was left comes to the top
    found = rgb(decode(file_of(halves, "JPEG", exif=exif)))
    assert found.shape == (32, 16, 3) and found[:16].max() < 30 and found[16:].min() > 225


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(format):
    data = file_of(picture(3, (64, 64)), format)
    assert decode(data).size == (64, 64)
    with pytest.raises(Fault, match=f"damaged or truncated {format} file|no image that can be read"):
        decode(data[: len(data) * 2 // 3])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(monkeypatch):
    data = png(0, (40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decode(data).size == (40, 30)
    for limit in (1199, 599):  # Pillow itself warns above its limit and refuses above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(Fault, match=f"more than {limit:,} pixels"):
            open_image(data)


def test_pixels_of_32_bits_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(Fault, match="32 bits"):
            decode(file_of(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.filterwarnings("ignore")  # Pillow tells of damage that it reads past
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whatever_is_damaged_is_a_fault_or_an_image(format):
    generator = random.Random(0)
    for _ in range(60):
        data = bytearray(file_of(picture(4), format))
        for _ in range(generator.choice((1, 3, 20))):
            data[generator.randrange(generator.choice((60, len(data))))] = generator.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except Fault:
            pass


def triangle(values: np.ndarray, size: int) -> np.ndarray:
    """Resize along the first axis with the triangle filter, widened where it shrinks, from its definition."""
    old = len(values)
    scale = old / size
    width = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[None] + 0.5 - centres[:, None]) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.tensordot(weights, values, axes=1)


@pytest.mark.parametrize(
    "size, resolution", [((24, 16), 8), ((17, 40), 12), ((10, 10), 25), ((33, 21), 21), ((9, 9), 9), ((11, 8), 8)]
)
def test_pixels_are_the_resized_middle(size, resolution):
    image = picture(6, size)
    width, height = size
    scaled = (resolution * width // min(size), resolution * height // min(size))
    values = np.asarray(image).astype(np.float64)
    resized = triangle(triangle(values, scaled[1]).swapaxes(0, 1), scaled[0]).swapaxes(0, 1)
    left, top = (round((side - resolution) / 2) for side in scaled)
    middle = resized[top : top + resolution, left : left + resolution]
    found = pixels(image, resolution)
    assert found.dtype == torch.float32 and found.shape == (3, resolution, resolution) and found.is_contiguous()
    assert np.abs(found.numpy().transpose(1, 2, 0) - (middle / 127.5 - 1)).max() < 1.01 / 127.5  # rounded twice
    whole = image.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + resolution, top + resolution))
    assert (np.asarray(whole) == ((found.numpy().transpose(1, 2, 0) + 1) * 127.5).round()).all()


def test_pixels_by_hand():
    ramp = np.zeros((4, 4, 3), dtype=np.uint8)
    ramp[:, :, 0] = [0, 70, 140, 210]
    red = pixels(Image.fromarray(ramp), 2)[0]
    # Halved, the filter reaches two pixels: weights 3/4, 3/4, 1/4 at the left edge, over their sum of 7/4.
    expected = torch.tensor([(3 * 0 + 3 * 70 + 140) / 7, (70 + 3 * 140 + 3 * 210) / 7]) / 127.5 - 1
    assert torch.allclose(red, expected.expand(2, 2), atol=1e-6)
    black_and_white = Image.fromarray(np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], dtype=np.uint8))
    assert pixels(black_and_white, 2)[0].tolist() == [[-1.0, 1.0], [1.0, -1.0]]


def test_a_long_thin_image_takes_no_more_memory_than_another():
    thin = Image.new("RGB", (1, 2_000_000), "white")  # 512 x 1,024,000,000 if all of it were scaled
    assert pixels(thin, 512).unique().tolist() == [1.0]
