"""One HTTP request to a judge, and what its outcome means for the rows that wait.

Nothing is decided by exceptions here: what `post` returns says whether the answer came, whether to ask again, whether
this row is lost, or whether the judge must be left alone. No outcome holds the API key.
"""

import ipaddress
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from llmalign.errors import UserError
from llmalign.judges.chat import Completion, MalformedAnswer, error_message, read_completion

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429})
_ROW_ALONE = frozenset({400, 413, 422})
_MESSAGE_LENGTH = 300
_NO_KEY = "none"


class JudgeStopped(UserError):
    """The judge cannot be asked any more: it refuses the key or the model, or it has been silent for too long."""


@dataclass(frozen=True)
class Again:
    """Worth another try: `after` seconds where the judge said so; `sent` is False where nothing left this machine.

    `malformed`: an answer came that cannot be read, which few more tries will change.
    """

    reason: str
    after: float | None = None
    sent: bool = True
    malformed: bool = False


@dataclass(frozen=True)
class Refused:
    """This request will not be answered, others may be."""

    reason: str


@dataclass(frozen=True)
class Halt:
    """No request will be answered; `reason` is a sentence for the user."""

    reason: str


Outcome = Completion | Again | Refused | Halt


class Endpoint:
    """An OpenAI-compatible `base_url` (it usually ends in /v1) and the key that `api_key_env` holds.

    `api_key_env` None sends no key; servers on the loopback need none. The key is read, and the `openai` package
    imported, when the first request is sent. Raises UserError for a URL that is none or that holds a password.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key_env: str | None, timeout: float, who: str = "judge"
    ) -> None:
        self.url = _checked_url(base_url)
        self._who = who
        self._model, self._api_key_env, self._timeout = model, api_key_env, timeout
        self._client: Any = None
        self._key: str | None = None

    def connect(self) -> None:
        """Get ready to send; nothing is sent. Raises UserError where the package or the key is missing."""
        if self._client is not None:
            return
        openai = _openai()
        self._key = self._read_key()
        options: dict[str, Any] = {}
        if _is_loopback(self.url):
            # A proxy for the outside, set in the environment, would be asked for this machine too.
            options["http_client"] = openai.DefaultHttpxClient(trust_env=False)
        self._client = openai.OpenAI(
            base_url=self.url, api_key=self._key or _NO_KEY, timeout=self._timeout, max_retries=0, **options
        )

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def post(self, body: Mapping[str, Any]) -> Outcome:
        """Send one request, once."""
        openai = _openai()
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Refused("the request holds half a surrogate pair, which is no text")
        try:
            data = self._client.post("/chat/completions", body=dict(body), cast_to=object)
            # A server that does not call its answer JSON gives text.
            return read_completion(json.loads(data) if isinstance(data, str) else data)
        except openai.APIStatusError as error:
            return self._of_status(error.status_code, error.body, error.response.headers)
        except openai.APITimeoutError as error:
            return Again(f"no answer within {self._timeout:g} s", sent=_was_sent(error))
        except openai.APIConnectionError as error:
            return Again(f"connection failed: {self._clean(str(error.__cause__ or error))}", sent=_was_sent(error))
        except MalformedAnswer as error:
            return Again(f"the {self._who} answered with {self._clean(str(error))}", malformed=True)
        except ValueError:  # what is no JSON, and bytes that are no text
            return Again(f"the {self._who} answered with what is no JSON", malformed=True)

    def _of_status(self, status: int, body: Any, headers: Mapping[str, str]) -> Outcome:
        said = f"HTTP {status}: {self._clean(error_message(body))}" if body else f"HTTP {status}"
        no_money = status == 402 or (status == 429 and "insufficient_quota" in json.dumps(body))
        if no_money:
            return Halt(f"the {self._who} at {self.url} wants to be paid first ({said})")
        if status in _AGAIN or status >= 500:
            return Again(said, after=_retry_after(headers))
        if status in _ROW_ALONE:
            return Refused(said)
        if status in (401, 403):
            # What the server says here may quote the key in part.
            return Halt(f"the {self._who} at {self.url} refuses {self._key_in_words()} (HTTP {status})")
        if status == 404:
            return Halt(
                f"the {self._who} at {self.url} does not know the model {self._model!r}, or base_url is wrong: it "
                f"usually ends in /v1 ({said})"
            )
        return Halt(f"the {self._who} at {self.url} cannot be asked ({said})")

    def _key_in_words(self) -> str:
        if self._key:
            return f"the API key in {self._api_key_env} or its access to {self._model!r}; put a valid key there"
        if self._api_key_env is None:
            return "requests without an API key; name the environment variable that holds one as api_key_env"
        return f"requests without an API key; put one into the environment variable {self._api_key_env}"

    def _read_key(self) -> str | None:
        if self._api_key_env is None:
            return None
        key = os.environ.get(self._api_key_env, "").strip()
        if not key and not _is_loopback(self.url):
            raise UserError(
                f"the {self._who} at {self.url} needs an API key: put it into the environment variable "
                f"{self._api_key_env}, or set api_key_env to null for a server that wants none"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {self._api_key_env} holds characters that no API key has")
        return key or None

    def _clean(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + "..."


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "a judge over HTTP needs the openai package, which is not installed; pip install 'llmalign[judge]'"
        ) from error
    return openai


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("a judge's base_url begins with http:// or https://, such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "a judge's base_url holds no user, password or parameters; put the key into an environment variable and "
            "name it as api_key_env"
        )
    return base_url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _was_sent(error: Exception) -> bool:
    # By name: which HTTP library lies below, and so whose class it is, changes with the version of the openai package.
    return type(error.__cause__).__name__ not in {"ConnectError", "ConnectTimeout", "PoolTimeout"}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
