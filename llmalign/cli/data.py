"""`llmalign doctor`."""

import argparse
from typing import Any

from rich.console import Console

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.errors import UserError

TEXT_KINDS = ("pairs", "groups", "prompts", "text")
IMAGE_KINDS = ("image_pairs", "images")
MAX_LENGTH = 1024
DOCTOR_HELP = """\
DATA is a file, a folder, a Hub name, sample:pairs or spec:NAME. Exits with 1 when something is wrong with it.
How it is read: --split, --config, --revision, --columns, --where, --max_rows, as in a recipe. What is allowed:
--max_truncated, --max_identical and the other limits of a recipe, as shares of the rows. Of images every file is
decoded, and no model is needed.

  llmalign doctor pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_length 1024 --row 0
  llmalign doctor scored.jsonl --model ./m --kind groups --columns '{completions: out.text, rewards: out.score}'
  llmalign doctor pictures.parquet --kind image_pairs --resolution 512 --max_ties 0.5
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    doctor = commands.add_parser("doctor", help="look for faults in a data set", description=DOCTOR_HELP, **layout)
    doctor.add_argument("data", metavar="DATA")
    doctor.add_argument("--model", help="the model whose tokenizer and chat template are used (of text, required)")
    doctor.add_argument(
        "--kind", choices=TEXT_KINDS + IMAGE_KINDS, default="pairs", help="what a row is (default: pairs)"
    )
    doctor.add_argument(
        "--max_length", type=int, metavar="N", help=f"tokens of prompt and response ({MAX_LENGTH}; of text)"
    )
    doctor.add_argument("--resolution", type=int, metavar="N", help="pixels a side in training (of images)")
    doctor.add_argument("--row", type=int, metavar="K", help="the row_id to show (default: the first)")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    if options.kind in IMAGE_KINDS:
        return _doctor_of_images(options, rest)
    from llmalign.data.doctor import examine
    from llmalign.data.formats import load
    from llmalign.prepare import PREPARATIONS, end_ids
    from llmalign.recipe import doctor_options
    from llmalign.train import model_path
    from llmalign.trainers.loading import load_tokenizer

    if options.model is None:
        raise UserError(
            f"Rows of {options.kind} are looked at as a model reads them: name one with --model; rows of pictures are "
            "--kind image_pairs or images."
        )
    if options.resolution is not None:
        raise UserError(f"--resolution is for images; {options.kind} are text.")
    source, limits = doctor_options(options.data, rest)
    max_length = MAX_LENGTH if options.max_length is None else options.max_length
    model = model_path(options.model)
    tokenizer = load_tokenizer(model)
    raw = load([source], kind=options.kind)
    rows = PREPARATIONS[options.kind](raw, tokenizer, max_length=max_length)
    report = examine(
        raw,
        rows,
        tokenizer,
        kind=options.kind,
        max_length=max_length,
        eos_ids=end_ids(tokenizer, model),
        limits=limits,
    )
    screen = console()
    report.render(screen)
    _show(options.row, rows, tokenizer, screen, max_length)
    return SOMETHING_WRONG if report.problems() else 0


def _doctor_of_images(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.data.image_doctor import ImageLimits, examine_images, show_image_row
    from llmalign.data.images import load_image_rows
    from llmalign.recipe import doctor_options

    for name, value in (("--model", options.model), ("--max_length", options.max_length)):
        if value is not None:
            raise UserError(f"{name} is for text; {options.kind} are looked at without.")
    if options.resolution is not None and options.resolution < 1:
        raise UserError(f"--resolution must be at least 1, got {options.resolution}.")
    source, limits = doctor_options(options.data, rest, ImageLimits)
    ties = "soft" if options.kind == "image_pairs" else "drop"
    rows = load_image_rows([source], kind=options.kind, ties=ties, lenient=True)
    shown = rows[_position(options.row, rows)]
    report = examine_images(rows, kind=options.kind, resolution=options.resolution, limits=limits)
    screen = console()
    report.render(screen)
    show_image_row(shown, screen)
    return SOMETHING_WRONG if report.problems() else 0


def _show(row_id: int | None, rows: Any, tokenizer: Any, screen: Console, max_length: int) -> None:
    from llmalign.data.doctor import show_row

    if len(rows):
        show_row(rows[_position(row_id, rows)], tokenizer, screen, max_length)


def _position(row_id: int | None, rows: Any) -> int:
    try:
        return 0 if row_id is None else list(rows["row_id"]).index(row_id)
    except ValueError as error:
        raise UserError(
            f"There is no row to show with the row_id {row_id}; the last one is {rows[-1]['row_id']}."
        ) from error
