"""Time and memory of one optimizer step beside TRL's trainers: `python scripts/bench.py [--case NAME] [--json FILE]`.

Ours and TRL's take turns on the same pairs and the same model with random weights, each turn in a fresh process: a
Llama (hidden 384, 6 layers, vocabulary 8,192) in float32 on one thread, 4 pairs a batch, AdamW included. Time is the
CPU time of a step from its start to the start of the next (batch, policy, reference, backward, update, metrics, log),
the first step left out; memory is the peak resident size less what the process held before it loaded the model.
The methods that sample run beside TRL's GRPOTrainer, the others beside its DPOTrainer: a rollout of 16 prompts with 4
completions of 64 tokens each, and the steps on it; `--sampled` runs these alone, `--pairs` the others. `--device cuda`
runs the same cases on a Qwen2 of half a billion parameters, in GPU time and allocated GPU memory. Not measured:
start-up, evaluation, saving, several processes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benching import report
from benching.cases import CASES, PAIR_CASES, SAMPLED_CASES, Case, Job, get_case
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SCRIPTS = Path(__file__).resolve().parent / "benching"
ROUNDS = 3
STEPS = {"cpu": 4, "cuda": 10}  # that count, of each contender in each round
WIDTH = 160  # characters of a table that goes into a file


def environment(folder: str, device: str) -> dict[str, str]:
    """What a worker is started with: one thread on a CPU, no network, caches that go away with the folder."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{folder}/datasets",
        "LLMALIGN_CACHE": f"{folder}/llmalign",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | own


def run_job(job: Job, script: str = "worker.py") -> Path:
    """Run one job in a fresh process and return where its result lies; RuntimeError with its last words if it fails."""
    source, target = Path(job.folder) / "job.json", Path(job.folder) / "result.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(asdict(job)))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), str(source), str(target)],
        env=environment(job.folder, job.device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{job.case}: {job.contender} failed:\n{done.stdout[-2000:]}")
    return target


def turns(case: Case, rounds: int) -> list[str]:
    """The contenders in the order they run in; who goes first changes from round to round."""
    order = ["fill"] if case.cached else []
    for index in range(rounds):
        order += case.contenders if index % 2 == 0 else reversed(case.contenders)
    return order


def measure(arguments: argparse.Namespace, case: Case, folder: str, progress: Progress) -> list[dict[str, Any]]:
    """Everything that a case's processes measured, in the order of their turns."""
    home = Path(folder) / str(case.shape.vocabulary)
    options = {"device": arguments.device, "dtype": arguments.dtype, "quick": arguments.quick}
    if not (home / "model").is_dir():
        run_job(Job(case.name, "none", arguments.steps, str(home), **options), "model.py")
    found = []
    (task,) = progress.task_ids
    for contender in turns(case, arguments.rounds):
        progress.update(task, description=f"{case.name}: {contender}")
        result = run_job(Job(case.name, contender, arguments.steps, str(home), **options))
        if contender != "fill":
            found.append(json.loads(result.read_text()))
        progress.advance(task)
    return found


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure the chosen cases and show the table; the files are written after each case, and nothing is lost."""
    cases = {name: get_case(name, device=arguments.device, quick=arguments.quick) for name in arguments.case}
    summaries: list[report.Summary] = []
    samples: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
            progress.add_task("", total=sum(len(turns(case, arguments.rounds)) for case in cases.values()))
            for case in cases.values():
                own = measure(arguments, case, folder, progress)
                samples += own
                summaries.append(report.summarise(case, own, quick=arguments.quick))
                write(arguments, summaries, samples)
    finally:
        if summaries:
            show(arguments, summaries, cases, samples[0]["device_name"], console)


def show(
    arguments: argparse.Namespace,
    summaries: list[report.Summary],
    cases: dict[str, Case],
    device: str,
    console: Console,
) -> None:
    """Print the table; the targets are those of the CPU in float32."""
    targets = arguments.device == "cpu" and arguments.dtype == "float32" and not arguments.quick
    title = f"One step, {arguments.dtype} on {device}, {arguments.rounds} rounds"
    if arguments.quick:
        title += "; a tiny model: the numbers mean nothing"
    console.print(report.table(summaries, cases, title, targets=targets))


def write(arguments: argparse.Namespace, summaries: list[report.Summary], samples: list[dict[str, Any]]) -> None:
    """Write the two files that were asked for, with the cases that are through."""
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    contents = {
        arguments.json: [report.entry(summary) for summary in summaries],
        arguments.details: machine | {"summaries": [asdict(summary) for summary in summaries], "samples": samples},
    }
    for path, content in contents.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="run this case (repeatable); default: all")
    parser.add_argument("--pairs", dest="kind", action="store_const", const=PAIR_CASES, help="pairs and groups alone")
    parser.add_argument("--sampled", dest="kind", action="store_const", const=SAMPLED_CASES, help="what samples alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write case, both ratios and the fraction here")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fresh processes of each contender")
    parser.add_argument("--steps", type=int, help=f"steps of a process that count, after a first; default: {STEPS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and arithmetic")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, to try the bench itself")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        arguments.steps = STEPS[arguments.device]
    if min(arguments.rounds, arguments.steps) < 1:
        parser.error("--rounds and --steps must be 1 or more")
    arguments.case = list(dict.fromkeys(arguments.case or arguments.kind or CASES))
    return arguments


def has_gpu() -> bool:
    import torch  # here alone: a worker's peak memory begins at what its parent holds

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Run the bench; returns the exit status: 1 where a process failed, 2 where there is no GPU to run on."""
    arguments = parse(argv)
    if arguments.device == "cuda" and not has_gpu():
        print("There is no GPU here: run the bench without --device cuda, or where PyTorch finds one.", file=sys.stderr)
        return 2
    try:
        console = Console()
        run(arguments, console if console.is_terminal else Console(width=WIDTH))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
