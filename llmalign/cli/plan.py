"""`llmalign plan`."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

HELP = """\
Tells before anything is trained what a recipe takes: memory by part, steps, tokens and time, and with --gpus or
--memory which config and which batch fit. RECIPE and --key value as for train. The model's config.json is enough, its
weights are not loaded; memory is told by running the trainer's own passes on a model without numbers. Time comes from a
few real steps where the plan is for this machine and the model is small, or is worked out for H100s. Nothing is written
to output_dir.

  llmalign plan trainers/rpo/smoke.yaml
  llmalign plan trainers/rpo/recipe.yaml --model_name_or_path ./config-of-7b --gpus 8 --memory 80
  llmalign plan trainers/rpo/recipe.yaml --model_name_or_path ./config-of-70b --gpus 64 --memory 80 --rows 60000
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    parser = commands.add_parser("plan", help="tell what a recipe takes, before training", description=HELP, **layout)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--gpus", type=int, metavar="N", help="devices (1)")
    parser.add_argument("--memory", type=float, metavar="GB", help="of each GPU, such as 80; open: this machine")
    parser.add_argument("--rows", type=int, metavar="N", help="take so many rows of full length, and read no data")
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, help="run a few steps here (small models: by itself)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    import torch

    from llmalign.plan.facts import Target
    from llmalign.plan.memory import GB
    from llmalign.plan.report import sentences, tables
    from llmalign.plan.run import plan, this_machine
    from llmalign.recipe import load_recipe

    for name in ("gpus", "memory", "rows"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is a number above 0, not {value:g}")
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    recipe = load_recipe(options.recipe, rest)
    here = torch.cuda.is_available() and not recipe.config.get("use_cpu")
    elsewhere = options.memory is not None or (options.gpus is not None and not here)
    memory = None if options.memory is None else options.memory * GB
    if options.gpus is not None and memory is None and here:
        memory = this_machine(True)
    target = Target(options.gpus or 1, memory, cuda=elsewhere or here)
    made = plan(recipe, target, rows=options.rows, calibrate=options.calibrate, given=rest)
    screen = console()
    for table in tables(made):
        screen.print(table)
    for line in sentences(made):
        screen.print(line, highlight=False, soft_wrap=True, markup=False)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(made.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0
