"""What is asked of a judge and what comes back: requests, answers and failures, and their JSON."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Message = Mapping[str, str]


class MalformedAnswer(Exception):
    """Why what came back is no chat completion."""


@dataclass(frozen=True)
class ChatRequest:
    """One question: the conversation so far and how its next message is drawn.

    `top_logprobs` None asks for no log-probs. A request with `temperature` above 0 and no `seed` is a draw that cannot
    be repeated, so its answer is never kept.
    """

    messages: Sequence[Message]
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = 5

    def body(self, model: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON that is sent; `extra` comes on top, and what it sets to None is left out."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {name: value for name, value in (body | dict(extra)).items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """What the judge said.

    `first_token_logprobs`: the likeliest first tokens, as the judge spells them, with their log-probs; None where none
    were asked for, empty where the answer has no token. Token counts are 0 where the judge reports none. `cached`: it
    was known before this call.
    """

    text: str
    first_token_logprobs: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False

    def to_json(self) -> str:
        """Text for the cache."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "cached"})

    @staticmethod
    def from_json(text: str) -> "Answer":
        """The answer that `to_json` wrote, marked as cached."""
        return Answer(**json.loads(text), cached=True)


@dataclass(frozen=True)
class Failure:
    """Why one request has no answer; asking again later may give one."""

    message: str


@dataclass(frozen=True)
class Completion:
    """A chat completion as read; `reported` says whether it came with token counts, `filtered` whether it was withheld.

    `answer.first_token_logprobs` is None where the judge gave no log-probs.
    """

    answer: Answer
    reported: bool
    filtered: bool


@dataclass(frozen=True)
class Question:
    """A request as it is sent: its JSON, and the key that its answer is kept under."""

    body: dict[str, Any]
    key: str

    @property
    def repeatable(self) -> bool:
        """Whether the same request may be answered from the cache: it is not drawn, or drawn with a seed."""
        return self.body.get("temperature") == 0 or "seed" in self.body

    @property
    def wants_logprobs(self) -> bool:
        """Whether an answer without log-probs is none."""
        return self.body.get("logprobs") is True


def request_key(url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of the whole request in hexadecimal: where it goes and every parameter."""
    whole = json.dumps({"url": url, "body": body}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def read_completion(data: Any) -> Completion:
    """The first choice of a chat completion's JSON.

    Raises MalformedAnswer where there is none. Streams, tool calls and further choices are not covered.
    """
    try:
        if isinstance(data, dict) and "choices" not in data and "error" in data:
            raise MalformedAnswer(f"an error in the place of an answer: {error_message(data)}")
        choice = data["choices"][0]
        text = choice["message"]["content"]
        usage = data.get("usage") or {}
        prompt_tokens, completion_tokens = (int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion"))
        logprobs = _first_token(choice.get("logprobs"), text)
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswer("something else than a chat completion") from error
    if not isinstance(text, str | None):
        raise MalformedAnswer("a message whose content is no text")
    answer = Answer(text or "", logprobs, prompt_tokens, completion_tokens)
    return Completion(answer, reported=bool(usage), filtered=finish == "content_filter")


def error_message(data: Any) -> str:
    """What the JSON of an HTTP error says, or all of it."""
    inner = data.get("error", data) if isinstance(data, dict) else data
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else json.dumps(message)


def _first_token(logprobs: Any, text: str | None) -> dict[str, float] | None:
    tokens = logprobs["content"] if logprobs is not None else None
    if not tokens:
        # An answer that ended at once has no first token; with a text but no log-probs, the judge gives none.
        return None if text else {}
    found: dict[str, float] = {}
    for entry in tokens[0].get("top_logprobs") or ():
        if entry["logprob"] is not None:
            # Tokens may be spelled alike, as a letter and its byte: the first, likeliest, stands for them.
            found.setdefault(str(entry["token"]), float(entry["logprob"]))
    # The drawn token's own log-prob alone would pass for certainty.
    return found or None
