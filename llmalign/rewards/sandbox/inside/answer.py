"""The program of the answer's sandbox: runs the model's code, then answers calls. It decides nothing.

A reply is (0, value), (1, names of the built-in classes of an error, its name, its arguments, its text), or (2, what
cannot cross).
"""

import sys

from llmalign.rewards.sandbox.inside.start import start
from llmalign.rewards.sandbox.inside.wire import Closed, Unsupported, Writer, read_frame, read_value, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LONGEST_TEXT = 300  # characters of an exception's text that are passed on
LONGEST_ARGUMENTS = 4000  # of its arguments; where they are longer the text stands for them


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
            write_frame(writer, _refusal(str(error)))


def _reply(text: str, namespace: "dict[str, Any]", objects: Objects, failed: BaseException | None) -> bytes:
    try:
        request = read_value(text, objects.get)
    except MemoryError:
        return _refusal("arguments too large to read")
    try:
        value = _perform(request, namespace, failed)
    except BaseException as error:
        return _failure(error)
    try:
        return f"(0, {Writer(objects.refer).text(value)})".encode("ascii")
    except Unsupported as error:
        return _refusal(str(error))
    except MemoryError:
        return _refusal("a result too large to write")
    except BaseException as error:  # what a class of the program's made of being looked at
        return _failure(error)


def _perform(request: "Any", namespace: "dict[str, Any]", failed: BaseException | None) -> "Any":
    """What a request asks for: a call by name or of an object, what a name stands for, an attribute read or set."""
    kind, target, *rest = request
    if kind in ("name", "value") and target not in namespace:
        raise failed or NameError(f"the program does not define {target}")
    if kind == "name":
        arguments, keywords = rest
        return namespace[target](*arguments, **keywords)
    if kind == "value":
        value = namespace[target]
        return (True, None) if callable(value) and not isinstance(value, type) else (False, value)
    if kind == "call":
        arguments, keywords = rest
        return target(*arguments, **keywords)
    if kind == "get":
        return getattr(target, rest[0])
    setattr(target, *rest)
    return None


def _refusal(text: str) -> bytes:
    return f"(2, {ascii(text)})".encode("ascii")


def _failure(error: BaseException) -> bytes:
    try:
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        name, text = type(error).__name__, str(error)[:LONGEST_TEXT]
        arguments = _arguments(error) or f"({ascii(text)},)"
        return f"(1, {ascii(names)}, {ascii(name)}, {arguments}, {ascii(text)})".encode("ascii")
    except BaseException:  # the program's own exception may not even print
        return b"(1, [], 'Exception', (), '')"


def _arguments(error: BaseException) -> str:
    """The error's arguments as text; empty where they cannot cross or are long."""
    try:
        text = Writer(_no_object).text(error.args)
    except (Unsupported, MemoryError):
        return ""
    return text if len(text) <= LONGEST_ARGUMENTS else ""


def _no_object(value: "Any") -> str:
    raise Unsupported(f"an object of type {type(value).__name__}")
