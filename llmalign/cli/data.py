"""`llmalign doctor`."""

import argparse
from typing import Any

from rich.console import Console

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.errors import UserError

DOCTOR_HELP = """\
DATA is a file, a folder, a Hub name, sample:pairs or spec:NAME. Exits with 1 when something is wrong with it.
How it is read: --split, --config, --revision, --columns, --where, --max_rows, as in a recipe. What is allowed:
--max_truncated, --max_identical and the other limits of a recipe, as shares of the rows.

  llmalign doctor pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_length 1024 --row 0
  llmalign doctor scored.jsonl --model ./m --kind groups --columns '{completions: out.text, rewards: out.score}'
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    doctor = commands.add_parser("doctor", help="look for faults in a data set", description=DOCTOR_HELP, **layout)
    doctor.add_argument("data", metavar="DATA")
    doctor.add_argument("--model", required=True, help="the model whose tokenizer and chat template are used")
    doctor.add_argument(
        "--kind", choices=("pairs", "groups", "prompts", "text"), default="pairs", help="what a row is (default: pairs)"
    )
    doctor.add_argument(
        "--max_length", type=int, default=1024, metavar="N", help="tokens of prompt and response (1024)"
    )
    doctor.add_argument("--row", type=int, metavar="K", help="the row_id to show token by token (default: the first)")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.data.doctor import examine
    from llmalign.data.formats import load
    from llmalign.prepare import PREPARATIONS, end_ids
    from llmalign.recipe import doctor_options
    from llmalign.train import model_path
    from llmalign.trainers.loading import load_tokenizer

    source, limits = doctor_options(options.data, rest)
    model = model_path(options.model)
    tokenizer = load_tokenizer(model)
    raw = load([source], kind=options.kind)
    rows = PREPARATIONS[options.kind](raw, tokenizer, max_length=options.max_length)
    report = examine(
        raw,
        rows,
        tokenizer,
        kind=options.kind,
        max_length=options.max_length,
        eos_ids=end_ids(tokenizer, model),
        limits=limits,
    )
    screen = console()
    report.render(screen)
    _show(options.row, rows, tokenizer, screen, options.max_length)
    return SOMETHING_WRONG if report.problems() else 0


def _show(row_id: int | None, rows: Any, tokenizer: Any, screen: Console, max_length: int) -> None:
    from llmalign.data.doctor import show_row

    if not len(rows):
        return
    try:
        position = 0 if row_id is None else list(rows["row_id"]).index(row_id)
    except ValueError as error:
        raise UserError(
            f"There is no prepared row with the row_id {row_id}; the last one is {rows[-1]['row_id']}."
        ) from error
    show_row(rows[position], tokenizer, screen, max_length)
