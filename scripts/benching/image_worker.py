"""A fresh process of the image bench: `python image_worker.py JOB.json` takes a step whenever a line tells it to.

It answers each line with the seconds of the step before (CPU and wall), and at the end with all else it measured.
"""

import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benching import image_contenders, images  # noqa: E402
from benching.contenders import Memory  # noqa: E402
from benching.image_cases import TRAINED, Job  # noqa: E402


class Turns:
    """Steps that wait until they are told to go. The last, which is timed like the others, is also looked into."""

    def __init__(self, answers: TextIO, steps: int, memory: Memory) -> None:
        self._answers, self._left, self._memory = answers, steps, memory
        self._began: tuple[float, float] | None = None
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.resident = 0.0  # megabytes at most, before the profiler has any

    def next(self) -> None:
        """Say how long it took since the last turn began, then wait; waiting costs no CPU time."""
        ended = time.process_time(), time.perf_counter()
        took = None if self._began is None else [end - begin for begin, end in zip(self._began, ended, strict=True)]
        if self._left == 0:
            self._profile.stop()
        self.say(took)
        sys.stdin.readline()
        if self._left == 1:
            self.resident = self._memory.megabytes()
            self._profile.start()
        self._left -= 1
        self._began = time.process_time(), time.perf_counter()

    def tensors(self) -> float:
        """Megabytes that the last step's tensors took at most, beyond those that were there at its start."""
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        sizes = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
        return max(sizes, default=0) / 1e6

    def say(self, message: Any) -> None:
        """One line of JSON."""
        print(json.dumps(message), file=self._answers, flush=True)


def main(arguments: list[str]) -> None:
    """Prepare what the other processes read and check that contenders do the same, or take the steps of one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = Job(**json.loads(Path(arguments[0]).read_text()))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    turns = Turns(answers, job.steps, Memory("cpu"))
    if job.contender == "prepare":
        turns.say(images.prepare(job))
        turns.say({trained: image_contenders.gaps(replace(job, trained=trained)) for trained in TRAINED})
        return
    contender = image_contenders.CONTENDERS[job.contender](job)
    steps = contender.train(turns.next)
    held = {name: count / 1e6 for name, count in contender.held().items()}
    # A step begins without gradients.
    tensors = sum(held.values()) - held["gradients"] + turns.tensors()
    turns.say(asdict(job) | {"steps": steps, "megabytes": turns.resident, "tensors": tensors, "held": held})


if __name__ == "__main__":
    main(sys.argv[1:])
