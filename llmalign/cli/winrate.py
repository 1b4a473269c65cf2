"""`llmalign winrate`."""

import argparse
import itertools
import logging
from pathlib import Path
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

WINRATE_HELP = """\
ANNOTATIONS are judged comparisons as AlpacaEval keeps them (.json, .jsonl, .gz), a file a model: instruction, output_1
(the baseline's), output_2 (the model's), preference from 1 to 2, where 2 says that output_2 wins. Prints AlpacaEval's
numbers: win rate with standard error and 95 % interval, discrete and length-controlled win rate, a row a data set. Of
several files also the paired differences with 95 % intervals, and Bradley-Terry strengths.

Length is controlled with AlpacaEval's difficulties, from --constants or the Hub, looked up by instruction; the
published numbers look them up by position in the file. Other prompts, and --no_constants: without difficulties. What is
left out of a number is said. Exits with 1 where a file has no judged row.

  llmalign winrate runs/rpo/evaluation/annotations.json
  llmalign winrate mine.json yours.json --leaderboard leaderboard.csv --json winrates.json
  llmalign winrate text_davinci_001.json --constants lc_constants.json.gz --alignment position
"""
MODELS = "models"


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("winrate", help="win rates of judged outputs", description=WINRATE_HELP, **layout)
    command.add_argument("annotations", metavar="ANNOTATIONS", nargs="+")
    add_constants_arguments(command)
    command.add_argument("--mode", default="community", help="the leaderboard's column mode (community)")
    command.add_argument("--leaderboard", metavar="CSV", help="put the models into this leaderboard.csv")
    command.add_argument("--json", metavar="OUT", help="write the numbers as JSON")
    command.set_defaults(run=_winrate)


def _winrate(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"winrate does not know {' '.join(rest)}.")
    from llmalign.evaluation.alpaca import summarize
    from llmalign.evaluation.annotations import read_annotations, write_json
    from llmalign.evaluation.leaderboard import update_leaderboard

    rows = {path: read_annotations(path) for path in options.annotations}
    if len(rows) < len(options.annotations):
        raise UserError("A file of annotations is named twice: name each once.")
    constants = constants_of(options, list(rows.values()))
    found: dict[str, Any] = {}
    for path, own in rows.items():
        summary = summarize(own, constants=constants, alignment=options.alignment, mode=options.mode)
        name = summary.generator_2 or Path(path).stem
        if name in found:
            raise UserError(f"{path} is of {name}, as an earlier file is: give each model one file.")
        found[name] = summary
        for warning in summary.warnings:
            logger.warning("%s: %s.", name, warning)
    by_name = dict(zip(found, rows.values(), strict=True))
    several = _several(by_name) if len(found) > 1 else {}
    _print(found, several)
    if options.leaderboard:
        update_leaderboard(options.leaderboard, found)
    if options.json:
        one = {name: summary.as_dict() for name, summary in found.items()}
        write_json(options.json, {MODELS: one, **several} if several else next(iter(one.values())))
    return SOMETHING_WRONG if any(not summary.n_rows for summary in found.values()) else 0


def add_constants_arguments(command: argparse.ArgumentParser) -> None:
    """The options that say with which difficulties length is controlled."""
    command.add_argument("--constants", metavar="FILE", help="AlpacaEval's constants (.json, .json.gz; else the Hub's)")
    command.add_argument("--no_constants", action="store_true", help="control length without difficulties")
    command.add_argument(
        "--alignment", choices=("instruction", "position"), default="instruction", help="of difficulties"
    )


def constants_of(options: argparse.Namespace, files: list[list[dict[str, Any]]]) -> Any:
    """The constants where a row is AlpacaEval's; None, with a word, where they cannot be had."""
    from llmalign.evaluation.constants import instruction_index, load_constants

    if options.no_constants and options.alignment == "position":
        raise UserError("--alignment says where difficulties are looked up, and --no_constants does without them.")
    if options.constants and options.no_constants:
        raise UserError("--constants names difficulties and --no_constants does without: give one of them.")
    if options.constants:
        return load_constants(options.constants)
    ours = any(instruction_index(row) is not None for own in files for row in own)
    if options.no_constants or not (ours or options.alignment == "position"):
        return None
    try:
        return load_constants()
    except UserError as error:
        logger.warning("%s.", error)
        return None


def _several(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Paired differences and Bradley-Terry strengths; what cannot be said of some models is logged."""
    from dataclasses import asdict

    from llmalign.evaluation.alpaca import compare
    from llmalign.evaluation.bradley_terry import bradley_terry

    differences = []
    for one, other in itertools.combinations(rows, 2):
        try:
            differences.append({"model": one, "other": other, **asdict(compare(rows[one], rows[other]))})
        except UserError as error:
            logger.warning("%s and %s: %s.", one, other, error)
    try:
        ranked = bradley_terry([row for own in rows.values() for row in own])
    except UserError as error:
        logger.warning("Bradley-Terry: %s.", error)
        ranked = {}
    return {"differences": differences, "bradley_terry": {name: asdict(value) for name, value in ranked.items()}}


def _print(found: dict[str, Any], several: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    screen = console()
    table = Table(title="Win rates, %", box=SIMPLE_HEAD)
    for name in ("model", "LC win rate", "win rate", "95 %", "discrete", "rows", "won-lost-tied", "characters"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name, one in found.items():
        table.add_row(
            Text(name), _with_error(one.length_controlled_winrate, one.lc_standard_error),
            _with_error(one.win_rate, one.standard_error), _interval(one.interval), _number(one.discrete_win_rate),
            str(one.n_rows), f"{one.n_wins}-{one.n_wins_base}-{one.n_draws}", str(one.avg_length),
        )  # fmt: skip
    screen.print(table)
    for name, one in found.items():
        if len(one.per_dataset) > 1:
            parts = Table(title=Text(f"{name}, by data set"), box=SIMPLE_HEAD)
            for column in ("data set", "rows", "win rate"):
                parts.add_column(column, justify="left" if column == "data set" else "right")
            for row in one.per_dataset:
                parts.add_row(Text(row["dataset"]), str(row["n"]), _with_error(row["win_rate"], row["standard_error"]))
            screen.print(parts)
    _print_several(screen, several)


def _print_several(screen: Any, several: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for row in several.get("differences", ()):
        interval = f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        screen.print(
            f"{row['model']} minus {row['other']}: {interval} points of win rate, on {row['n']} shared instructions",
            markup=False, highlight=False,
        )  # fmt: skip
    if several.get("bradley_terry"):
        table = Table(title="Bradley-Terry, Elo points above the mean", box=SIMPLE_HEAD)
        for name in ("model", "strength", "comparisons"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for name, row in several["bradley_terry"].items():
            table.add_row(Text(name), f"{row['elo']:+.0f} [{row['low']:+.0f}, {row['high']:+.0f}]", str(row["n"]))
        screen.print(table)


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)} ± {error:.2f}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _interval(estimate: Any) -> str:
    return "" if estimate is None else f"[{estimate.low:.2f}, {estimate.high:.2f}]"
