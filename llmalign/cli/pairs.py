"""`llmalign pairs`."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

PAIRS_HELP = """\
DATA has answers that were scored or judged; preference pairs are made of them, to train on. Rows are either groups:
prompt, completions, rewards (one number a completion); or comparisons, as in AlpacaEval's annotations: instruction,
output_1, output_2, preference (1: output_1 wins, 2: output_2 wins, 1.5: a tie). Texts or conversations. Or images:
prompt, images (files inside DATA's folder, as `llmalign sample` writes them), and rewards unless --reward scores them:
brightness, compressibility, incompressibility, clip:MODEL (CLIP, PickScore), package.module:function, file.py:function.
How DATA is read (--split, --columns, --where, --max_rows) as for doctor. What gives no pair is counted and shown.

  llmalign pairs scored.jsonl --out pairs.jsonl --margin 0.5
  llmalign pairs scored.jsonl --out pairs.jsonl --strategy all_pairs --max_pairs_per_prompt 4
  llmalign pairs annotations.json --out pairs.jsonl.gz --columns '{instruction: question}'
  llmalign pairs samples/images.jsonl --out pairs.parquet --reward brightness
"""
LENGTH_BIAS = 0.7


class Once(argparse.Action):
    """An option that may be given once: a second one would silently replace the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keep the value, or refuse."""
        if vars(namespace)[self.dest] is not None:
            parser.error(f"{option_string} is given twice; pairs are made by one reward")
        setattr(namespace, self.dest, values)


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("pairs", help="make pairs of scored answers", description=PAIRS_HELP, **layout)
    command.add_argument("data", metavar="DATA")
    command.add_argument(
        "--out", required=True, metavar="FILE", help="where to write: .jsonl or .jsonl.gz; images: .parquet"
    )
    command.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    command.add_argument(
        "--kind", choices=("groups", "comparisons", "images"), help="what a row is (default: by its columns)"
    )
    command.add_argument(
        "--reward", metavar="NAME", action=Once, help="of images: what scores them, in place of their own rewards"
    )
    command.add_argument(
        "--strategy", metavar="NAME", help="of groups and images: best_worst (default), best_random, all_pairs"
    )
    command.add_argument(
        "--margin", type=float, default=0.0, metavar="GAP",
        help="least difference of the rewards, or least confidence |2 preference - 3| of a judge, from 0 to 1 (0)",
    )  # fmt: skip
    command.add_argument("--max_pairs_per_prompt", type=int, metavar="N", help="of all_pairs: a random subset")
    command.add_argument("--seed", type=int, default=0, help="of best_random and of such subsets (0)")
    command.set_defaults(run=_pairs)


def _pairs(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.data.pair_files import IMAGES, PairOptions, form_of, write_pairs
    from llmalign.recipe import doctor_options

    _check_known(options, rest)
    source, _ = doctor_options(options.data, rest)
    chosen = PairOptions(options.strategy, options.margin, options.max_pairs_per_prompt, options.seed)
    out = Path(options.out)
    form = options.kind or form_of(source)
    if form == IMAGES:
        from llmalign.data.image_pairs import write_image_pairs

        report = write_image_pairs(
            source, out, score=_score(options.reward), options=chosen, overwrite=options.overwrite
        )
    elif options.reward is not None:
        raise UserError(f"--reward scores images, and {options.data} holds {form}: score the answers first.")
    else:
        report = write_pairs(source, out, form=form, options=chosen, overwrite=options.overwrite)
    _show(report, options.data, out)
    return 0


def _score(name: str | None) -> Any:
    """What scores images for `write_image_pairs`, on a GPU where there is one."""
    if name is None:
        return None
    import torch

    from llmalign.rewards.images import load_image_reward

    reward = load_image_reward(name, device="cuda" if torch.cuda.is_available() else "cpu")
    return lambda prompts, images: reward(prompts, images).tolist()


def _check_known(options: argparse.Namespace, rest: list[str]) -> None:
    from llmalign.data.specs import DataSource
    from llmalign.recipe import nearest, parse_overrides

    of_source = {field.name for field in fields(DataSource)} - {"path", "weight"}
    known = sorted((of_source | set(vars(options))) - {"command", "data", "run"})
    for key in parse_overrides(rest):
        if key not in of_source:
            raise UserError(f"pairs has no option --{key}; the nearest is --{nearest(key, known)}.")


def _show(report: Any, data: str, out: Path) -> None:
    from rich.table import Table

    from llmalign.data.pair_files import IMAGES, worded
    from llmalign.data.pairing import REASONS

    what = "comparisons" if report.form == "comparisons" else "prompts"
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(what, f"{report.rows:,}")
    table.add_row(f"{what} that gave a pair", f"{report.rows_with_pairs:,}")
    table.add_row("pairs", f"{report.pairs:,}", end_section=True)
    for reason, words in REASONS.items():
        if report.dropped[reason]:
            table.add_row(f"dropped: {worded(words, report.form)}", f"{report.dropped[reason]:,}")
    table.add_section()
    table.add_row("mean margin", f"{report.margins / report.pairs:.3g}")
    if report.form != IMAGES:
        table.add_row("pairs whose chosen answer is longer", f"{report.longer / report.pairs:.1%}")
    screen = console()
    screen.print(f"{data} read as {report.form}:", highlight=False, soft_wrap=True, markup=False)
    screen.print(table)
    screen.print("\n".join(_after(report, out)), highlight=False, soft_wrap=True, markup=False)


def _after(report: Any, out: Path) -> list[str]:
    """What to say beneath the table: a warning, and the commands that come next."""
    from llmalign.data.pair_files import IMAGES

    name = shlex.quote(str(out))
    if report.form == IMAGES:
        trained = f"  llmalign train trainers/diffusion_dpo/lora.yaml --model_name_or_path MODEL --dataset_name {name}"
        return [
            f"Pairs written to {name}. Next, with the size that your model draws:",
            f"  llmalign doctor {name} --kind image_pairs --resolution 512",
            f"{trained} --resolution 512",
        ]
    after = [f"Pairs written to {name}. Next:", f"  llmalign doctor {name} --model MODEL"]
    after.append(f"  llmalign train trainers/rpo/lora.yaml --model_name_or_path MODEL --dataset_name {name}")
    longer = report.longer / report.pairs
    if longer > LENGTH_BIAS:
        said = f"Warning: the chosen answer is the longer one in {longer:.1%} of the pairs, so length may be learned."
        after.insert(0, said)
    return after
