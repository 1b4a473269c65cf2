"""`llmalign reliability`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

RELIABILITY_HELP = """\
DATA has a row for each prompt: completions, rewards (the reward that training would use, one number a completion) and
scores (the true ones, such as the share of unit tests passed). Sample them from the model that training starts from.
For every PF-PPO strategy: R^2 of score on reward over the responses it would train on and over groups of equal width,
and the rank correlation, each with a 95 % bootstrap interval over prompts; then the strategy it recommends, and why.
How DATA is read (--split, --columns, --where, --max_rows) as for doctor.

  llmalign reliability scored.jsonl --out reliability.png --json reliability.json
  llmalign reliability scored.jsonl --columns '{rewards: out.reward, scores: out.passed}' --strategies none,best_worst
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser(
        "reliability", help="how well a reward predicts the true score", description=RELIABILITY_HELP, **layout
    )
    command.add_argument("data", metavar="DATA")
    command.add_argument("--strategies", metavar="A,B", help="none,best_of_n,best_random,best_worst,power (all)")
    command.add_argument("--n_groups", type=int, default=20, metavar="N", help="groups of equal width (20)")
    command.add_argument("--power", type=float, default=3.0, metavar="K", help="power: weights |reward|^K (3)")
    command.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    command.add_argument("--out", metavar="PNG", help="draw groups of rewards against their scores")
    command.add_argument("--json", metavar="FILE", help="write all numbers")
    command.set_defaults(run=_reliability)


def _reliability(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.data.doctor import Limits
    from llmalign.losses import STRATEGIES
    from llmalign.recipe import doctor_options
    from llmalign.rewards.reliability import as_dict, reliability
    from llmalign.rewards.reliability_report import plot_reliability, table

    source, limits = doctor_options(options.data, rest)
    if limits != Limits():
        raise UserError("reliability looks at numbers alone: the doctor's --max_... limits are not for it.")
    rewards, scores = _scored_groups(source)
    result = reliability(
        rewards,
        scores,
        strategies=STRATEGIES if options.strategies is None else options.strategies.replace(",", " ").split(),
        n_groups=options.n_groups,
        power=options.power,
        resamples=options.resamples,
        seed=options.seed,
    )
    if options.out is not None:
        plot_reliability(result, options.out)
    if options.json is not None:
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_dict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    screen = console()
    screen.print(table(result))
    screen.print(f"Recommended: {result.reason}", highlight=False, soft_wrap=True)
    return 0


def _scored_groups(source: Any) -> tuple[list[list[float]], list[list[float]]]:
    """Rewards and true scores of rows of kind groups, which are read twice: with the one and the other as rewards."""
    from llmalign.data.formats import load

    columns = dict(source.columns or {})
    truth = columns.pop("scores", "scores")
    rewards = load([replace(source, columns=columns or None)], kind="groups")
    try:
        scores = load([replace(source, columns={**columns, "rewards": truth})], kind="groups")
    except UserError as error:
        raise UserError(f"The scores cannot be read (as `rewards` are): {error}") from error
    return rewards["rewards"][:], scores["rewards"][:]
