"""What all commands share: exit statuses, where they print, and whether this process is the one that does."""

import json
import os
import time
from pathlib import Path

from rich.console import Console

from llmalign.sigterm import COMMAND

USAGE_ERROR = 2
SOMETHING_WRONG = 1


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, which would otherwise be cut at 80 columns."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def left_for_launcher(sentence: str) -> bool:
    """Let torchrun know why this process ended, where there is one; whether llmalign's own launcher will say it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    shown = {"timestamp": str(int(time.time())), "py_callstack": sentence}
    left = {"message": {"message": sentence, "extraInfo": shown}}
    try:
        Path(file).write_text(json.dumps(left), encoding="utf-8")
    except OSError:  # the disk of temporary files is full: then this process says it itself
        return False
    return COMMAND in os.environ
