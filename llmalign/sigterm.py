"""SIGTERM, the word of a machine that is about to be taken away: what is learnt is saved, and the command ends well."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: in the environment of launched processes: the command that the user gave, which they have a part of
COMMAND = "LLMALIGN_COMMAND"
#: seconds in which a signal is the same word again, from the process group and from a launcher that hands it on
ONE_WORD = 2.0


class Preempted(SystemExit):
    """SIGTERM ended a run; `checkpoint` is what it can go on from, None where nothing was there to save.

    It ends a program with status 0 unless it is caught, and passes by whatever catches errors to go on with other work.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__(0)
        self.checkpoint = checkpoint


class Watch:
    """Whether SIGTERM came. Outside training it ends the work at once, unless other processes share it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.came = False
        self.at = 0.0
        #: whether steps are being taken, of which the last one can be saved
        self.training = False

    def __call__(self, number: int, frame: Any) -> None:
        """Note the signal; the second one, and that of a child that was forked with this handler, has its default."""
        if os.getpid() == self.process and self.came and time.monotonic() - self.at < ONE_WORD:
            return
        if os.getpid() != self.process or self.came:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.came, self.at = True, time.monotonic()
        if not self.training and "RANK" not in os.environ:
            raise Preempted(None)
        saved = "a checkpoint is saved at the end of the step, behind the evaluation if one is going on"
        meant = saved if self.training else "the run ends, on all processes together, where training would begin"
        logger.warning("SIGTERM: %s; a second SIGTERM ends it at once.", meant)


_watch: Watch | None = None


@contextlib.contextmanager
def saving_on_sigterm() -> Iterator[None]:
    """Let SIGTERM save the run that is being trained in this block and raise Preempted out of it.

    The commands `train`, `sweep` and `iterate` do so. A program that calls `trainer.train()` itself keeps its own
    handling of the signal unless it enters this. The checkpoint is written at the end of the optimizer step, on all
    processes together also where one alone got the signal: there one step later, because nobody waits for the others'
    answer. Before the first step, and outside training, nothing is saved; several processes then end where training
    would begin. A second SIGTERM, two seconds later or more, ends the process at once. The handler that was there
    comes back at the end. Outside the main thread, where no signal can be handled, the block changes nothing. Not
    covered: a signal to the helpers that read data (`dataloader_num_workers`), and one that comes when several
    processes have trained already: they end as if it had not come.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    _watch = Watch()
    before = signal.signal(signal.SIGTERM, _watch)
    try:
        yield
    finally:
        _watch = None
        signal.signal(signal.SIGTERM, before)


def watch() -> Watch | None:
    """What looks out for SIGTERM in the block around, if there is one."""
    return _watch
