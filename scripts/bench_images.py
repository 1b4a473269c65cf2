"""Time and memory of a step on pairs of images beside public scripts: `python scripts/bench_images.py [--case NAME]`.

This project's trainer and a plain reading of the scripts for Diffusion-DPO on SDXL (benching/image_contenders.py) take
turns step by step, each in a process of its own, on the same pairs, draws and random weights, in float32 on one thread.
First it is checked that both have the same loss and gradient where they train the same weights. Time is the CPU time of
a step from its start to the start of the next, and the ratio the median over rounds, with an interval of 95 % by
resampling rounds. Memory is the peak resident size less what the process held before it loaded anything; `tensors` is
that of the tensors alone, without what the C library has not given back. The figures are without encoders, whose work
the trainer does once for all epochs; beside them stand those with encoders. `kept` and `recomputed` say what both do
with activations; `as shipped` is this trainer's default on a CPU beside the scripts' for SDXL, which is to recompute.
Not measured: GPUs, several processes, saving.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import WIDTH, environment
from benching.image_cases import CASES, MEMORY_TARGET, TIME_TARGET, Case, Job
from benching.report import both, target
from rich.console import Console
from rich.table import Table

WORKER = Path(__file__).resolve().parent / "benching" / "image_worker.py"
WARM_UP, LOOKED_INTO = 1, 1  # steps that do not count: the first, and the last, whose memory is followed
RESAMPLES = 2000
#: of the first batch's gradient, and of losses along a run, where rounding adds up; beta multiplies that of the errors
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1e-3, 1e-2


class Worker:
    """A process of the bench that answers lines; RuntimeError with its last words if it fails."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._log = job, Path(job.folder) / f"{name}.log"
        source = Path(job.folder) / f"{name}.json"
        source.write_text(json.dumps(asdict(job)))
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(source)],
                env=environment(job.folder, "cpu"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def answer(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._job.contender} {self._job.trained} failed:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)

    def step(self) -> Any:
        """Let it take a step, or after the last tell what it measured."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


@contextmanager
def running(job: Job, name: str) -> Iterator[Worker]:
    """A worker, stopped where it is left early."""
    worker = Worker(job, name)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


@dataclass(frozen=True)
class Summary:
    """A case's outcome: ratios are the scripts' time over ours, and our memory over theirs.

    `low`, `high`: of the time ratio. `first_epoch`, `later_epochs`: time ratios with encoders; `encoded_memory_ratio`:
    with them. Seconds, megabytes and tensors' megabytes: ours, the script's, the script's with encoders. `held`:
    megabytes of weights and their states.
    """

    case: str
    pairs: int
    time_ratio: float
    low: float
    high: float
    wall_ratio: float
    memory_ratio: float
    tensors_ratio: float
    first_epoch: float
    later_epochs: float
    encoded_memory_ratio: float
    seconds: tuple[float, ...]
    megabytes: tuple[float, ...]
    tensors: tuple[float, ...]
    held: dict[str, dict[str, float]]


def interval(values: list[float]) -> tuple[float, float]:
    """Of 95 %, for their median, by resampling."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000 - 1]


def take_turns(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """What each process measured, with the (CPU, wall) seconds of its counted steps; who goes first changes."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(running(job, name)) for name, job in jobs.items()}
        for worker in workers.values():
            worker.answer()  # it is ready
        seconds: dict[str, list[list[float]]] = {name: [] for name in jobs}
        for number in range(jobs["ours"].steps):
            for name in list(jobs)[:: 1 if number % 2 else -1]:
                seconds[name].append(workers[name].step())
        return {
            name: worker.step() | {"seconds": seconds[name][WARM_UP:-LOOKED_INTO]} for name, worker in workers.items()
        }


def check_alike(case: Case, measured: dict[str, dict[str, Any]]) -> None:
    """Raise RuntimeError where losses or gradients' norms lie apart that should not."""
    expected = measured["script"]["steps"]
    for name in ("ours", "with encoders") if case.equal_work else ("with encoders",):
        found = measured[name]["steps"]
        pairs = [pair for steps in zip(found, expected, strict=True) for pair in zip(*steps, strict=True)]
        if not all(math.isclose(one, two, rel_tol=LOSS_TOLERANCE) for one, two in pairs):
            raise RuntimeError(f"{case.name}: {name} does not train like the script: {found} and {expected}")


def summarise(case: Case, pairs: int, encode_seconds: float, measured: dict[str, dict[str, Any]]) -> Summary:
    """Reduce what the processes of a case measured; `encode_seconds` are ours for the pairs of a step."""
    check_alike(case, measured)
    cpu = {name: [step[0] for step in one["seconds"]] for name, one in measured.items()}
    wall = {name: [step[1] for step in one["seconds"]] for name, one in measured.items()}

    def ratio(times: dict[str, list[float]], name: str, once: float = 0.0) -> list[float]:
        return [theirs / (own + once) for theirs, own in zip(times[name], times["ours"], strict=True)]

    single = ratio(cpu, "script")
    low, high = interval(single)
    megabytes, tensors = (tuple(one[kind] for one in measured.values()) for kind in ("megabytes", "tensors"))
    return Summary(
        case=case.name,
        pairs=pairs,
        time_ratio=statistics.median(single),
        low=low,
        high=high,
        wall_ratio=statistics.median(ratio(wall, "script")),
        memory_ratio=megabytes[0] / megabytes[1],
        tensors_ratio=tensors[0] / tensors[1],
        first_epoch=statistics.median(ratio(cpu, "with encoders", encode_seconds)),
        later_epochs=statistics.median(ratio(cpu, "with encoders")),
        encoded_memory_ratio=megabytes[0] / megabytes[2],
        seconds=tuple(statistics.median(times) for times in cpu.values()),
        megabytes=megabytes,
        tensors=tensors,
        held={name: one["held"] for name, one in measured.items()},
    )


def table(summaries: list[Summary], title: str, *, targets: bool) -> Table:
    """What the terminal shows; `targets` says whether those of the figures without encoders apply."""
    result = Table(title=title, caption="time: the script's over ours; memory: ours over the script's")
    columns = ["ours / script", "time", "95 %", "target", "wall", "memory", "target", "tensors", "seconds", "MB"]
    columns += ["with encoders", "later epochs", "memory"]
    kept = [index for index, name in enumerate(columns) if targets or name != "target"]
    for index in kept:
        result.add_column(columns[index], justify="right" if index else "left")
    for one in summaries:
        cells = [
            one.case,
            f"{one.time_ratio:.2f}",
            f"{one.low:.2f}-{one.high:.2f}",
            target(one.time_ratio >= TIME_TARGET, f">= {TIME_TARGET}"),
            f"{one.wall_ratio:.2f}",
            f"{one.memory_ratio:.2f}",
            target(one.memory_ratio <= MEMORY_TARGET, f"<= {MEMORY_TARGET}"),
            f"{one.tensors_ratio:.2f}",
            both(*one.seconds[:2], 2),
            both(*one.megabytes[:2], 0),
            f"{one.first_epoch:.2f}",
            f"{one.later_epochs:.2f}",
            f"{one.encoded_memory_ratio:.2f}",
        ]
        result.add_row(*(cells[index] for index in kept))
    return result


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Check, measure the chosen cases and show the table; the file is written after each case."""
    with tempfile.TemporaryDirectory() as folder:
        rest = (WARM_UP + arguments.rounds + LOOKED_INTO, arguments.pairs, folder, arguments.quick)
        with running(Job("prepare", "full", False, True, *rest), "prepare") as worker:
            prepared, gaps = worker.answer(), worker.answer()
        console.print({name: round(value, 3) for name, value in prepared.items()})
        console.print(f"Distances of loss and gradient on one batch: {gaps}")
        for trained, (_, gradient) in gaps.items():
            if not gradient <= GRADIENT_TOLERANCE:
                raise RuntimeError(f"{trained}: ours and the script do not have the same gradient on one batch")
        summaries: list[Summary] = []
        for case in map(CASES.__getitem__, arguments.case):
            measured = take_turns(case.jobs(*rest[:3], quick=arguments.quick))
            summaries.append(summarise(case, arguments.pairs, prepared["encode_seconds"], measured))
            if arguments.json is not None:
                content = {"prepared": prepared, "gaps": gaps, "cases": [asdict(summary) for summary in summaries]}
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(content, indent=1) + "\n")
            console.print(f"{case.name}: {summaries[-1].time_ratio:.2f}, {summaries[-1].memory_ratio:.2f}")
    title = f"One step, float32 on CPU, one thread, pairs a step: {arguments.pairs}, {arguments.rounds} rounds"
    title += "; tiny networks: the numbers mean nothing" if arguments.quick else ""
    console.print(table(summaries, title, targets=not arguments.quick))


def main(argv: list[str] | None = None) -> int:
    """Run the bench; returns the exit status: 1 where a process failed or does other work than it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="run this case (repeatable); default: all")
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender that count, after a first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try the bench itself")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.pairs) < 1:
        parser.error("--rounds and --pairs must be 1 or more")
    arguments.case = list(dict.fromkeys(arguments.case or CASES))
    console = Console()
    try:
        run(arguments, console if console.is_terminal else Console(width=WIDTH))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
