"""`llmalign quickstart`."""

import argparse
from typing import Any


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    quickstart = commands.add_parser("quickstart", help="align a small model here and measure it", **layout)
    quickstart.add_argument("--images", action="store_true", help="an image model instead of a language model")
    quickstart.add_argument("--output_dir", help="where to write (runs/quickstart or runs/quickstart-images)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and samples (0)")
    quickstart.set_defaults(run=_quickstart)


def _quickstart(options: argparse.Namespace, rest: list[str]) -> int:
    if options.images:
        from llmalign.quickstart_images import main as quickstart_images

        quickstart_images(options.output_dir or "runs/quickstart-images", options.seed)
        return 0
    from llmalign.quickstart import main as quickstart

    quickstart(options.output_dir or "runs/quickstart", options.seed)
    return 0
