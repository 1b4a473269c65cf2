"""`llmalign push` and `llmalign pull`."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

PUSH_HELP = """\
RUN is a run's folder, a checkpoint or any folder with a model, an adapter, an image pipeline or its LoRA weights. What
goes to the Hub: weights (safetensors alone) and tokenizer, a card with method, equation, data, values, measurements and
versions, curves, the recipe without secrets and paths, and a manifest with hashes. Private unless --public. What is
there already is not sent again; a push that was cut off goes on. The token is that of `hf auth login`, or HF_TOKEN.

  llmalign push runs/rpo --repo me/my-model --dry-run
  llmalign push runs/rpo-lora --repo me/my-adapter --license apache-2.0 --base Qwen/Qwen2.5-0.5B-Instruct
"""
PULL_HELP = """\
Downloads a model that `llmalign push` sent and checks every file against its manifest.

  llmalign pull me/my-model --out my-model
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parsers to the command line's grammar; `layout` holds what all parsers share."""
    push = commands.add_parser("push", help="send a run to the Hub", description=PUSH_HELP, **layout)
    push.add_argument("run_folder", metavar="RUN")
    push.add_argument("--repo", required=True, metavar="USER/NAME")
    push.add_argument("--public", action="store_true", help="for everybody to see (private)")
    push.add_argument("--license", metavar="ID", help="such as apache-2.0; the base's licence binds its adapters, too")
    push.add_argument("--base", metavar="HUB_NAME", help="the base's name on the Hub, where it is a folder here")
    push.add_argument("--revision", metavar="BRANCH", help="of the repository, made where it is not there (main)")
    push.add_argument("--message", default="", metavar="TEXT", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="write what would go into --out, send nothing")
    push.add_argument("--out", metavar="DIR", help="of --dry-run (RUN/hub)")
    push.set_defaults(run=_push)

    pull = commands.add_parser("pull", help="fetch a model from the Hub", description=PULL_HELP, **layout)
    pull.add_argument("repo", metavar="USER/NAME")
    pull.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit")
    pull.add_argument("--out", metavar="DIR", help="where to (NAME)")
    pull.add_argument("--overwrite", action="store_true", help="write into --out whatever it holds")
    pull.set_defaults(run=_pull)


def _push(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"push does not know {' '.join(rest)}.")
    if options.out and not options.dry_run:
        raise UserError("--out is where --dry-run writes: give both, or neither.")
    if "/" not in options.repo:
        raise UserError(f"--repo is USER/NAME, not {options.repo!r}.")
    from llmalign.hub.card import write_card
    from llmalign.hub.publish import push
    from llmalign.hub.staging import stage

    run = Path(options.run_folder).expanduser()
    card = write_card(run, options.repo, license=options.license, base=options.base)
    if options.dry_run:
        out = Path(options.out).expanduser() if options.out else run / "hub"
        _show(stage(run, out, card, base=options.base), options)
        return 0
    # Beside the run, where weights can be linked instead of copied, unless nothing may be written there.
    with tempfile.TemporaryDirectory(dir=run if os.access(run, os.W_OK) else None, prefix=".hub-") as scratch:
        staged = stage(run, Path(scratch) / "files", card, base=options.base, link=True)
        done = push(staged, options.repo, public=options.public, revision=options.revision, message=options.message)
    where = f"{done.url} ({'private' if done.private else 'public'})"
    if not done.uploaded and not done.deleted:
        console().print(f"{where} has all of it already.", markup=False, highlight=False, soft_wrap=True)
        return 0
    gone = f", {len(done.deleted)} deleted" if done.deleted else ""
    text = f"{len(done.uploaded)} of {len(staged.files)} files uploaded{gone}: {where}"
    console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _show(staged: Any, options: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"{options.repo}, {'public' if options.public else 'private'}: not sent", box=SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, entry in staged.files.items():
        table.add_row(name, f"{entry['size']:,}")
    table.add_row("together", f"{staged.size:,}")
    screen = console()
    screen.print(table)
    screen.print(f"{staged.folder}; the card is README.md there", markup=False, highlight=False, soft_wrap=True)
    if not options.license:
        screen.print("No licence is stated: --license names one.", markup=False, highlight=False)


def _pull(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"pull does not know {' '.join(rest)}.")
    from llmalign.hub.publish import pull

    out = Path(options.out or options.repo.split("/")[-1]).expanduser()
    checked = pull(options.repo, out, revision=options.revision, overwrite=options.overwrite)
    said = "not checked" if checked is None else f"{checked} files, as they were pushed"
    console().print(f"{out}: {said}", markup=False, highlight=False, soft_wrap=True)
    return 0
