"""The program of the tests' sandbox: runs the tests, asks the answer's sandbox for every call, reports counts.

Frames sent: N total; P passed so far, then what failed first; V the end; A and H a request to the answer or to the
helpers; S the source of the helpers. Frames read: V a reply; X there will be none any more, and why.
"""

import sys

from llmalign.rewards.sandbox.inside.names import SCOPES, Plan, Refused, free_names, kind_of, parse, plan, walk
from llmalign.rewards.sandbox.inside.start import start
from llmalign.rewards.sandbox.inside.wire import Closed, Unsupported, Writer, read_frame, read_value, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Send = Callable[[bytes], None]

# What a call may raise here under its own name. Not StopIteration and the like, which would end a test's loop early.
RAISED = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, Exception, FileExistsError,
    FileNotFoundError, FloatingPointError, ImportError, IndexError, KeyError, LookupError, MemoryError,
    ModuleNotFoundError, NameError, NotImplementedError, OSError, OverflowError, PermissionError, RecursionError,
    RuntimeError, SyntaxError, TimeoutError, TypeError, UnboundLocalError, UnicodeError, ValueError, ZeroDivisionError,
)  # fmt: skip
RAISED_BY_NAME = {kind.__name__: kind for kind in RAISED}


class AnswerError(Exception):
    """The answer raised something that has no counterpart here."""


class Gone(BaseException):
    """The answer's sandbox is no more."""


class Channel:
    """Requests to one of the sandboxes that hold foreign code, through the trusted side."""

    def __init__(self, reader: int, send: "Send", target: bytes) -> None:
        self.reader, self.send, self.target = reader, send, target
        self.objects: dict[int, Remote] = {}
        self.gone = ""
        self.opaque = ""

    def function(self, name: str) -> "Callable[..., Any]":
        """A function of the other sandbox, under its name."""

        def call(*arguments: "Any", **keywords: "Any") -> "Any":
            return self.ask("name", name, arguments, keywords)

        call.__name__ = call.__qualname__ = name
        return call

    def ask(self, *request: "Any") -> "Any":
        if self.gone:
            raise Gone(self.gone)
        self.send(self.target + Writer(self._refer).text(request).encode("ascii"))
        frame = read_frame(self.reader)
        if frame[:1] == b"X":
            self.gone = frame[1:].decode("ascii", "replace")
            raise Gone(self.gone)
        reply = read_value(frame[1:].decode("ascii"), self._object)
        if type(reply) is tuple and len(reply) == 2 and reply[0] == 0:
            return reply[1]
        if type(reply) is tuple and len(reply) == 3 and type(reply[1]) is str and type(reply[2]) is str:
            raise self._error(reply[1], reply[2])
        raise AnswerError("the answer broke the protocol")

    def _refer(self, value: "Any") -> str:
        if type(value) is Remote and value._channel is self:
            return f"ref({value._number})"
        raise Unsupported(f"an argument of type {type(value).__name__}")

    def _object(self, number: int, kind: str) -> "Remote":
        if number not in self.objects:
            self.objects[number] = Remote(self, number)
        self.opaque = kind
        return self.objects[number]

    def _error(self, name: str, text: str) -> Exception:
        if name == "Unsupported":
            return Unsupported(text)
        if name in RAISED_BY_NAME:
            return RAISED_BY_NAME[name](text)
        return AnswerError(f"{name}: {text}")


class Remote:
    """An object that stays in the answer's sandbox: attributes and calls are asked for, and it equals only itself."""

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> "Any":
        return self._channel.ask("get", self, name)

    def __setattr__(self, name: str, value: "Any") -> None:
        self._channel.ask("set", self, name, value)

    def __call__(self, *arguments: "Any", **keywords: "Any") -> "Any":
        return self._channel.ask("call", self, arguments, keywords)


def main() -> None:
    """Runs the job's tests; the report is what has been written when the pipe closes."""
    reader, writer, job = start()

    def send(data: bytes) -> None:
        write_frame(writer, data)

    send(b"R")
    try:
        tree = parse(job["tests"])
        units, total = split(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        send(b"N0")
        send(f"P0 The tests do not compile: {describe(error)}.".encode("ascii", "replace"))
        send(b"V")
        return
    send(b"N%d" % total)
    channels = Channel(reader, send, b"A"), Channel(reader, send, b"H")
    try:
        namespace = bind(free_names(tree), job, channels, send)
        run(units, total, namespace, channels, send)
    except (Refused, RecursionError, MemoryError) as error:
        send(f"P0 {describe(error)}".encode("ascii", "replace"))
    send(b"V")


def split(tree: "Any") -> "tuple[list[tuple[bool, Any]], int]":
    """(statements as pairs (is it a test, code), number of tests): calls of `check` are left out, one comes last.

    A test is a top-level assert, or a loop or another compound statement with asserts in it, or `check`.
    """
    units, checks = [], False
    for node in tree.body:
        if kind_of(node) == "Expr" and kind_of(node.value) == "Call":
            function = node.value.func
            if kind_of(function) == "Name" and function.id == "check":
                continue
        checks = checks or (kind_of(node) == "FunctionDef" and node.name == "check")
        is_test = kind_of(node) not in SCOPES and any(kind_of(inner) == "Assert" for inner in walk(node))
        units.append((is_test, compile(type(tree)([node], []), "tests", "exec", dont_inherit=True)))
    if checks:
        units.append((True, compile("check(__candidate__)", "tests", "exec", dont_inherit=True)))
    return units, sum(is_test for is_test, _ in units)


def bind(free: set[str], job: "dict[str, Any]", channels: "tuple[Channel, Channel]", send: "Send") -> "dict[str, Any]":
    """The namespace that the tests run in: the entry point, and what else they take from the program."""
    answer, helpers = channels
    module = type(sys)("tests")
    sys.modules["tests"] = module
    namespace = module.__dict__
    candidate = answer.function(job["entry_point"])
    namespace.update({job["entry_point"]: candidate, "__candidate__": candidate})
    wanted = free - {job["entry_point"], "check"}
    made = plan(wanted, job["program"], job["prompt"]) if wanted else Plan()
    for name in made.modules:
        namespace[name] = __import__(name)
    for name in made.in_answer:
        namespace[name] = answer.function(name)
    for name in made.in_helpers:
        namespace[name] = helpers.function(name)
    if made.in_helpers:
        send(b"S" + made.helpers.encode("utf-8", "surrogatepass"))
    return namespace


def run(
    units: "list[tuple[bool, Any]]",
    total: int,
    namespace: "dict[str, Any]",
    channels: "tuple[Channel, Channel]",
    send: "Send",
) -> None:
    """Runs the statements in order and reports after every test; the first that is no test and fails ends it."""
    passed, number, first = 0, 0, ""
    for is_test, code in units:
        number += is_test
        problem = ""
        for channel in channels:
            channel.opaque = ""
        try:
            exec(code, namespace)
        except BaseException as error:
            problem = explain(error, channels)
        # A test that swallows every exception must not pass because the answer's sandbox has died.
        problem = problem or next((channel.gone for channel in channels if channel.gone), "")
        if problem and not first:
            at = f"test {number} of {total}" if is_test else f"a statement before test {number + 1} of {total}"
            first = f"{problem} ({at})" if problem.startswith("unsupported") else f"{at.capitalize()}: {problem}"
        passed += is_test and not problem
        if is_test or problem:
            send(f"P{passed} {first}".encode("ascii", "replace"))
        if problem and (not is_test or any(channel.gone for channel in channels)):
            return


def explain(error: BaseException, channels: "tuple[Channel, Channel]") -> str:
    if isinstance(error, (Gone, Closed)):
        return str(error)
    if isinstance(error, Unsupported):
        return f"unsupported: {error} cannot cross between the sandboxes"
    opaque = next((channel.opaque for channel in channels if channel.opaque), "")
    if opaque and isinstance(error, (AssertionError, TypeError)):
        return f"unsupported: the answer returned an object of type {opaque}, which here equals only itself"
    return describe(error)


def describe(error: BaseException) -> str:
    text = str(error)[:300]
    if isinstance(error, Refused):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
