"""`llmalign generate`."""

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.cli.judging import filled, given, key_variable
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

# Options of one of the two kinds of model alone, None where they are not given.
LOADED = ("base", "dtype", "raw", "batch_size")
ASKED = ("api_key_env", "concurrency", "timeout", "patience", "cache")

GENERATE_HELP = """\
MODEL is a run's folder, a checkpoint, an adapter (put on its base, or on --base), a model's folder, a Hub name or
embedded:tiny; with --url it is a model's name at an OpenAI-compatible endpoint. Prompts are a .txt file, one a line,
or rows with a column `instruction` or `prompt`, texts or conversations, read as for doctor (--split, --columns,
--where, --max_rows). Writes AlpacaEval's model_outputs.json: instruction, output, generator, and dataset where the
rows have it. The chat template is used where the tokenizer has one; a model trained on plain texts wants --raw.
Stopped anywhere, the same command goes on and ends with the same answers. A prompt that an endpoint has no answer to is
counted, has an `error`, and is asked again by the same command; exits with 1 while there are such.

  llmalign generate runs/rpo --prompts prompts.jsonl --out outputs.json --batch_size 32
  llmalign generate runs/rpo --prompts pairs.parquet --out outputs.json --where '{split: test}' --max_rows 200
  llmalign generate gpt-4o --url https://api.openai.com/v1 --prompts prompts.jsonl --out reference.json
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("generate", help="a model's answers to prompts", description=GENERATE_HELP, **layout)
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--prompts", required=True, metavar="FILE")
    command.add_argument("--out", required=True, metavar="FILE", help="model_outputs.json")
    command.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    command.add_argument("--name", metavar="GENERATOR", help="the outputs' generator (the model's name)")
    add_sampling_arguments(command)
    asked = command.add_argument_group("how an endpoint is asked")
    asked.add_argument("--url", metavar="URL", help="of the endpoint; it usually ends in /v1")
    asked.add_argument("--api_key_env", metavar="NAME", help="variable that holds its key (OPENAI_API_KEY; none: '')")
    asked.add_argument("--concurrency", type=int, metavar="N", help="requests at once (8)")
    asked.add_argument("--timeout", type=float, metavar="S", help="seconds for an answer (60 + max_new_tokens / 10)")
    asked.add_argument("--patience", type=float, metavar="S", help="seconds of silence to sit out (300)")
    asked.add_argument("--cache", metavar="FILE", help="its answers (answers.sqlite beside --out)")
    command.set_defaults(run=_generate, batch_size=None)  # so that one that is given is known


def add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    """The options that say how answers are drawn."""
    drawn = command.add_argument_group("how answers are drawn")
    drawn.add_argument("--max_new_tokens", type=int, default=2048, metavar="N", help="of an answer (2048)")
    drawn.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    drawn.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus (1)")
    drawn.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    drawn.add_argument("--batch_size", type=int, default=16, metavar="B", help="prompts at a time (16)")
    drawn.add_argument("--system", metavar="TEXT", help="a system message")
    drawn.add_argument("--raw", action="store_true", help="prompts as they are, without the chat template")
    drawn.add_argument("--base", metavar="MODEL", help="what an adapter is put on")
    drawn.add_argument("--dtype", metavar="TYPE", help="of the weights (bfloat16 on a GPU that has it, else float32)")


def sampling_of(options: argparse.Namespace) -> Any:
    """How answers are drawn, checked."""
    from llmalign.evaluation.generate import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size", "system", "raw")
    named = {name: vars(options)[name] for name in names}
    return Sampling(**{name: value for name, value in named.items() if value is not None})


def _generate(options: argparse.Namespace, rest: list[str]) -> int:
    out, sampling = Path(options.out), sampling_of(options)
    foreign = given(options, LOADED if options.url else ASKED)
    if foreign and options.url:
        raise UserError(f"A model that is loaded here takes {foreign}, an endpoint does not: leave it out, or --url.")
    if foreign:
        raise UserError(f"A model at an endpoint takes {foreign}, one that is loaded here does not: give --url.")
    _check_room(out, options.overwrite)
    prompts = _prompts(options.prompts, rest)
    if options.url:
        return _remotely(options, prompts, sampling, out)
    rows = generate_with(
        options.model, prompts, sampling, out, base=options.base, dtype=options.dtype, name=options.name
    )
    console().print(f"{len(rows)} answers: {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _prompts(data: str, rest: list[str]) -> Any:
    from llmalign.data.specs import DataSource
    from llmalign.evaluation.prompts import read_prompts
    from llmalign.recipe import doctor_options, nearest, parse_overrides

    known = sorted({field.name for field in fields(DataSource)} - {"path", "weight"})
    for key in parse_overrides(rest):
        if key not in known:
            raise UserError(
                f"generate has no option --{key}; of those that choose rows the nearest is --{nearest(key, known)}."
            )
    return read_prompts(doctor_options(data, rest)[0])


def _check_room(out: Path, overwrite: bool) -> None:
    """Rows without an answer may be asked for again; finished outputs are not written over unasked."""
    if not out.exists() or overwrite:
        return
    from llmalign.evaluation.annotations import read_outputs
    from llmalign.evaluation.generate import ERROR

    if not (out.is_file() and any(ERROR in row for row in read_outputs(out))):
        raise UserError(f"--out {out} is there already: give --overwrite to replace it, or another --out.")


def generate_with(
    model: str, prompts: Any, sampling: Any, out: Path, *, base: str | None, dtype: str | None, name: str | None = None
) -> list[dict[str, Any]]:
    """Load a model and let it answer; its rows, which `out` holds."""
    from llmalign.evaluation.generate import generate_locally
    from llmalign.inference import load_for_inference, model_identity, model_name

    loaded, tokenizer = load_for_inference(model, base=base, dtype=dtype)
    identity = f"{model_identity(model, base)} in {loaded.dtype}"
    return generate_locally(
        loaded, tokenizer, prompts, sampling, generator=name or model_name(model), identity=identity, out=out
    )


def _remotely(options: argparse.Namespace, prompts: Any, sampling: Any, out: Path) -> int:
    from llmalign.evaluation.generate import generate_remotely
    from llmalign.judges import JudgeClient

    asked = filled(options, {
        "cache": out.parent / "answers.sqlite", "concurrency": 8, "patience": 300.0,
        "timeout": 60 + sampling.max_new_tokens / 10,
    })  # fmt: skip
    with JudgeClient(
        options.model, options.url, api_key_env=key_variable(options), **asked, who="model",
        extra_body=None if options.top_p == 1 else {"top_p": options.top_p},
    ) as client:  # fmt: skip
        rows, failed = generate_remotely(client, prompts, sampling, generator=options.name or options.model, out=out)
    console().print(f"{len(rows)} answers, {failed} failed: {out}", markup=False, highlight=False, soft_wrap=True)
    return SOMETHING_WRONG if failed else 0
