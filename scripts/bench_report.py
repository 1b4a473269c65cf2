"""How large a report of three runs of 805 outputs is, and how soon it is open.

`python scripts/bench_report.py [FILE FILE]`: files are annotations whose outputs are to be shown; without them outputs
are made of words. Seconds are until the page has loaded, and until its outputs are unpacked and shown, in headless
Chromium: the median of five, after a first one.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benching.chromium import Chromium, find
from benching.report_runs import make_runs

from llmalign.report import write_report

RUNS = 5
LOADED = "document.readyState === 'complete'"
SHOWN = "document.documentElement?.dataset.ready === 'true'"


def main() -> None:
    """Print one line a measurement, then all of them as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(Path(folder) / "runs", [Path(name) for name in sys.argv[1:]])
        page = Path(folder) / "report.html"
        started = time.perf_counter()
        write_report(runs, page)
        measured = {"seconds to write": time.perf_counter() - started, "megabytes": page.stat().st_size / 1e6}
        browser = find()
        if browser is None:
            print("No Chromium was found: how soon the page is open is not measured.")
        else:
            measured |= opened(browser, page)
    print("\n".join(f"{value:7.3f}  {name}" for name, value in measured.items()))
    print(json.dumps(measured))


def opened(browser: str, page: Path) -> dict[str, float]:
    """Seconds by what is waited for."""
    found: dict[str, float] = {}
    with Chromium(browser) as chromium:
        chromium.view(1280, 900)
        found["seconds until shown, first time"] = chromium.open(page, SHOWN)
        for name, ready in (("seconds until loaded", LOADED), ("seconds until the outputs are shown", SHOWN)):
            found[name] = statistics.median(chromium.open(page, ready) for _ in range(RUNS))
    return found


if __name__ == "__main__":
    main()
