"""`llmalign iterate`."""

import argparse
from typing import Any

from llmalign.cli.common import console, is_main_process
from llmalign.sigterm import saving_on_sigterm

ITERATE_HELP = """\
RECIPE is a recipe of `llmalign train` (inpo, pair, rpo, rdpo or copg) whose data are prompts, with an oracle: of each
round's model it samples `samples_per_prompt` answers, lets the oracle judge them, trains on the best against the worst,
and measures the new model on prompts of its own; `rounds` times. Every key can be given as --key value; the keys of the
rounds are in trainers/inpo/ITERATE.md.

Every stage is done once: the same command goes on where it was stopped, and ends with the same bytes. --dry-run says
what there is to do and what it will take, and writes nothing.

  llmalign iterate trainers/inpo/iterate_smoke.yaml
  llmalign iterate trainers/inpo/iterate.yaml --model_name_or_path ./stories260K --dry-run
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser(
        "iterate", help="sample, judge and train, in rounds", description=ITERATE_HELP, **layout
    )
    command.add_argument("recipe", metavar="RECIPE")
    command.add_argument("--dry-run", action="store_true", help="print the plan")
    command.set_defaults(run=_iterate)


def _iterate(options: argparse.Namespace, rest: list[str]) -> int:
    with saving_on_sigterm():
        return _in_rounds(options, rest)


def _in_rounds(options: argparse.Namespace, rest: list[str]) -> int:
    # Imported here, so that --help and a mistyped command answer at once.
    from llmalign.loop.config import LoopConfig
    from llmalign.recipe import load_recipe

    recipe = load_recipe(options.recipe, rest, loop=LoopConfig)
    if options.dry_run:
        from llmalign.loop.plan import plan, plan_table

        console().print(plan_table(plan(recipe)))
        return 0
    from llmalign.loop.report import rounds_table
    from llmalign.loop.rounds import iterate

    result = iterate(recipe)
    if is_main_process():
        console().print(rounds_table(result))
    return 0
