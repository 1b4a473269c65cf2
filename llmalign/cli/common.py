"""What all commands share: exit statuses, where they print, and whether this process is the one that does."""

import os

from rich.console import Console

USAGE_ERROR = 2
SOMETHING_WRONG = 1


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, which would otherwise be cut at 80 columns."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
