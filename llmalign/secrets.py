"""What a secret looks like, and how it is taken out of what is read, said or written."""

import logging
import os
import re
from typing import Any

HIDDEN = "(not shown)"
SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|secret_?key|passw(or)?d|passphrase|api_?key|credentials?|access_?key|private_?key|auth"
    r"|authorization)s?$|(access|auth|api|bearer|hub|refresh)token$",
    re.IGNORECASE,
)
NO_SECRET = re.compile(r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|video|audio|stop|eot|special)_tokens?$")
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bBearer\s+[\w.~+/-]{12,}=*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
    re.IGNORECASE,
)

_VARIABLES = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|PASSWORD|SECRET_ACCESS_KEY)$")
_SHORTEST = 8  # of a variable's value: shorter ones are words that occur anywhere


def redacted(text: str) -> str:
    """A text without what looks like a secret, and without the tokens that this process knows of."""
    from huggingface_hub import get_token  # slow to import, and `--help` has no need of it

    text = SECRET_TEXT.sub(HIDDEN, text)
    known = {value for name, value in os.environ.items() if _VARIABLES.search(name)} | {get_token() or ""}
    for secret in sorted((value for value in known if len(value) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


class Redacting(logging.Filter):
    """Takes secrets out of every message that a handler writes; tracebacks are not covered."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        clean = redacted(said)
        if clean != said:
            record.msg, record.args = clean, None
        return True


def hidden(value: Any, key: str = "", *, inside: bool = False) -> Any:
    """A copy of plain data without secrets: texts under a key that names one, and what looks like one anywhere.

    Not covered: a secret in an answer of a model, and one that neither its key nor its look gives away.
    """
    inside = inside or bool(SECRET_KEY.search(key) and not NO_SECRET.search(key))
    if isinstance(value, dict):
        return {
            SECRET_TEXT.sub(HIDDEN, name) if isinstance(name, str) else name: hidden(own, str(name), inside=inside)
            for name, own in value.items()
        }
    if isinstance(value, list):
        return [hidden(own, inside=inside) for own in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if inside and value else SECRET_TEXT.sub(HIDDEN, value)
