"""The page: everything that was found, in one file that asks nobody for anything."""

import base64
import hashlib
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmalign.evaluation.annotations import write_text
from llmalign.report import figures
from llmalign.report.absent import absent
from llmalign.report.charts import legend
from llmalign.report.collect import Run, collect
from llmalign.report.curves import curves, reward_against_kl
from llmalign.report.manifest import manifests
from llmalign.report.markup import Html, data_block, el, join, listing, mapping
from llmalign.report.outputs import MOST_ROWS, browser, outputs, packed
from llmalign.report.pictures import gallery
from llmalign.report.summary import card, comparison, differences

SCRIPTS = ("charts.js", "outputs.js", "page.js")  # the last one starts what the others define

logger = logging.getLogger(__name__)


def write_report(
    paths: Sequence[str | Path], out: str | Path, *, title: str | None = None, most_rows: int = MOST_ROWS
) -> list[Run]:
    """Write one HTML file about the runs at `paths` and return what was read of them.

    Curves, win rates, lengths, KL, rounds, reliability, images, outputs and recipes, each where there is such a thing.
    What cannot be read is logged and told in the page. Raises UserError where nothing can be reported (see `collect`)
    and where `out` cannot be written.
    Not covered: runs on another machine, and following a run that is still training.
    """
    runs = collect(paths)
    for run in runs:
        for fault in run.faults:
            logger.warning("%s%s", fault, "" if fault.endswith("?") else ".")
    write_text(out, render(runs, title=title, most_rows=most_rows))
    return runs


def render(runs: Sequence[Run], *, title: str | None = None, most_rows: int = MOST_ROWS) -> str:
    """The page's HTML."""
    title = title or _title([run.name for run in runs])
    content, left_out = outputs(runs, most_rows)
    sections = _sections(runs, content, left_out)
    style, code = _asset("page.css"), '"use strict";\n' + "".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(code)}'; style-src 'sha256-{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"{title} · llmalign report"),
        el("style", Html(style)),
    )
    links = [el("a", words, href=f"#{name}") for name, words, _ in sections]
    top = el(
        "header",
        el(
            "div",
            el("a", "llmalign report", href="#top", cls="brand"),
            el("nav", links, aria_label="Sections"),
            _theme(),
        ),
        cls="top",
    )
    main = el("main", _hero(title, runs), [_section(*section) for section in sections], id="main")
    body = el(
        "body",
        el("a", "Skip to the content", href="#main", cls="skip"), top, main, _foot(),
        el("div", id="tip", cls="tip", aria_hidden="true", hidden=True),
        el("div", id="live", cls="unseen", aria_live="polite"),
        data_block("outputs-data", packed(content)) if content["runs"] else None,
        el("script", Html(code)),
        id="top",
    )  # fmt: skip
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _sections(
    runs: Sequence[Run], content: dict[str, Any], left_out: list[str]
) -> list[tuple[str, str, Html]]:  # fmt: skip
    """Name, title and content of all that there is, in the order in which a reader asks."""
    judged = legend({place: run.name for place, run in enumerate(runs) if run.judged})
    in_rounds = legend({place: run.name for place, run in enumerate(runs) if run.rounds})
    rates = join(figures.win_rates(runs), figures.lengths(runs))
    measured = [el("div", rates, cls="stack") if rates else None, figures.by_length(runs), figures.by_dataset(runs)]
    main, others = curves(runs)
    kl = reward_against_kl(runs)
    rounds = figures.rounds(runs)
    reliable = [(run, figures.reliability(run, place)) for place, run in enumerate(runs)]
    pictures = [(run, *gallery(run)) for run in runs]
    missing = absent(runs, has_kl=kl is not None)
    found: list[tuple[str, str, Any]] = [
        ("win-rates", "Win rates", join(_grid(measured, judged), _warnings(runs)) if rates else None),
        ("rounds", "Rounds", _grid(rounds, in_rounds)),
        ("curves", "Training curves", _curves([kl, *main], others, runs)),
        ("reliability", "Reliability of the reward", join(*(_reliable(run, own) for run, own in reliable))),
        ("images", "Images", join(*(_pictured(run, shown, said) for run, shown, said in pictures))),
        ("outputs", "Outputs", _browser(content, left_out)),
        ("manifest", "Manifest", manifests(runs)),
        ("absent", "Not in this report", missing),
    ]
    return [(name, title, inner) for name, title, inner in found if inner]


def _hero(title: str, runs: Sequence[Run]) -> Html:
    """What was trained, whether it got better, and how sure that is."""
    now = datetime.now(UTC)
    faults = [fault for run in runs for fault in run.faults]
    notice = None
    if faults:
        words = "One file could not be used" if len(faults) == 1 else f"{len(faults)} things could not be used"
        lines = el("ul", [el("li", fault) for fault in faults])
        notice = el("div", el("p", el("b", f"{words}; the rest is here.")), lines, cls="notice", role="alert")
    cards = [card(run, place) for place, run in enumerate(runs) if run.trained or run.evaluation]
    told = differences(runs)
    return el(
        "section",
        el("p", "What was trained, did it get better, and how sure is that", cls="eyebrow"),
        el("h1", title),
        notice,
        el("div", cards, cls="cards") if cards else None,
        el("div", el("h3", "Between the runs, on the same prompts"), told) if told else None,
        comparison([run for run in runs if run.trained or run.evaluation]),
        el("p", "Made ", el("time", f"{now:%d %B %Y, %H:%M} UTC", datetime=now.isoformat(timespec="seconds")),
           " by llmalign report.", cls="faint"),
        cls="hero", id="summary", aria_label="Summary",
    )  # fmt: skip


def _title(names: list[str]) -> str:
    """The names themselves, as long as they make a title."""
    if len(names) > 4:
        return f"{len(names)} runs"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _section(name: str, title: str, inner: Html) -> Html:
    return el("section", el("h2", title), inner, id=name, aria_label=title)


def _grid(charts: Sequence[Html | None], key: Html) -> Html | None:
    shown = [chart for chart in charts if chart is not None]
    return join(key, el("div", shown, cls="charts")) if shown else None


def _warnings(runs: Sequence[Run]) -> Html | None:
    """What the win rates themselves say of what they rest on."""
    lines = [
        el("li", f"{run.name}: {warning}.")
        for run in runs
        for warning in listing(mapping(run.evaluation.get("winrate")).get("warnings"))
    ]
    return el("ul", lines, cls="note") if lines else None


def _curves(main: list[Html | None], others: list[Html], runs: Sequence[Run]) -> Html | None:
    shown = [chart for chart in main if chart is not None]
    if not shown and not others:
        return None
    names = {place: run.name for place, run in enumerate(runs) if run.history}
    more = el("details", el("summary", f"{len(others)} other metrics that were logged"),
              el("div", others, cls="charts"), cls="more") if others else None  # fmt: skip
    return join(legend(names, lines=True), el("div", shown, cls="charts"), more)


def _reliable(run: Run, charts: list[Html]) -> Html | None:
    if not charts:
        return None
    reason = run.reliability.get("reason")
    said = el("p", f"{run.name}. Recommended: {reason}") if isinstance(reason, str) else el("p", run.name)
    return join(said, el("div", charts, cls="charts"))


def _pictured(run: Run, shown: Html | None, said: list[str]) -> Html | None:
    if shown is None and not said:
        return None
    notes = el("ul", [el("li", sentence) for sentence in said], cls="note") if said else None
    return join(el("h3", run.name), shown, notes)


def _browser(content: dict[str, Any], left_out: list[str]) -> Html | None:
    if not content["runs"]:
        return None
    notes = el("ul", [el("li", sentence) for sentence in left_out], cls="note") if left_out else None
    return join(notes, browser(content))


def _theme() -> Html:
    return el(
        "button", "Theme: auto", type="button", id="theme", hidden=True, aria_label="Colours: as the system has them"
    )


def _foot() -> Html:
    said = "One file, no network: it can be sent and kept. Charts take focus: arrow keys read their values."
    return el("footer", el("p", said))


def _asset(name: str) -> str:
    return (files("llmalign.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
