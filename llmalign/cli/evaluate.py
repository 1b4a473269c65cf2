"""`llmalign evaluate`."""

import argparse
import logging
from pathlib import Path
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.cli.generate import add_sampling_arguments, generate_with, sampling_of
from llmalign.cli.judging import DEFAULTS, ONE_OF, add_judge_arguments, given, judge_of
from llmalign.cli.winrate import add_constants_arguments, constants_of
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

EVALUATE_HELP = """\
`llmalign generate`, `judge` and `winrate` in one, into a folder (RUN/evaluation): MODEL and its reference answer the
prompts, a judge compares them. The reference is a file of outputs, a model, or what the run started from. --pairs adds
the share of held-out pairs that the model orders as people did, --benchmarks tasks of lm-eval. evaluation.json holds
all numbers, for `llmalign report` and the model's card. Stopped anywhere, the same command goes on; what is there is
not made again.

  llmalign evaluate runs/rpo --prompts prompts.jsonl --reward_model runs/reward --pairs held_out.jsonl
  llmalign evaluate runs/rpo --prompts alpaca_eval.json --reference gpt4_outputs.json --judge MODEL --url http://host/v1
  llmalign evaluate runs/rpo --benchmarks arc_easy,hellaswag --limit 200
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("evaluate", help="measure a model", description=EVALUATE_HELP, **layout)
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--out", metavar="DIR", help="where to write (RUN/evaluation, else evaluations/NAME)")
    command.add_argument("--overwrite", action="store_true", help="replace files there that others wrote or changed")
    command.add_argument("--prompts", metavar="DATA", help="what is answered and judged, as for generate")
    command.add_argument("--max_rows", type=int, metavar="N", help="the first N prompts alone")
    command.add_argument("--reference", metavar="REF", help="outputs (.json, .jsonl, .gz) or a model (the run's start)")
    command.add_argument("--pairs", metavar="DATA", help="held-out preference pairs, as for train")
    command.add_argument("--max_length", type=int, metavar="N", help="tokens of a pair's prompt and response")
    command.add_argument("--benchmarks", metavar="TASKS", help="of lm-eval, with commas between them")
    command.add_argument("--limit", type=int, metavar="N", help="rows of each benchmark")
    add_sampling_arguments(command)
    add_judge_arguments(command)
    add_constants_arguments(command)
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    if rest and not options.pairs:
        from llmalign.recipe import nearest

        near = nearest(rest[0].lstrip("-").split("=")[0], sorted(set(vars(options)) - {"command", "run"}))
        raise UserError(
            f"evaluate does not know {rest[0]}; the nearest is --{near}, and what reads rows needs --pairs."
        )
    for name in ("max_rows", "max_length", "limit"):
        if vars(options)[name] is not None and vars(options)[name] < 1:
            raise UserError(f"--{name} is at least 1, not {vars(options)[name]}.")
    if options.limit is not None and not options.benchmarks:
        raise UserError("--limit is of --benchmarks: give both, or neither.")
    if options.max_length is not None and not options.pairs:
        raise UserError("--max_length is of --pairs: give both, or neither.")
    judged = any(vars(options)[name] for name in ONE_OF)
    if not (options.prompts or options.pairs or options.benchmarks):
        raise UserError("There is nothing to measure: give --prompts with a judge, --pairs or --benchmarks.")
    if judged != bool(options.prompts):
        raise UserError(
            "A judge needs --prompts to judge answers to."
            if judged
            else "--prompts need a judge: --judge, --reward_model, "
            "--preference_model or --function; answers alone are made by `llmalign generate`."
        )
    from llmalign.evaluate import EVALUATION, write_evaluation
    from llmalign.inference import model_name

    unread = given(options, DEFAULTS) if not judged else ""
    if unread:
        raise UserError(f"{unread} belong to a judge, and none is named.")
    if options.benchmarks:
        from llmalign.evaluation.benchmarks import require_benchmarks

        require_benchmarks()  # before hours of generating
    folder = Path(options.out) if options.out else _folder(options.model, model_name(options.model))
    pairs = _pairs(options, rest)
    found: dict[str, Any] = {}
    if options.prompts:
        found |= _win_rates(options, folder)
    if options.benchmarks:
        found["benchmarks"] = _benchmarks(options)
    if pairs is not None:
        from llmalign.evaluate import preference_accuracy

        found["accuracy"] = preference_accuracy(
            options.model, pairs, base=options.base, dtype=options.dtype, max_length=options.max_length
        )
    _print(write_evaluation(folder, options.model, **found), folder / EVALUATION)
    return SOMETHING_WRONG if judged and not found["summary"].n_rows else 0


def _folder(model: str, name: str) -> Path:
    """Beside what is evaluated where that is a folder of one's own."""
    path = Path(model).expanduser()
    return path / "evaluation" if path.is_dir() else Path("evaluations") / name.replace(":", "-")


def _pairs(options: argparse.Namespace, rest: list[str]) -> Any:
    """The held-out pairs, checked before anything is drawn."""
    if not options.pairs:
        return None
    from llmalign.data.doctor import Limits
    from llmalign.data.formats import load
    from llmalign.recipe import doctor_options

    source, limits = doctor_options(options.pairs, rest)
    if limits != Limits():
        raise UserError("evaluate takes pairs as they are: the doctor's --max_... limits are not for it.")
    load([source], kind="pairs")
    return source


def _win_rates(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from llmalign.evaluate import ANNOTATIONS, LEADERBOARD, OUTPUTS, Made
    from llmalign.evaluation.alpaca import summarize
    from llmalign.evaluation.annotate import annotate
    from llmalign.evaluation.annotations import read_annotations
    from llmalign.evaluation.leaderboard import update_leaderboard
    from llmalign.inference import model_name

    judge = judge_of(options, folder)
    try:
        reference = _reference(options, folder)
        outputs = _outputs(options, folder, OUTPUTS, options.model, options.base)
        made = Made(folder, overwrite=options.overwrite)  # read again: the outputs were noted since
        counts = annotate(
            outputs, reference, judge.oracle, annotator=judge.annotator, out=folder / ANNOTATIONS,
            at_a_time=judge.at_a_time, reasons=judge.reasons,
            replace=made.is_ours(ANNOTATIONS) or options.overwrite,
            progress=None if judge.at_a_time is None else lambda parts: tqdm(parts, desc="Judging", unit="batch"),
        )  # fmt: skip
    finally:
        judge.close()
    made.done(ANNOTATIONS, judge.annotator)
    logger.info("Judged: %s.", counts.text())
    rows = read_annotations(folder / ANNOTATIONS)
    summary = summarize(rows, constants=constants_of(options, [rows]), alignment=options.alignment)
    for warning in summary.warnings:
        logger.warning("%s.", warning)
    update_leaderboard(folder / LEADERBOARD, {summary.generator_2 or model_name(options.model): summary})
    return {
        "prompts": outputs, "source": Path(options.prompts).name, "judge": judge.about, "summary": summary, "rows": rows
    }  # fmt: skip


def _reference(options: argparse.Namespace, folder: Path) -> Any:
    from llmalign.evaluate import REFERENCE, Made, starting_model
    from llmalign.evaluation.annotations import read_outputs, write_json

    named = options.reference or starting_model(options.model)
    if named is None:
        raise UserError(f"{options.model} does not say what it started from: name its reference with --reference.")
    if Path(named).expanduser().is_file():
        rows, made = read_outputs(Path(named).expanduser()), Made(folder, overwrite=options.overwrite)
        if not made.is_there(REFERENCE, "file", rows):
            write_json(folder / REFERENCE, rows)
            made.done(REFERENCE, "file", rows)
        return rows
    return _outputs(options, folder, REFERENCE, named, None)


def _outputs(options: argparse.Namespace, folder: Path, name: str, model: str, base: str | None) -> Any:
    """A model's answers, made unless they are there of the same prompts, model and options."""
    from dataclasses import asdict

    from llmalign.evaluate import Made
    from llmalign.evaluation.annotations import read_outputs
    from llmalign.evaluation.generate import read_prompts
    from llmalign.inference import model_identity
    from llmalign.recipe import doctor_options

    prompts = read_prompts(doctor_options(options.prompts, [])[0])[: options.max_rows]
    sampling, made = sampling_of(options), Made(folder, overwrite=options.overwrite)
    of = (model_identity(model, base), options.dtype, asdict(sampling), [asdict(prompt) for prompt in prompts])
    if not made.is_there(name, *of):
        generate_with(model, prompts, sampling, folder / name, base=base, dtype=options.dtype)
        made.done(name, *of)
    return read_outputs(folder / name)


def _benchmarks(options: argparse.Namespace) -> Any:
    from llmalign.evaluation.benchmarks import run_benchmarks
    from llmalign.inference import load_for_inference

    tasks = [task.strip() for task in options.benchmarks.split(",") if task.strip()]
    model, tokenizer = load_for_inference(options.model, base=options.base, dtype=options.dtype)
    return run_benchmarks(model, tokenizer, tasks, limit=options.limit, batch_size=options.batch_size)


def _print(found: dict[str, Any], file: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(found["model"]), box=SIMPLE_HEAD)
    table.add_column("measured")
    table.add_column("", justify="right")
    rate = found["winrate"]
    if rate is not None:
        table.add_row(Text(f"win rate against {found['reference']}, %"), _interval(found["interval"], 1))
        if rate["length_controlled_winrate"] is not None:
            table.add_row("length-controlled", f"{rate['length_controlled_winrate']:.2f}")
        table.add_row("judged rows", str(rate["n_rows"]))
        lengths = found["lengths"]
        table.add_row("characters an answer, the reference's", f"{lengths['model']:.0f}, {lengths['reference']:.0f}")
    if found["accuracy"] is not None:
        table.add_row(f"preference accuracy, by {found['accuracy']['by']}, %", _interval(found["accuracy"], 100))
        trained = ", of the data that it was trained on" if found["accuracy"]["trained_on"] else ""
        table.add_row(f"pairs{trained}", str(found["accuracy"]["n"]))
    for task, metrics in (found["benchmarks"] or {}).items():
        for name, value in metrics.items():
            table.add_row(Text(f"{task}, {name}"), f"{value:.4g}")
    screen = console()
    screen.print(table)
    screen.print(str(file), markup=False, highlight=False, soft_wrap=True)


def _interval(estimate: Any, scale: float) -> str:
    if estimate is None:
        return "nothing judged"
    return f"{scale * estimate['mean']:.2f} [{scale * estimate['low']:.2f}, {scale * estimate['high']:.2f}]"
