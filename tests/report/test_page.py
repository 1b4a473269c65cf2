"""The page as a file: data that stays data, sizes, images, and what its policy allows."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmalign.report import collect, write_report
from llmalign.report.collect import Pictures, Run
from llmalign.report.outputs import LONGEST, outputs
from llmalign.report.page import render
from llmalign.report.pictures import MOST_PROMPTS, Shelf, gallery
from tests.report.conftest import EVIL, annotation, write


def packed_data(page: str) -> Any:
    block = re.search(r'<script type="application/json" id="outputs-data">"([^"]*)"</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(block.group(1))))


def test_data_cannot_leave_its_place(make_run: Callable[..., Path]) -> None:
    rows = [annotation(0, 2.0, output_2=EVIL, instruction=EVIL, dataset=EVIL, annotator=EVIL, generator_2=EVIL)]
    recipe = {"method": EVIL, "model_name_or_path": EVIL, EVIL: EVIL}
    history = {"log_history": [{"step": step, f"{EVIL}": float(step)} for step in range(3)]}
    page = render(collect([make_run(rows=rows, run=recipe, trainer_state=history)]), title=EVIL)
    assert "<img src=x" not in page
    # The page's own two scripts, and nothing else between script tags.
    assert page.count("<script") == 2 == page.count("</script>")
    assert packed_data(page)["texts"][0] == EVIL


def test_only_the_pages_own_code_may_run(make_run: Callable[..., Path]) -> None:
    page = render(collect([make_run(rows=[annotation(0, 2.0)])]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1).replace("&#x27;", "'")
    code = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    for kind, text in (("script", code), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(r'(src|href)="(?!data:|#)', page) and " style=" not in page and " onclick=" not in page
    assert "url(" not in style and "@import" not in style


def test_texts_are_kept_once_and_whole(make_run: Callable[..., Path]) -> None:
    rows = [annotation(number, 1.0, output_1="the same") for number in range(3)]
    rows.append(annotation(3, float("nan"), instruction=["a", {"role": "user"}], output_2="\ud800 half"))
    rows.append(annotation(4, 1.0, output_2="y" * (LONGEST + 10)))
    found, said = outputs(collect([make_run(rows=rows)]))
    assert found["texts"].count("the same") == 1 and said == []
    own = found["runs"][0]["rows"]
    assert own[3][3] is None and found["texts"][own[3][0]] == '["a", {"role": "user"}]'
    assert found["texts"][own[4][2]].endswith("y\n[10 more characters]") and own[4][7] == LONGEST + 10


def test_of_many_rows_an_even_spread_is_shown(make_run: Callable[..., Path]) -> None:
    found, said = outputs(collect([make_run(rows=[annotation(number, 2.0) for number in range(100)])]), 10)
    assert [found["texts"][row[0]] for row in found["runs"][0]["rows"]] == [f"Question {n}" for n in range(0, 100, 10)]
    assert "10 of 100" in said[0]


def test_the_same_runs_make_the_same_page_but_for_its_time(make_run: Callable[..., Path]) -> None:
    runs = collect([make_run(rows=[annotation(0, 2.0)])])
    first, second = (re.sub(r"<time.*?</time>", "", render(runs)) for _ in range(2))
    assert first == second


def test_a_surrogate_and_no_utf8_still_make_a_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(run={"method": "rpo", "note": "\ud800"}, rows=[annotation(0, 2.0, output_2="\udc00")])
    write_report([folder], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def image(side: int) -> Any:
    pytest.importorskip("PIL", reason="images are drawn with Pillow")
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_images_are_inside_and_small(tmp_path: Path) -> None:
    for name, side in (("large.png", 600), ("small.png", 16)):
        image(side).save(tmp_path / name)
    shown, said = gallery(Run("s", tmp_path, pictures=[Pictures("a fox", [tmp_path / "large.png"], [])]))
    uri = re.search(r'src="data:image/jpeg;base64,([^"]*)"', shown).group(1)
    assert len(uri) < 100_000 and said == [] and 'alt="a fox"' in shown
    pair = Pictures("a fox", [tmp_path / "small.png"], [tmp_path / "small.png"])
    shown, said = gallery(Run("s", tmp_path, pictures=[pair] * (MOST_PROMPTS + 2)))
    assert shown.count("before") >= MOST_PROMPTS and f"{MOST_PROMPTS} of {MOST_PROMPTS + 2} prompts" in said[0]
    exact = base64.b64encode((tmp_path / "small.png").read_bytes()).decode()
    assert exact in shown


def test_images_that_cannot_be_shown_are_named(tmp_path: Path) -> None:
    write(tmp_path / "text.png", "no image")
    write(tmp_path / "cut.png", "\x89PNG" + "x" * 30_000)
    image(16).save(tmp_path / "good.png")
    shelf = Shelf(most_bytes=100)
    assert [shelf.uri(tmp_path / name) for name in ("text.png", "cut.png", "absent.png", "good.png")] == [None] * 4
    assert len(shelf.said) == 3 and shelf.left_out == 1


def test_images_without_pillow_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    image(200).save(tmp_path / "large.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    shelf = Shelf()
    assert shelf.uri(tmp_path / "large.png").startswith("data:image/png") and "pip install" in shelf.said[0]


def test_a_grid_stands_in_for_images(tmp_path: Path) -> None:
    image(64).save(tmp_path / "grid.png")
    shown, _ = gallery(Run("s", tmp_path, grid=tmp_path / "grid.png"))
    assert "The grid of s" in shown


def test_three_runs_of_805_outputs_are_a_small_file(tmp_path: Path, shared: Path) -> None:
    from benching.report_runs import make_runs

    files = sorted((shared / "datasets" / "alpaca_eval").glob("*.full.jsonl.gz"))
    if len(files) < 2:
        pytest.skip("needs two models' outputs in full")
    page = tmp_path / "page.html"
    runs = write_report(make_runs(tmp_path / "runs", files), page)
    assert [len(run.rows) for run in runs] == [805, 805, 804]
    assert page.stat().st_size < 8e6
