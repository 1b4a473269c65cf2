"""Run the claims: `python scripts/claims/run.py [names...] [--smoke] [--out runs/claims]`.

Cells that are already kept under the out folder are not run again. A name picks every claim that starts with it.
"""

import argparse
import contextlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Run as a file, Python puts scripts/claims on the path; the package `claims` lies one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from claims import (  # noqa: E402
    bandit,
    copg_online,
    fdpg_exact,
    fdpg_stories,
    image_d3po,
    image_dpo,
    image_rdpo,
    image_seppo,
    image_tiles,
    inpo_classes,
    inpo_exact,
    inpo_model,
    inpo_stories,
    mdpo,
    programs,
    rdpo,
    rpo,
    start,
)
from claims.cells import Cell, Result, Store, code_version  # noqa: E402
from claims.report import Claim, Outcome, write  # noqa: E402

MODULES = (
    *(bandit, rdpo, rpo, inpo_exact, inpo_classes, inpo_model, inpo_stories),
    *(copg_online, mdpo, fdpg_exact, fdpg_stories, programs),
    *(image_dpo, image_rdpo, image_d3po, image_seppo, image_tiles),
)
CLAIMS = {module.CLAIM.name: module.CLAIM for module in MODULES}


def choose(names: list[str]) -> list[Claim]:
    """The claims whose name starts with one of `names`, all where none is given; ValueError where one names nothing."""
    for name in names:
        if not any(known.startswith(name) for known in CLAIMS):
            raise ValueError(f"No claim is called {name!r}; there are {', '.join(CLAIMS)}.")
    return [claim for known, claim in CLAIMS.items() if not names or known.startswith(tuple(names))]


def ready() -> None:
    """What every process that computes cells begins with: one thread each."""
    torch.set_num_threads(1)
    start.quiet()


def compute(name: str, cell: Cell, out: Path) -> Result:
    """The record of one of a claim's cells."""
    claim, store = CLAIMS[name], Store(out)
    return store.run(cell, code_version(claim.sources), lambda c: claim.experiment(c, store))


def run_claim(claim: Claim, out: Path, smoke: bool, console: Console, jobs: int) -> Outcome:
    """Run the claim's cells that are not kept yet, write its page and hand back its verdict."""
    cells = claim.cells(smoke)
    records: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task(claim.name, total=len(cells))
        over: Any = map
        if jobs > 1:
            over = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"), initializer=ready)).map
        for record in over(compute, repeat(claim.name), cells, repeat(out)):
            records.append(record)
            progress.advance(task)
    outcome = claim.judge(records)
    write(claim, outcome, records, out)
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Re-run the papers' claims small; kept cells are not run twice.")
    parser.add_argument("names", nargs="*", help=f"claims to run (default: all): {', '.join(CLAIMS)}")
    parser.add_argument("--smoke", action="store_true", help="a few short cells of each claim; verdicts mean nothing")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compute cells, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="where cells and pages are kept")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        chosen = choose(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    ready()
    out = arguments.out / "smoke" if arguments.smoke else arguments.out
    for claim in chosen:
        if claim.needs is not None and claim.needs not in os.environ and not arguments.smoke:
            console.print(f"[bold]{claim.name}: skipped.[/bold] It needs {claim.needs}; see scripts/claims/README.md")
            continue
        outcome = run_claim(claim, out, arguments.smoke, console, 1 if arguments.smoke else arguments.jobs)
        verdict = "smoke run, no verdict" if arguments.smoke else "holds" if outcome.holds else "does not hold"
        console.print(f"[bold]{claim.name}: {verdict}.[/bold] {outcome.verdict}\n  {out / claim.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
