"""What the tests' sandbox knows of the other sandboxes: calls that are asked for, objects that stay there, errors."""

import builtins

from llmalign.rewards.sandbox.inside.wire import Unsupported, Writer, read_frame, read_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Send = Callable[[bytes], None]

# Raised here only where the tests name them: elsewhere they would end a loop of the tests early, or the tests.
ENDING = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt")
ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and name != "BaseException"
}
# What a text from the other side can make Python's parser and constructors raise, beside MemoryError.
UNREADABLE = (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, LookupError, AttributeError)


class AnswerError(Exception):
    """The answer raised something that has no counterpart here."""


class Gone(BaseException):
    """The answer's sandbox is no more."""


class Channel:
    """Requests to one of the sandboxes that hold foreign code, through the trusted side.

    `gone`, `refused` and `raised` remember what the code under test may have swallowed: that there is nothing there
    any more, what could not cross, and that a call raised; `ending` keeps those errors that end loops, to be asked
    whether the tests saw them. `forget` clears all but the first.
    """

    def __init__(self, reader: int, send: "Send", target: bytes, lock: "Any", errors: "dict[str, type]") -> None:
        self.reader, self.send, self.target, self.lock, self.errors = reader, send, target, lock, errors
        self.objects: dict[int, Remote] = {}
        self.holds_objects = False  # whether the tests are about objects, so that these may be used from here
        self.gone = ""
        self.forget()

    def forget(self) -> None:
        self.refused = self.opaque = ""
        self.asked = self.raised = False
        self.ending: list[BaseException] = []

    def function(self, name: str) -> "Callable[..., Any]":
        """A function of the other sandbox, under its name."""

        def call(*arguments: "Any", **keywords: "Any") -> "Any":
            return self.ask("name", name, arguments, keywords)

        call.__name__ = call.__qualname__ = name
        return call

    def value(self, name: str) -> "Any":
        """A copy of what a name stands for there, or a function that calls it there."""
        found = self.ask("value", name)
        if type(found) is not tuple or len(found) != 2:
            raise AnswerError("the answer broke the protocol")
        return self.function(name) if found[0] is True else found[1]

    def ask(self, *request: "Any") -> "Any":
        """What the other sandbox replies; raises what it raised. One request at a time, whatever thread asks."""
        with self.lock:
            if self.gone:
                raise Gone(self.gone)
            try:
                return self._ask(request)
            except Unsupported as error:
                self.refused = self.refused or str(error)
                raise

    def _ask(self, request: "tuple[Any, ...]") -> "Any":
        try:
            text = Writer(self._refer).text(request)
        except MemoryError:
            raise Unsupported("arguments too large to write") from None
        self.send(self.target + text.encode("ascii"))
        self.asked = True
        frame = read_frame(self.reader)
        if frame[:1] == b"X":
            self.gone = frame[1:].decode("ascii", "replace")
            raise Gone(self.gone)
        try:
            reply = read_value(frame[1:].decode("ascii"), self._object)
        except MemoryError:
            raise Unsupported(f"a result too large to read ({len(frame) / (1 << 20):.1f} MiB of text)") from None
        except UNREADABLE:
            raise AnswerError("the answer broke the protocol") from None
        return self._taken(reply)

    def _taken(self, reply: "Any") -> "Any":
        """The value of a reply; raises the error that it tells of."""
        kinds = [type(part) for part in reply] if type(reply) is tuple else []
        if len(kinds) == 2 and reply[0] == 0:
            return reply[1]
        if kinds == [int, str] and reply[0] == 2:
            raise Unsupported(reply[1])
        if kinds == [int, list, str, tuple, str] and reply[0] == 1:
            self.raised = True
            error = self._error(*reply[1:])
            if type(error).__name__ in ENDING:
                self.ending.append(error)
            raise error
        raise AnswerError("the answer broke the protocol")

    def _error(self, names: "list[Any]", name: str, arguments: "tuple[Any, ...]", text: str) -> BaseException:
        """The error under the first of its classes' names that is known here; plain Exception is no such class."""
        for known in names:
            kind = self.errors.get(known) if type(known) is str else None
            if kind is None or (kind is Exception and name != "Exception"):
                continue
            try:
                return kind(*arguments)
            except UNREADABLE:  # a subclass with arguments of its own
                continue
        return AnswerError(f"{name}: {text}" if text else name)

    def ended_a_loop(self) -> bool:
        """Whether an error went unseen by the tests' code: Python leaves its mark on an error where it passes a frame,
        and there is none where a loop over `map(candidate, ...)` takes it for the end."""
        seen = [error.__traceback__ and error.__traceback__.tb_frame.f_code.co_filename for error in self.ending]
        return any(file != "tests" for file in seen)

    def _refer(self, value: "Any") -> str:
        if type(value) is Remote and value._channel is self:
            return f"ref({value._number})"
        raise Unsupported(f"an argument of type {type(value).__name__}")

    def _object(self, number: int, kind: str) -> "Remote":
        if type(number) is not int or type(kind) is not str:
            raise ValueError("not a reference")
        if not self.holds_objects:
            what = "coroutine (async functions are not run)" if kind == "coroutine" else kind[:100]
            raise Unsupported(f"the answer returned an object of type {what}, which")
        if number not in self.objects:
            self.objects[number] = Remote(self, number)
        self.opaque = kind[:100]
        return self.objects[number]

    def _not_told(self, what: str) -> "Any":
        """An object's class decides these, and the class is the answer's: no test may rest on them."""
        self.refused = self.refused or f"{what} of an object of the answer"
        raise Unsupported(self.refused)


class Remote:
    """An object that stays in the answer's sandbox: attributes and calls are asked for, and it equals only itself."""

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__") and name.endswith("__"):
            return self._channel._not_told(f"the special method {name}")
        return self._channel.ask("get", self, name)

    def __setattr__(self, name: str, value: "Any") -> None:
        self._channel.ask("set", self, name, value)

    def __call__(self, *arguments: "Any", **keywords: "Any") -> "Any":
        return self._channel.ask("call", self, arguments, keywords)

    def __bool__(self) -> bool:
        return self._channel._not_told("the truth")

    def __eq__(self, other: object) -> bool:
        if other is None or type(other) is Remote:
            return self is other
        return self._channel._not_told("the equality with a value")

    __hash__ = object.__hash__


def known_errors(named: "set[str]") -> "dict[str, type]":
    """The built-in errors that a call may raise in tests that name `named`."""
    return {name: kind for name, kind in ERRORS.items() if name not in ENDING or name in named}
