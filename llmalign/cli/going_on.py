"""What a command says that SIGTERM ended, and how to go on from there."""

import os
import shlex
from collections.abc import Sequence

from llmalign.secrets import redacted
from llmalign.sigterm import COMMAND, Preempted

SECRETS = ("--hub_token", "--hub-token")


def farewell(stop: Preempted, arguments: Sequence[str]) -> str:
    """Two lines: what is saved, and the user's own command with what it takes to go on; secrets are left out of it."""
    saved = stop.checkpoint is not None
    said = f"{stop.checkpoint} is saved" if saved else "nothing new was there to save"
    return f"llmalign: ended by SIGTERM; {said}. Go on with:\n  {command_again(arguments, saved)}"


def command_again(arguments: Sequence[str], saved: bool) -> str:
    """The command line that goes on where these arguments stopped, under the same launcher."""
    launched = os.environ.get(COMMAND)
    words = shlex.split(launched) if launched else ["llmalign", *arguments]
    words = _without(words, SECRETS)
    if words[1] == "train" and (saved or not any(word.split("=")[0] == "--resume" for word in words)):
        words = [*_without(words, ("--resume",)), "--resume", "auto"]
    return redacted(shlex.join(words))


def _without(words: list[str], names: Sequence[str]) -> list[str]:
    """The words without these options and their values."""
    kept: list[str] = []
    for place, word in enumerate(words):
        if word.split("=")[0] not in names and (place == 0 or words[place - 1] not in names):
            kept.append(word)
    return kept
