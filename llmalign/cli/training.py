"""`llmalign train`, `sweep` and `cache`."""

import argparse
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console, is_main_process
from llmalign.errors import UserError
from llmalign.sigterm import saving_on_sigterm

TRAIN_HELP = """\
RECIPE is a YAML file, or one that is shipped, such as trainers/rpo/recipe.yaml. It names `method` (rpo, rdpo, inpo,
copg, pair, dpo, sft, reward, preference; sampling as they go: copg_online, fdpg, pf_ppo, mdpo; of images:
diffusion_dpo, seppo, pso_offline; drawing as they go: d3po, pso), `model_name_or_path` (a folder, a Hub name or
embedded:tiny), `dataset_name` (a file, a folder, a Hub name or sample:pairs), and any field of the method's config.
Every key can be given as --key value.
A method's own keys are in trainers/<method>/README.md; the others are TRL's ModelConfig and transformers'
TrainingArguments. Data keys: columns, where, max_rows, streaming, eval_datasets, dataset_test_split, overlong and the
doctor's limits (max_truncated, max_identical, ...).

  llmalign train trainers/rpo/smoke.yaml
  llmalign train trainers/rpo/lora.yaml --model_name_or_path ./my-model --dataset_name pairs.jsonl
  llmalign train trainers/rpo/lora.yaml --resume auto
  llmalign train trainers/rpo/recipe.yaml --accelerate zero3 --num_processes 8
  llmalign train trainers/diffusion_dpo/lora.yaml --model_name_or_path ./pipeline --dataset_name pairs.parquet
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
#: options of `accelerate launch` that are passed on
LAUNCHER_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parsers to the command line's grammar; `layout` holds what all parsers share."""
    train = commands.add_parser("train", help="train as a recipe says", description=TRAIN_HELP, **layout)
    train.add_argument("recipe", metavar="RECIPE")
    train.add_argument("--resume", metavar="PATH|auto", help="go on from a checkpoint, or from the newest whole one")
    launcher = train.add_argument_group(
        "on several devices", "NAME is single, ddp, zero1, zero2, zero2_offload, zero3, fsdp2 or multi_node"
    )
    launcher.add_argument("--accelerate", metavar="NAME|FILE", help="as under accelerate launch --config_file")
    launcher.add_argument("--num_processes", type=int, metavar="N", help="of all machines together, one per device")
    launcher.add_argument("--num_machines", type=int, metavar="N")
    launcher.add_argument("--machine_rank", type=int, metavar="N", help="this machine's number; the first one's is 0")
    launcher.add_argument("--main_process_ip", metavar="ADDRESS", help="the first machine")
    launcher.add_argument("--main_process_port", type=int, metavar="PORT", help="a free port of the first machine")
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


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    launcher = {name: getattr(options, name) for name in LAUNCHER_OPTIONS}
    if options.accelerate is not None:
        from llmalign.launch import launch

        resume = [] if options.resume is None else ["--resume", options.resume]
        return launch(options.accelerate, ["train", options.recipe, *resume, *rest], **launcher)
    for name, value in launcher.items():
        if value is not None:
            raise UserError(f"--{name} is of a launcher: name one with --accelerate, such as --accelerate ddp")
    with saving_on_sigterm():
        # Imported here, so that --help and a mistyped command answer at once.
        from llmalign.recipe import load_recipe
        from llmalign.train import run, summary

        result = run(load_recipe(options.recipe, rest), resume=options.resume)
    if is_main_process():
        screen = console()
        screen.print(summary(result))
        if "next" in result:
            screen.print(f"Next:\n  {result['next']}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    with saving_on_sigterm():
        from llmalign.sweep import FAILED, sweep, table

        entries = sweep(options.recipe, options.grid, rest)
    if is_main_process():
        console().print(table(entries))
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
    if is_main_process():
        console().print(str(filled), highlight=False, soft_wrap=True)
    return 0
