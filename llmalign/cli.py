"""`llmalign train`, `sweep`, `cache`, `doctor`, `reliability`, `quickstart`: one sentence where something is wrong."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmalign import __version__
from llmalign.errors import UserError

USAGE_ERROR = 2
SOMETHING_WRONG = 1

TRAIN_HELP = """\
RECIPE is a YAML file, or one that is shipped, such as trainers/rpo/recipe.yaml. It names `method` (rpo, rdpo, inpo,
copg, pair, dpo, sft, reward, preference; sampling as they go: copg_online, fdpg, pf_ppo, mdpo), `model_name_or_path`
(a folder, a Hub name or embedded:tiny), `dataset_name` (a file, a folder, a Hub name or sample:pairs), and any field
of the method's config. Every key can be given as --key value.
A method's own keys are in trainers/<method>/README.md; the others are TRL's ModelConfig and transformers'
TrainingArguments. Data keys: columns, where, max_rows, streaming, eval_datasets, dataset_test_split, overlong and the
doctor's limits (max_truncated, max_identical, ...).

  llmalign train trainers/rpo/smoke.yaml
  llmalign train trainers/rpo/lora.yaml --model_name_or_path ./my-model --dataset_name pairs.jsonl
  llmalign train trainers/rpo/lora.yaml --resume auto
"""
DOCTOR_HELP = """\
DATA is a file, a folder, a Hub name, sample:pairs or spec:NAME. Exits with 1 when something is wrong with it.
How it is read: --split, --config, --revision, --columns, --where, --max_rows, as in a recipe. What is allowed:
--max_truncated, --max_identical and the other limits of a recipe, as shares of the rows.

  llmalign doctor pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_length 1024 --row 0
  llmalign doctor scored.jsonl --model ./m --kind groups --columns '{completions: out.text, rewards: out.score}'
"""
SWEEP_HELP = """\
RECIPE as for train; what is swept comes right after it, as key=value1,value2, any number of keys; then any --key value
for all runs. Each combination trains in a folder of its own, <output_dir>/<key>=<value>, and all of them share one
cache of the reference's log-probs, which the first one fills. All recipes are checked before the first run starts. The
same command goes on where it was stopped. Ends in a table and <output_dir>/sweep.json; exits with 1 when a run failed.

  llmalign sweep trainers/rpo/smoke.yaml beta=.05,.1,.3
  llmalign sweep trainers/rpo/lora.yaml beta=.05,.1 eta=.005,.05 --dataset_name pairs.jsonl --output_dir runs/grid
"""
CACHE_HELP = """\
Scores DATA under the model once, so that no training run with this model as its reference (or as INPO's previous
iterate) has to. DATA and how it is read (--split, --columns, --where, --max_rows) as for doctor. What changes a score
must be as in training: --max_length, --bf16, --dtype, --scoring (open here is what training chooses when it is open
there; a LoRA recipe in bf16 holds the reference in bfloat16: --dtype bfloat16). Goes on where it was stopped.

  llmalign cache pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_length 1024
  llmalign cache big.jsonl --model ./m --kind groups --streaming
"""
RELIABILITY_HELP = """\
DATA has a row for each prompt: completions, rewards (the reward that training would use, one number a completion) and
scores (the true ones, such as the share of unit tests passed). Sample them from the model that training starts from.
For every PF-PPO strategy: R^2 of score on reward over the responses it would train on and over groups of equal width,
and the rank correlation, each with a 95 % bootstrap interval over prompts; then the strategy it recommends, and why.
How DATA is read (--split, --columns, --where, --max_rows) as for doctor.

  llmalign reliability scored.jsonl --out reliability.png --json reliability.json
  llmalign reliability scored.jsonl --columns '{rewards: out.reward, scores: out.passed}' --strategies none,best_worst
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (the doctor found something) or 2 (it could not be done)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command == "quickstart":
        parser.error(f"quickstart does not know {' '.join(rest)}")
    _set_up_logging()
    try:
        return _run_launched(options, rest) if "RANK" in os.environ else _run(options, rest)
    except KeyboardInterrupt:
        if _is_main_process():
            again = "--resume auto" if options.command == "train" else "the same command"
            print(f"llmalign: stopped; go on with {again}.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    """The command's status; what it raised is forgotten on return, and with it the trainer that its frames held."""
    try:
        return options.run(options, rest)
    except UserError as error:
        if _is_main_process():
            print(f"llmalign: {error}", file=sys.stderr)
        return USAGE_ERROR


def _run_launched(options: argparse.Namespace, rest: list[str]) -> int:
    """The same as one of the processes of a launcher. An interrupt leaves at once: the others may be mid-exchange."""
    from llmalign.processes import end_processes, load_group_users

    load_group_users()
    status = _run(options, rest)
    end_processes(together=status == 0)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar; `train` takes any further --key value as an override of its recipe."""
    parser = argparse.ArgumentParser(prog="llmalign", description="Align language models with preferences.")
    parser.add_argument("--version", action="version", version=f"llmalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}

    train = commands.add_parser("train", help="train as a recipe says", description=TRAIN_HELP, **layout)
    train.add_argument("recipe", metavar="RECIPE")
    train.add_argument("--resume", metavar="PATH|auto", help="go on from a checkpoint, or from the newest whole one")
    train.set_defaults(run=_train)

    sweep = commands.add_parser("sweep", help="train a grid of recipes", description=SWEEP_HELP, **layout)
    sweep.add_argument("recipe", metavar="RECIPE")
    sweep.add_argument("grid", metavar="KEY=V1,V2", nargs="+", help="what is swept")
    sweep.set_defaults(run=_sweep)

    cache = commands.add_parser("cache", help="score a data set ahead of training", description=CACHE_HELP, **layout)
    cache.add_argument("data", metavar="DATA")
    cache.add_argument("--model", required=True, help="the reference: a folder, a Hub name or embedded:tiny")
    cache.add_argument("--kind", choices=("pairs", "groups"), default="pairs", help="what a row is (default: pairs)")
    cache.add_argument("--max_length", type=int, default=1024, metavar="N", help="tokens of prompt and response (1024)")
    cache.add_argument("--bf16", nargs="?", const="true", metavar="true|false", help="compute in bfloat16")
    cache.add_argument("--dtype", help="what the weights are held in, such as bfloat16")
    cache.add_argument("--scoring", help="auto, shared_prompt, padding_free or padded")
    cache.add_argument("--tokens_per_batch", type=int, metavar="N", help="tokens scored at a time")
    cache.add_argument("--reference_cache_dir", metavar="DIR", help="where to keep it (~/.cache/llmalign/reference)")
    cache.add_argument("--streaming", action="store_true", help="read DATA in parts")
    cache.set_defaults(run=_cache)

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

    _add_reliability(commands, layout)

    quickstart = commands.add_parser("quickstart", help="align a small model here and measure it", **layout)
    quickstart.add_argument("--output_dir", default="runs/quickstart", help="where to write (runs/quickstart)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and samples (0)")
    quickstart.set_defaults(run=_quickstart)
    return parser


def _add_reliability(commands: Any, layout: dict[str, Any]) -> None:
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


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    # Imported here, so that --help and a mistyped command answer at once.
    from llmalign.recipe import load_recipe
    from llmalign.train import run, summary

    result = run(load_recipe(options.recipe, rest), resume=options.resume)
    if _is_main_process():
        _console().print(summary(result))
    return 0


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.sweep import FAILED, sweep, table

    entries = sweep(options.recipe, options.grid, rest)
    if _is_main_process():
        _console().print(table(entries))
    return SOMETHING_WRONG if any(entry.status == FAILED for entry in entries) else 0


def _cache(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.fill import fill
    from llmalign.recipe import doctor_options
    from llmalign.values import parse_text

    source, limits = doctor_options(options.data, rest)
    filled = fill(
        source,
        limits,
        model=options.model,
        kind=options.kind,
        streaming=options.streaming,
        dtype=options.dtype,
        max_length=options.max_length,
        bf16=None if options.bf16 is None else parse_text("bf16", options.bf16, bool),
        scoring=options.scoring,
        tokens_per_batch=options.tokens_per_batch,
        reference_cache_dir=options.reference_cache_dir,
    )
    if _is_main_process():
        _console().print(str(filled), highlight=False, soft_wrap=True)
    return 0


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
    console = _console()
    report.render(console)
    _show(options.row, rows, tokenizer, console, options.max_length)
    return SOMETHING_WRONG if report.problems() else 0


def _show(row_id: int | None, rows: Any, tokenizer: Any, console: Console, max_length: int) -> None:
    from llmalign.data.doctor import show_row

    if not len(rows):
        return
    try:
        position = 0 if row_id is None else list(rows["row_id"]).index(row_id)
    except ValueError as error:
        raise UserError(
            f"There is no prepared row with the row_id {row_id}; the last one is {rows[-1]['row_id']}."
        ) from error
    show_row(rows[position], tokenizer, console, max_length)


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
    console = _console()
    console.print(table(result))
    console.print(f"Recommended: {result.reason}", highlight=False, soft_wrap=True)
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


def _quickstart(options: argparse.Namespace, rest: list[str]) -> int:
    from llmalign.quickstart import main as quickstart

    quickstart(options.output_dir, options.seed)
    return 0


def _console() -> Console:
    """Standard output; wide where it is a file or a pipe, which would otherwise be cut at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _set_up_logging() -> None:
    """Plain sentences on stderr from the main process, errors alone from the others."""
    level = logging.INFO if _is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("llmalign").setLevel(level)
    # The doctor counts long rows itself, and says what happens to them.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    # Deprecations inside the libraries: nothing that a user of the command line could act on.
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
