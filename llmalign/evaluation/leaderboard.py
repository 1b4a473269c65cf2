"""AlpacaEval's leaderboard.csv: a row a model, the best length-controlled win rate first."""

import csv
import io
import math
from pathlib import Path

from llmalign.errors import UserError
from llmalign.evaluation.alpaca import Summary
from llmalign.evaluation.annotations import write_text

COLUMNS = (
    "win_rate", "standard_error", "mode", "avg_length", "n_wins", "n_wins_base", "n_draws", "n_total",
    "discrete_win_rate", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip
ORDER = "length_controlled_winrate"

Table = dict[str, dict[str, str]]


def read_leaderboard(path: Path | str) -> tuple[list[str], Table]:
    """The columns and the rows, by model and as text, of a leaderboard.csv; its first column has the models' names.

    Raises UserError where the file cannot be read or has no such columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            header, *rows = list(csv.reader(handle)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the leaderboard {path} cannot be read: {error}") from error
    if "win_rate" not in header:
        raise UserError(f"{path} is no leaderboard: its first line names no column win_rate")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"line {number} of {path} has {len(row)} cells, and the first line {len(header)}")
    names = [row[0] for row in rows]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UserError(f"{path} has two rows of {twice}; leave one")
    return header[1:], {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def update_leaderboard(path: Path | str, summaries: dict[str, Summary]) -> None:
    """Put models into a leaderboard.csv, or begin one; the cells of other models and of other columns stay as they are.

    What is not known is an empty cell. Raises UserError as `read_leaderboard` does.
    """
    columns, table = read_leaderboard(path) if Path(path).is_file() else ([], {})
    columns = [*columns, *(name for name in COLUMNS if name not in columns)]
    for model, summary in summaries.items():
        own = summary.as_dict()
        table[model] = {**table.get(model, {}), **{name: _cell(own[name]) for name in COLUMNS}}
    ordered = sorted(table, key=lambda model: -_number(table[model].get(ORDER) or table[model].get("win_rate")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *columns])
    writer.writerows([model, *(table[model].get(name, "") for name in columns)] for model in ordered)
    write_text(path, text.getvalue())


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _number(cell: str | None) -> float:
    try:
        value = float(cell or "-inf")
    except ValueError:
        return -math.inf
    return -math.inf if math.isnan(value) else value
