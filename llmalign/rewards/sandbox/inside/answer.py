"""The program of the answer's sandbox: runs the model's code, then answers calls. It decides nothing."""

import sys

from llmalign.rewards.sandbox.inside.start import start
from llmalign.rewards.sandbox.inside.wire import Closed, Unsupported, Writer, read_frame, read_value, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LONGEST_TEXT = 300  # characters of an exception's text that are passed on


class Objects:
    """Objects that stay here and that the other side knows by number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def refer(self, value: "Any") -> str:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return f"ref({self.numbers[id(value)]}, {ascii(type(value).__name__)})"

    def get(self, number: int) -> "Any":
        return self.kept[number]


def main() -> None:
    """Runs the program of the job, then reads a request and writes the answer until the pipe closes."""
    reader, writer, job = start()
    module = type(sys)("answer")
    sys.modules["answer"] = module
    write_frame(writer, b"R")
    failed: BaseException | None = None
    try:
        exec(compile(job["program"], "answer", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # what stands above an exit() is defined all the same
        failed = error
    objects = Objects()
    while True:
        try:
            text = read_frame(reader).decode("ascii")
        except Closed:
            return
        reply = _reply(text, module.__dict__, objects, failed)
        try:
            write_frame(writer, reply)
        except Unsupported as error:
            write_frame(writer, _failure(error))


def _reply(text: str, namespace: "dict[str, Any]", objects: Objects, failed: BaseException | None) -> bytes:
    try:
        value = _perform(read_value(text, objects.get), namespace, failed)
        return f"(0, {Writer(objects.refer).text(value)})".encode("ascii")
    except BaseException as error:
        return _failure(error)


def _perform(request: "Any", namespace: "dict[str, Any]", failed: BaseException | None) -> "Any":
    """What a request asks for: a call by name or of an object, or an attribute read or set."""
    kind, target, *rest = request
    if kind == "name":
        if target not in namespace:
            raise failed or NameError(f"the program does not define {target}")
        arguments, keywords = rest
        return namespace[target](*arguments, **keywords)
    if kind == "call":
        arguments, keywords = rest
        return target(*arguments, **keywords)
    if kind == "get":
        return getattr(target, rest[0])
    setattr(target, *rest)
    return None


def _failure(error: BaseException) -> bytes:
    try:
        text = str(error)[:LONGEST_TEXT]
    except BaseException:  # the program's own exception may not even print
        text = ""
    return f"(1, {ascii(type(error).__name__)}, {ascii(text)})".encode("ascii")
