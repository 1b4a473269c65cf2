"""`llmalign judge`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.cli.judging import add_judge_arguments, judge_of
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

JUDGE_HELP = """\
OUTPUTS are a model's (rows of instruction, output, generator, as `llmalign generate` and AlpacaEval write them), REF
another model's on the same instructions. Writes AlpacaEval's annotations.json: preference from 1 to 2, 2 where the
answer in OUTPUTS is better. Identical answers are 1.5 without a question. Which answer is shown first is AlpacaEval's
rule, or both orders. Nothing is paid for twice: stopped anywhere, the same command goes on, and rows that failed are
asked for again; what failed is counted and has the preference null. The key of an endpoint comes from the environment.

  llmalign judge outputs.json --reference gpt4.json --out annotations.json --judge MODEL --url https://api.openai.com/v1
  llmalign judge outputs.json --reference start.json --out annotations.json --reward_model runs/reward
  llmalign winrate annotations.json
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("judge", help="compare outputs with a reference's", description=JUDGE_HELP, **layout)
    command.add_argument("outputs", metavar="OUTPUTS")
    command.add_argument("--reference", required=True, metavar="REF", help="the baseline's outputs")
    command.add_argument("--out", required=True, metavar="FILE", help="annotations.json, which is gone on with")
    command.add_argument("--overwrite", action="store_true", help="drop what else was judged in --out")
    command.add_argument("--annotator", metavar="NAME", help="the annotations' name for the judge (from its settings)")
    command.add_argument("--max_rows", type=int, metavar="N", help="the first N outputs alone")
    add_judge_arguments(command)
    command.set_defaults(run=_judge)


def _judge(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"judge does not know {' '.join(rest)}.")
    if options.max_rows is not None and options.max_rows < 1:
        raise UserError(f"--max_rows is at least 1, not {options.max_rows}.")
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from llmalign.evaluation.annotate import annotate
    from llmalign.evaluation.annotations import read_outputs

    outputs, reference = read_outputs(options.outputs)[: options.max_rows], read_outputs(options.reference)
    if options.max_rows is not None:
        wanted = {row["instruction"] for row in outputs}
        reference = [row for row in reference if row["instruction"] in wanted] or reference
    judge = judge_of(options, Path(options.out).parent)
    try:
        counts = annotate(
            outputs, reference, judge.oracle, annotator=options.annotator or judge.annotator, out=options.out,
            at_a_time=judge.at_a_time,
            progress=None if judge.at_a_time is None else lambda parts: tqdm(parts, desc="Judging", unit="batch"),
            reasons=judge.reasons, replace=options.overwrite,
        )  # fmt: skip
    finally:
        judge.close()
    console().print(f"{counts.text()}: {options.out}", markup=False, highlight=False, soft_wrap=True)
    if counts.failed:
        logger.warning(
            "%d rows have no result and the preference null; the same command asks for them again.", counts.failed
        )
    return 0 if counts.rows else SOMETHING_WRONG
