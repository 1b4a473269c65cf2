"""Judged outputs as one small block of data: every text once, packed, to be unpacked and browsed by the page."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

from llmalign.evaluation.annotations import known_preference
from llmalign.report.charts import COLOURS
from llmalign.report.collect import Run
from llmalign.report.markup import Html, el, join

LONGEST = 20_000  # characters of one text that are shown
MOST_ROWS = 2000  # of a run


class Texts:
    """Texts by number, each kept once; what is longer than 20,000 characters is cut, with a word about it."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The text's number, given on first sight."""
        if text not in self._numbers:
            self._numbers[text] = len(self.all)
            cut = len(text) > LONGEST
            self.all.append(f"{text[:LONGEST]}\n[{len(text) - LONGEST:,} more characters]" if cut else text)
        return self._numbers[text]


def outputs(runs: Sequence[Run], most_rows: int = MOST_ROWS) -> tuple[dict[str, Any], list[str]]:
    """The rows of all runs as the page reads them, and a sentence for each run whose rows are not all there.

    `runs`: name, generators, colour, and rows of [instruction, output_1, output_2, preference, data set, judge,
    length_1, length_2], where texts are numbers in `texts`. Of more than `most_rows` an even spread is taken.
    """
    texts, said, found = Texts(), [], []
    for place, run in enumerate(runs):
        if not run.rows:
            continue
        step = max(len(run.rows) / max(most_rows, 1), 1.0)
        rows = [run.rows[int(number * step)] for number in range(min(len(run.rows), most_rows))]
        if len(rows) < len(run.rows):
            said.append(f"{run.name}: {len(rows):,} of {len(run.rows):,} rows, evenly spread (--max_rows)")
        first, second = run.evaluation.get("reference"), run.evaluation.get("model")
        found.append(
            {
                "name": run.name, "colour": place % COLOURS,
                "reference": str(first or "reference"), "model": str(second or run.name),
                "rows": [_row(row, texts) for row in rows],
            }
        )  # fmt: skip
    return {"runs": found, "texts": texts.all}, said


def packed(content: Any) -> str:
    """JSON, gzip and base64: the same bytes every time."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def browser(content: dict[str, Any]) -> Html:
    """The controls and the place for the list; the page's code fills it."""
    runs = content["runs"]
    choices = [el("option", "all runs, side by side", value="-1")] if len(runs) > 1 else []
    choices += [el("option", run["name"], value=place) for place, run in enumerate(runs)]
    kinds = {"": "all", "win": "wins", "loss": "losses", "tie": "ties", "none": "not judged"}
    if len(runs) > 1:
        kinds["differ"] = "runs disagree"
    sorts = {"order": "as in the data", "longest": "longest outputs first", "shortest": "shortest outputs first",
             "longer": "longer than the reference first", "best": "clearest wins first",
             "worst": "clearest losses first"}  # fmt: skip
    search = el(
        "input", type="search", id="search", placeholder="words in the prompt or an answer", autocomplete="off",
        spellcheck="false", aria_controls="list",
    )  # fmt: skip
    controls = el(
        "form",
        el("label", "Search", search, cls="wide"),
        _select("run", "Run", choices),
        _select("kind", "Outcome", [el("option", words, value=value) for value, words in kinds.items()]),
        _select("dataset", "Data set", [el("option", "all", value="")]),
        _select("sort", "Order", [el("option", words, value=value) for value, words in sorts.items()]),
        cls="controls", id="controls", role="search",
    )  # fmt: skip
    keys = el(
        "p", *_keys(("/", "search"), ("j", "next"), ("k", "previous"), ("o", "open or close long answers"),
                    ("[", "page back"), ("]", "page on")), cls="keys",
    )  # fmt: skip
    waiting = el("p", "Outputs are being unpacked …", id="count", role="status", aria_live="polite")
    without = el("noscript", el("p", "The outputs need JavaScript; all the rest of this page does not.", cls="notice"))
    pages = el("nav", id="pages", cls="pages", aria_label="Pages of outputs", hidden=True)
    return join(controls, keys, without, waiting, el("div", id="list"), pages)


def _select(name: str, words: str, choices: list[Html]) -> Html:
    return el("label", words, el("select", choices, id=name), hidden=len(choices) < 2 and name == "run")


def _keys(*pairs: tuple[str, str]) -> list[Any]:
    return [el("span", el("kbd", key), f" {words}") for key, words in pairs]


def _row(row: dict[str, Any], texts: Texts) -> list[Any]:
    p = known_preference(row["preference"])
    instruction = row["instruction"]
    if not isinstance(instruction, str):
        instruction = json.dumps(instruction, ensure_ascii=False)
    named = [None if row.get(key) is None else str(row[key]) for key in ("dataset", "annotator")]
    return [
        texts.number(instruction), texts.number(row["output_1"]), texts.number(row["output_2"]),
        None if p is None else round(p, 3), *named, len(row["output_1"]), len(row["output_2"]),
    ]  # fmt: skip
