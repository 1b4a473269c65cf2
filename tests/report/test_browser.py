"""The page in Chromium: it opens, asks nobody, and does what its controls say, with pointer and keyboard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmalign.report import write_report
from tests.report.conftest import EVIL, annotation

READY = "document.documentElement?.dataset.ready === 'true'"
SHOWN = "[...document.querySelectorAll('.row .prompt')].map((node) => node.textContent)"
COUNT = "document.getElementById('count').textContent"
COLOUR = "getComputedStyle(document.body).backgroundColor"


def rows(shift: float = 0.0) -> list[dict[str, Any]]:
    """60 prompts: 20 wins, 20 losses, 10 ties, 10 not judged; one with an output that tries to break out."""
    kinds = [2.0] * 20 + [1.0] * 20 + [1.5] * 10 + [None] * 10
    found = [annotation(number, kind) for number, kind in enumerate(kinds)]
    found[7]["output_2"] = EVIL
    found[8]["output_2"] = "word " * 2000
    found[9]["output_2"] = "filler " * 300 + "needle in (a) haystack"
    if shift:
        found[0]["preference"] = 1.0
        found[7]["output_2"] = "tame"
    return found


@pytest.fixture
def page(make_run: Callable[..., Path], tmp_path: Path, chromium: Any) -> Any:
    """A report of two runs, open in a browser."""
    out = tmp_path / "page.html"
    write_report([make_run("a", rows=rows()), make_run("b", rows=rows(1.0))], out)
    chromium.view(1280, 900)
    chromium.open(out, READY)
    return chromium


def set_value(browser: Any, name: str, value: str, event: str = "change") -> None:
    browser.run(
        f"(() => {{ const node = document.getElementById('{name}'); node.value = {value!r}; "
        f"node.dispatchEvent(new Event('{event}', {{ bubbles: true }})); }})()"
    )


def test_it_opens_without_errors_and_asks_nobody(page: Any) -> None:
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == page.requests[:1]
    assert page.run(COUNT).startswith("60 of 60 prompts, 1 to 25 shown")
    assert page.run("document.querySelectorAll('.row').length") == 25


def test_an_output_that_is_code_is_text(page: Any) -> None:
    set_value(page, "search", "onerror", "input")
    page.wait(f"({COUNT}).startsWith('1 of')")
    assert EVIL in page.run("document.querySelector('.row').textContent")
    assert page.run("document.title") == "a and b · llmalign report"
    assert page.run("document.querySelectorAll('main img, .row script').length") == 0
    assert page.errors == []


def test_outcomes_runs_and_order(page: Any) -> None:
    for kind, count in (("win", 20), ("loss", 21), ("tie", 10), ("none", 10), ("differ", 1)):
        set_value(page, "kind", kind)
        assert page.run(COUNT).startswith(f"{count} of 60"), kind
    set_value(page, "run", "0")
    set_value(page, "kind", "loss")
    assert page.run(COUNT).startswith("20 of 60")
    assert page.run("document.querySelectorAll('.row:first-child .answer').length") == 2
    set_value(page, "kind", "")
    set_value(page, "sort", "longest")
    assert page.run(SHOWN)[:2] == ["Question 8", "Question 9"]
    set_value(page, "dataset", "set 1")
    assert page.run(COUNT).startswith("30 of 60") and page.run(SHOWN)[0] == "Question 9"


def test_search_marks_what_it_found_and_opens_long_answers(page: Any) -> None:
    set_value(page, "search", "(A) Needle", "input")
    page.wait(f"({COUNT}).startsWith('1 of')")
    marks = page.run("[...document.querySelectorAll('.row mark')].map((node) => node.textContent)")
    assert {"needle", "(a)"} <= set(marks)
    assert page.run("[...document.querySelectorAll('.row mark')].every((node) => node.offsetHeight > 0)")
    set_value(page, "search", "no such words", "input")
    page.wait(f"({COUNT}).startsWith('None of 60')")


def test_keyboard(page: Any) -> None:
    focused = "document.activeElement.querySelector('.prompt')?.textContent"
    page.key("j")
    page.key("j")
    assert page.run(focused) == "Question 1"
    page.key("k")
    assert page.run(focused) == "Question 0"
    page.key("]")
    assert page.run(focused) == "Question 25"
    page.key("k")
    assert page.run(focused) == "Question 24"
    page.key("j")
    assert page.run(focused) == "Question 25"
    page.key("/")
    assert page.run("document.activeElement.id") == "search"
    page.type("Question 42")
    page.wait(f"({COUNT}).startsWith('1 of')")
    page.key("Enter")
    assert page.run(focused) == "Question 42"
    page.key("/")
    page.key("Escape")
    assert page.run(COUNT).startswith("60 of 60") and page.run("document.activeElement.id") != "search"


def test_long_answers_open_and_close(page: Any) -> None:
    set_value(page, "sort", "longest")
    page.key("j")
    height = "document.querySelector('.row .answer:nth-child(2) .text').offsetHeight"
    closed = page.run(height)
    page.key("o")
    assert page.run(height) > 3 * closed
    assert page.run("document.querySelector('.row .answer button').getAttribute('aria-expanded')") == "true"
    page.key("o")
    assert page.run(height) == closed


def test_charts_speak_to_pointer_and_keyboard(page: Any) -> None:
    page.run("document.querySelector('#curves').scrollIntoView({ behavior: 'instant' })")
    box = page.run("(({ x, y, width, height }) => [x, y, width, height])("
                   "document.querySelector('#curves .plot').getBoundingClientRect())")  # fmt: skip
    page.point(box[0] + 0.95 * box[2], box[1] + 0.5 * box[3])
    tip = page.run("document.getElementById('tip').textContent")
    assert tip.startswith("step 2") and "a: 0.75" in tip
    page.run("document.querySelector('#win-rates .plot').focus()")
    page.key("ArrowRight")
    assert page.run("document.getElementById('live').textContent").startswith("a, ")
    page.key("Escape")
    assert page.run("document.getElementById('tip').hidden")
    assert page.errors == []


def test_recipes_are_searched(page: Any) -> None:
    set_value(page, "recipe-search", "beta", "input")
    shown = "[...document.querySelectorAll('.manifest[open] .recipe tbody tr')].filter((row) => !row.hidden).length"
    assert page.run(shown) == 2
    set_value(page, "recipe-search", "", "input")
    assert page.run("document.querySelectorAll('.manifest[open]').length") == 0


def test_themes(page: Any, tmp_path: Path) -> None:
    light = page.run(COLOUR)
    page.view(1280, 900, dark=True)
    dark = page.run(COLOUR)
    assert light != dark
    page.run("document.getElementById('theme').click()")
    assert page.run(COLOUR) == light and page.run("document.getElementById('theme').textContent") == "Theme: light"
    page.run("document.getElementById('theme').click()")
    page.view(1280, 900)
    assert page.run(COLOUR) == dark
    page.run("document.getElementById('theme').click()")
    assert page.run(COLOUR) == light


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background(page: Any, dark: bool) -> None:
    """The contrast of WCAG AA, 4.5, of all text in the summary and in the first rows of outputs."""
    page.view(1280, 900, dark=dark)
    low = page.run(
        """(() => {
      const light = (text) => {
        const parts = text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
          .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
      };
      const behind = (node) => {
        for (let one = node; one; one = one.parentElement) {
          const colour = getComputedStyle(one).backgroundColor;
          if (!colour.endsWith(", 0)")) return colour;
        }
      };
      return [...document.querySelectorAll("#summary *, #outputs *, #manifest *, figcaption *")]
        .filter((node) => node.offsetHeight
          && [...node.childNodes].some((own) => own.nodeType === 3 && own.data.trim()))
        .map((node) => {
          const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
          return [(a + 0.05) / (b + 0.05), node.className || node.tagName, node.textContent.slice(0, 30)];
        }).filter(([ratio]) => ratio < 4.5);
    })()"""
    )
    assert low == []


def test_a_phone_needs_no_sideways_scroll(page: Any) -> None:
    page.view(390, 844)
    assert page.run("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == 390
    heights = page.run(
        "[...document.querySelectorAll('input, select, .pages button')].map((node) => node.offsetHeight)"
    )
    assert all(height >= 30 for height in heights if height)


def test_everything_has_a_name_for_those_who_listen(page: Any) -> None:
    unnamed = page.run(
        "[...document.querySelectorAll('input, select, button, svg.plot, [role=region], nav, section')]"
        ".filter((node) => !(node.getAttribute('aria-label') || node.labels?.length || node.textContent.trim()))"
        ".map((node) => node.outerHTML)"
    )
    assert unnamed == []
    assert page.run("document.documentElement.lang") == "en" and page.run("document.querySelectorAll('h1').length") == 1
    assert page.run(
        "document.querySelectorAll('figure .plot').length === document.querySelectorAll('figure .values').length"
    )
    ids = page.run("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_a_browser_that_cannot_unpack_says_so(make_run: Callable[..., Path], tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "page.html"
    write_report([make_run("a", rows=rows())], out)
    script = chromium.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        chromium.open(out, READY)
        assert "cannot unpack" in chromium.run(COUNT) and chromium.run("document.querySelectorAll('.row').length") == 0
        assert chromium.run("document.querySelectorAll('.plot').length") > 3
    finally:
        chromium.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_a_damaged_file_says_so(make_run: Callable[..., Path], tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "page.html"
    write_report([make_run("a", rows=rows())], out)
    whole = out.read_text(encoding="utf-8")
    start = whole.index('id="outputs-data">"') + 200
    out.write_text(whole[:start] + whole[start + 40 :], encoding="utf-8")
    chromium.open(out, "document.readyState === 'complete'")
    chromium.wait(f"({COUNT}).includes('cannot be unpacked')")
