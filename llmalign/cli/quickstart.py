"""`llmalign quickstart`."""

import argparse
from typing import Any


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    quickstart = commands.add_parser("quickstart", help="align a small model here and measure it", **layout)
    quickstart.add_argument("--output_dir", default="runs/quickstart", help="where to write (runs/quickstart)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and samples (0)")
    quickstart.set_defaults(run=_quickstart)


def _quickstart(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.quickstart import main as quickstart

    quickstart(options.output_dir, options.seed)
    return 0
