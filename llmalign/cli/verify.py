"""`llmalign verify`."""

import argparse
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.errors import UserError

VERIFY_HELP = """\
RUN is the folder of a run (train, sweep or iterate), one checkpoint, or the folder of a model. Every file that a
manifest names is read and compared with the size and the SHA-256 that it had when it was written; --quick compares
sizes alone. What has no manifest, from an older version or from elsewhere, is looked at for its structure. Exits with 0
where all is whole, with 1 where something is broken, which is named, and with 2 where there is nothing to verify.

  llmalign verify runs/rpo
  llmalign verify runs/rpo/checkpoint-200 --quick
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser(
        "verify", help="check that a run's files are whole", description=VERIFY_HELP, **layout
    )
    command.add_argument("path", metavar="RUN")
    command.add_argument("--quick", action="store_true", help="compare sizes, without reading the files")
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"verify does not know {' '.join(rest)}.")
    # Imported here, so that --help and a mistyped command answer at once.
    from llmalign.verify import table, verify

    found = verify(options.path, quick=options.quick)
    screen = console()
    screen.print(table(found))
    for fault in (fault for one in found for fault in one.faults):
        screen.print(fault, highlight=False, soft_wrap=True, markup=False)
    return SOMETHING_WRONG if any(one.faults for one in found) else 0
