"""How values cross from one sandbox to the other: the text of a Python literal, parsed and never evaluated.

What `ast.literal_eval` reads is written as it reads it; beyond that: nan, infinities, frozenset, range, bytearray,
built-in types by name, and `ref(n, kind)` for an object that stays where it is. Subclasses of built-in types cross as
the built-in value, so no method of theirs runs on the other side.
"""

import posix

TYPE_CHECKING = False  # importing typing would cost more than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MAX_DEPTH = 100  # Python's own parser stops at 200 brackets
MAX_NODES = 2_000_000
ONLY_AST = 0x400
MAX_FRAME = 16 * 1024 * 1024
TYPES = (int, float, str, bool, list, tuple, dict, set, frozenset, bytes, complex, type(None))
NAMED_TYPES = {kind.__name__: kind for kind in TYPES}
INFINITY = float("inf")


class Unsupported(BaseException):
    """A value that cannot cross; no `except Exception` of the tests may take it for an error of the answer's."""


class Closed(BaseException):
    """The other end of the pipe is gone; no `except Exception` of the code under test may eat it."""


def read_frame(fd: int) -> bytes:
    """Bytes of the next message: four bytes of length, big-endian, then as many bytes."""
    return _read_exactly(fd, int.from_bytes(_read_exactly(fd, 4), "big"))


def _read_exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = posix.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise Closed("the pipe is closed")
        data += piece
    return bytes(data)


def write_frame(fd: int, data: bytes) -> None:
    """Sends one message; raises Unsupported when it is longer than 16 MiB."""
    if len(data) > MAX_FRAME:
        raise Unsupported(f"a value of more than {MAX_FRAME >> 20} MiB of text")
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[posix.write(fd, view) :]


class Writer:
    """Turns values into text; `refer(value)` gives the text for an object that is not plain, or raises Unsupported."""

    def __init__(self, refer: "Callable[[Any], str]") -> None:
        self.refer = refer
        self.nodes = 0

    def text(self, value: "Any", depth: int = 0) -> str:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise Unsupported(f"a value nested more than {MAX_DEPTH} deep")
        if self.nodes > MAX_NODES:
            raise Unsupported(f"a value of more than {MAX_NODES} parts")
        if value is Ellipsis:
            return "..."
        if value is None or value is True or value is False:
            return repr(value)
        if isinstance(value, str):
            return ascii(str.__str__(value))
        if isinstance(value, int):
            return int.__repr__(value)
        if isinstance(value, float):
            return self._float(value)
        if isinstance(value, bytes):
            return bytes.__repr__(bytes(value))
        if isinstance(value, complex):
            return f"complex({self._float(value.real)}, {self._float(value.imag)})"
        return self._container(value, depth + 1)

    def _float(self, value: float) -> str:
        if value != value:
            return "nan"
        if value in (INFINITY, -INFINITY):
            return "1e999" if value > 0 else "-1e999"
        return float.__repr__(value)

    def _container(self, value: "Any", depth: int) -> str:
        if isinstance(value, list):
            return f"[{self._items(list.__iter__(value), depth)}]"
        if isinstance(value, tuple):
            items = self._items(tuple.__iter__(value), depth)
            return f"({items},)" if items else "()"
        if isinstance(value, dict):
            pairs = (f"{self.text(key, depth)}: {self.text(item, depth)}" for key, item in dict.items(value))
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, set):
            return f"{{{self._items(set.__iter__(value), depth)}}}" if set.__len__(value) else "set()"
        if isinstance(value, frozenset):
            return f"frozenset([{self._items(frozenset.__iter__(value), depth)}])"
        if isinstance(value, range):
            return f"range({value.start}, {value.stop}, {value.step})"
        if isinstance(value, bytearray):
            return f"bytearray({bytes.__repr__(bytes(value))})"
        if isinstance(value, type) and any(value is kind for kind in TYPES):
            return value.__name__
        return self.refer(value)

    def _items(self, items: "Iterable[Any]", depth: int) -> str:
        return ", ".join([self.text(item, depth) for item in items])


def read_value(text: str, refs: "Callable[..., Any]") -> "Any":
    """The value that a text stands for; `refs(number, kind)` gives what a `ref` names. ValueError if it is no value."""
    calls: dict[str, Any] = {
        "frozenset": frozenset,
        "range": range,
        "bytearray": bytearray,
        "complex": complex,
        "set": set,
        "ref": refs,
    }

    def build(node: "Any") -> "Any":
        kind = type(node).__name__
        if kind == "Constant":
            return node.value
        if kind == "List":
            return [build(item) for item in node.elts]
        if kind == "Tuple":
            return tuple([build(item) for item in node.elts])
        if kind == "Dict":
            return {build(key): build(value) for key, value in zip(node.keys, node.values, strict=True)}
        if kind == "Set":
            return {build(item) for item in node.elts}
        if kind == "UnaryOp" and type(node.op).__name__ == "USub" and type(node.operand).__name__ == "Constant":
            if type(node.operand.value) in (int, float):
                return -node.operand.value
        if kind == "Name" and node.id == "nan":
            return INFINITY - INFINITY
        if kind == "Name" and node.id in NAMED_TYPES:
            return NAMED_TYPES[node.id]
        if kind == "Call" and type(node.func).__name__ == "Name" and node.func.id in calls and not node.keywords:
            return calls[node.func.id](*[build(item) for item in node.args])
        raise ValueError(f"not a value: {kind}")

    return build(compile(text, "value", "eval", ONLY_AST, dont_inherit=True).body)
