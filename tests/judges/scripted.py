"""A chat endpoint on the loopback that answers as a test says, and counts every request by what it holds."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llmalign.judges import ChatRequest


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; with `cut` the connection closes after so many bytes of the body."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None

    def payload(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def completion(text: str = "A", logprobs: dict[str, float] | None = None, *, tokens: tuple[int, int] = (10, 1)) -> dict:
    """The JSON of a chat completion; without `logprobs` they are null, as from a server that has none."""
    top = [{"token": token, "logprob": logprob} for token, logprob in (logprobs or {}).items()]
    return {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": [{**top[0], "top_logprobs": top}]} if top else None,
            }
        ],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


ANSWER = Reply(completion("A", {"A": -0.2, "B": -1.8}))


def ask_for(*texts: str, **options: Any) -> list[ChatRequest]:
    """One request for each text."""
    return [ChatRequest([{"role": "user", "content": text}], **options) for text in texts]


def question(body: dict) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]


class ScriptedJudge:
    """Serves until it is closed; `answer(body, times)` is what the request gets that came `times` times before."""

    def __init__(self, answer: Callable[[dict, int], Reply] = lambda body, times: ANSWER) -> None:
        self.answer = answer
        self.counts: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        self._server.request_queue_size = 128
        self._server.daemon_threads = True
        self._server.server_bind()
        self._server.server_activate()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        # Closing waits for one poll.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def questions(self) -> list[str]:
        return [question(body) for body in self.bodies]

    def _count(self, raw: bytes, handler: BaseHTTPRequestHandler) -> tuple[dict, int]:
        body, key = json.loads(raw), hashlib.sha256(raw).hexdigest()
        with self._lock:
            times = self.counts[key]
            self.counts[key] += 1
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.paths.append(handler.path)
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
        return body, times

    def _handler(judge) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body, times = judge._count(raw, self)
                try:
                    reply = judge.answer(body, times)
                finally:
                    with judge._lock:
                        judge.busy -= 1
                payload = reply.payload()
                try:
                    self.send_response(reply.status)
                    headers = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **reply.headers}
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload[: reply.cut])
                except OSError:
                    self.close_connection = True  # whoever asked is gone
                if reply.cut is not None:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
