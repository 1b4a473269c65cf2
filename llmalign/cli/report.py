"""`llmalign report`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

REPORT_HELP = """\
RUN is the folder of a training run, of evaluate, iterate or sample, a file of annotations, or what reliability --json
wrote; any number of them, compared. Writes one HTML file that needs no network: what was trained and whether it got
better, win rates with intervals, lengths, training curves, KL against reward, rounds, reliability, images, a browser of
outputs side by side, and the recipes. What is absent is left out, with the command that makes it. A file that cannot be
read is named, and the rest is shown.

  llmalign report runs/rpo
  llmalign report runs/rpo runs/dpo samples --out report.html --title "RPO and DPO"
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("report", help="runs as one HTML page", description=REPORT_HELP, **layout)
    command.add_argument("runs", metavar="RUN", nargs="+")
    command.add_argument("--out", default="report.html", metavar="FILE", help="the page (report.html)")
    command.add_argument("--title", metavar="TEXT", help="of the page (the run's name)")
    command.add_argument("--max_rows", type=int, default=2000, metavar="N", help="outputs of each run to browse (2000)")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"report does not know {' '.join(rest)}.")
    if options.max_rows < 1:
        raise UserError(f"--max_rows is at least 1, not {options.max_rows}.")
    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}.")
    from llmalign.report.page import write_report

    runs = write_report(options.runs, out, title=options.title, most_rows=options.max_rows)
    names = ", ".join(run.name for run in runs)
    size = out.stat().st_size / 1e6
    console().print(f"{out} ({size:.1f} MB): {names}.", highlight=False, soft_wrap=True, markup=False)
    return 0
