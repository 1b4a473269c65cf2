"""The entry: one grammar made of all commands, and one sentence where something is wrong."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from llmalign import __version__
from llmalign.cli import (
    chat,
    data,
    evaluate,
    export,
    generate,
    hub,
    iterate,
    judge,
    pairs,
    plan,
    quickstart,
    report,
    rewards,
    sampling,
    training,
    verify,
    winrate,
)
from llmalign.cli.common import USAGE_ERROR, is_main_process, left_for_launcher
from llmalign.cli.going_on import farewell
from llmalign.errors import OneProcessError, UserError
from llmalign.secrets import Redacting, redacted
from llmalign.sigterm import Preempted

FAMILIES = (
    training,
    plan,
    iterate,
    verify,
    data,
    pairs,
    rewards,
    sampling,
    generate,
    judge,
    winrate,
    evaluate,
    report,
    chat,
    export,
    hub,
    quickstart,
)  # in the order in which --help lists them


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (the doctor found something) or 2 (it could not be done)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command == "quickstart":
        parser.error(f"quickstart does not know {' '.join(rest)}")
    _set_up_logging()
    try:
        return (_run_launched if "RANK" in os.environ else _run)(options, rest, arguments)
    except KeyboardInterrupt:
        if is_main_process():
            again = {"train": "--resume auto", "sample": "--overwrite"}.get(options.command, "the same command")
            _say(f"llmalign: stopped; go on with {again}.")
        return 130


def _run(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    """The command's status; what it raised is forgotten on return, and with it the trainer that its frames held."""
    try:
        return options.run(options, rest)
    except UserError as error:
        sentence = f"llmalign: {redacted(str(error))}"
        if not left_for_launcher(sentence) and (is_main_process() or isinstance(error, OneProcessError)):
            _say(sentence)
        return USAGE_ERROR
    except Preempted as stop:
        if is_main_process():
            _say(farewell(stop, arguments))
        return 0


def _say(text: str) -> None:
    """Print on a line of its own, whatever progress bar was being drawn."""
    tqdm.write(text, file=sys.stderr)


def _run_launched(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    """The same as one of the processes of a launcher. An interrupt leaves at once: the others may be mid-exchange."""
    from llmalign.processes import end_processes, load_group_users

    load_group_users()
    status = _run(options, rest, arguments)
    end_processes(together=status == 0)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar; `train` takes any further --key value as an override of its recipe."""
    parser = argparse.ArgumentParser(prog="llmalign", description="Align language and image models with preferences.")
    parser.add_argument("--version", action="version", version=f"llmalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    for family in FAMILIES:
        family.add(commands, layout)
    return parser


def _set_up_logging() -> None:
    """Plain sentences on stderr from the main process, errors alone from the others."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(one, Redacting) for one in handler.filters):
            handler.addFilter(Redacting())
    logging.getLogger("llmalign").setLevel(level)
    # The doctor counts long rows itself, and says what happens to them.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    # Of a LoRA file without weights for the text encoders, as every one is here.
    logging.getLogger("diffusers.loaders.lora_base").setLevel(logging.ERROR)
    # Deprecations inside the libraries: nothing that a user of the command line could act on.
    warnings.simplefilter("ignore", FutureWarning)
