"""A fresh process of the bench: `python worker.py JOB.json RESULT.json` measures one contender on one case."""

import json
import logging
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benching import cases, contenders, limit, sampled  # noqa: E402

REPETITIONS = 8  # of every matrix product; the best counts


def mm_rate(job: cases.Job) -> float:
    """Floating-point operations a second that `torch.mm` reaches at the model's shapes; the best of several."""
    case = job.get_case()
    shape, dtype = case.shape, getattr(torch, job.dtype)
    (batch,) = cases.batches(case, 1, quick=job.quick)
    tokens = sum(map(limit.fed_tokens, batch))
    best = 0.0
    for inputs, outputs in {*limit.matrices(shape), (shape.hidden, shape.vocabulary)}:
        left = torch.randn(tokens, inputs, dtype=dtype, device=job.device)
        right = torch.randn(inputs, outputs, dtype=dtype, device=job.device)
        clock = contenders.Clock(job.device)
        for _ in range(REPETITIONS + contenders.WARM_UP):
            clock.mark()
            torch.mm(left, right)
        clock.mark()
        fastest = min(clock.seconds())
        if fastest > 0:  # a clock that did not move says nothing
            best = max(best, 2 * tokens * inputs * outputs / fastest)
    return best


def measure(job: cases.Job) -> dict:
    """Run the job; returns its numbers as JSON can hold them."""
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    case = job.get_case()
    run = sampled.sample if case.method else contenders.forward_backward if case.forward_backward else contenders.train
    outcome = run(job, tokenizer)
    return {
        **asdict(job),
        **asdict(outcome),
        "mm_rate": mm_rate(job),
        "wall_seconds": time.perf_counter() - started,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, trl)},
        "device_name": torch.cuda.get_device_name() if job.device == "cuda" else "CPU, one thread",
    }


def main(arguments: list[str]) -> None:
    """Do the job that the first file describes; its numbers go into the second."""
    source, target = map(Path, arguments)
    job = cases.Job(**json.loads(source.read_text()))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if job.device == "cpu":
        torch.set_num_threads(1)
    target.write_text(json.dumps(measure(job)))


if __name__ == "__main__":
    main(sys.argv[1:])
