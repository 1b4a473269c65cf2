"""What the text of programs and tests says of names. Nothing of them is run here."""

import _symtable  # type: ignore[import-not-found]
import builtins
from _ast import AST

from llmalign.rewards.sandbox.inside.wire import ONLY_AST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SCOPES = ("FunctionDef", "AsyncFunctionDef", "ClassDef", "Lambda")


class Refused(Exception):
    """The program may not be scored; the text says why."""


class Unusable(Exception):
    """No program can be judged by these tests here; the text says why."""


def parse(source: str) -> "Any":
    """The source's syntax tree."""
    return compile(source, "source", "exec", ONLY_AST, dont_inherit=True)


def kind_of(node: "Any") -> str:
    return type(node).__name__


def walk(node: "Any", enter: "Callable[[Any], bool]" = lambda node: True) -> "list[Any]":
    """A node and all below it; what is below a node for which `enter` is false is left out."""
    found: list[Any] = []
    waiting = [node]
    while waiting:
        node = waiting.pop()
        found.append(node)
        if enter(node):
            for field in node._fields:
                value = getattr(node, field, None)
                waiting.extend(
                    item for item in (value if isinstance(value, list) else [value]) if isinstance(item, AST)
                )
    return found


def free_names(tests: str) -> set[str]:
    """Names that the tests read in the scope of the module, never bind there, and Python does not have."""
    read, bound = set(), set(dir(builtins))
    waiting = [_symtable.symtable(tests, "tests", "exec")]
    while waiting:
        scope = waiting.pop()
        waiting.extend(scope.children)
        for name, flags in scope.symbols.items():
            where = (flags >> _symtable.SCOPE_OFF) & _symtable.SCOPE_MASK
            of_module = scope.type == _symtable.TYPE_MODULE or where in (
                _symtable.GLOBAL_IMPLICIT,
                _symtable.GLOBAL_EXPLICIT,
            )
            if of_module and flags & (_symtable.DEF_LOCAL | _symtable.DEF_IMPORT):
                bound.add(name)
            if of_module and flags & _symtable.USE:
                read.add(name)
    return read - bound


def _names_bound(node: "Any") -> set[str]:
    """Names that one node binds, in whatever scope it stands."""
    kind = kind_of(node)
    if kind == "Name":
        return set() if kind_of(node.ctx) == "Load" else {node.id}
    if kind == "arg":
        return {node.arg}
    if kind in ("FunctionDef", "AsyncFunctionDef", "ClassDef"):
        return {node.name}
    if kind == "alias":
        return {node.asname or node.name.split(".")[0]}
    if kind == "Global":
        return set(node.names)
    if kind in ("ExceptHandler", "MatchAs", "MatchStar") and node.name:
        return {node.name}
    if kind == "MatchMapping" and node.rest:
        return {node.rest}
    return set()


def bindings_of(tree: "Any") -> "dict[str, list[Any]]":
    """Each name of the module's scope, with the top-level statements that bind it, in order."""
    found: dict[str, list[Any]] = {}
    for statement in tree.body:
        names: set[str] = set()
        for node in walk(statement, lambda node: kind_of(node) not in SCOPES):
            names |= _names_bound(node)
        for node in walk(statement):
            if kind_of(node) == "Global":
                names |= set(node.names)
        for name in names:
            found.setdefault(name, []).append(statement)
    return found


def shape(node: "Any") -> "Any":
    """A tree as tuples without positions and docstrings: equal for two statements that say the same."""
    if isinstance(node, list):
        return tuple([shape(item) for item in node])
    if not isinstance(node, AST):
        return (type(node).__name__, repr(node))
    fields = []
    for field in node._fields:
        value = getattr(node, field, None)
        if field == "body" and kind_of(node) in SCOPES and isinstance(value, list) and _is_text(value[0]):
            value = value[1:]
        fields.append((field, shape(value)))
    return (kind_of(node), tuple(fields))


def _is_text(statement: "Any") -> bool:
    return (
        kind_of(statement) == "Expr" and kind_of(statement.value) == "Constant" and type(statement.value.value) is str
    )


def lines_needed(statement: "Any", bindings: "dict[str, list[Any]]") -> set[int]:
    """Numbers of the lines that hold a statement and the first bindings of all that it reads, built-ins excepted."""
    taken: list[Any] = []
    waiting = [statement]
    python = set(dir(builtins))  # a later `def sum` is not what a helper above it meant
    while waiting:
        statement = waiting.pop()
        if any(statement is other for other in taken):
            continue
        taken.append(statement)
        read = {node.id for node in walk(statement) if kind_of(node) == "Name" and kind_of(node.ctx) == "Load"}
        waiting.extend(bindings[name][0] for name in read - python if name in bindings)
        waiting.extend(other for other in bindings.get("*", []) if other.lineno < statement.lineno)
    lines: set[int] = set()
    for statement in taken:
        above = [decorator.lineno for decorator in getattr(statement, "decorator_list", [])]
        lines |= set(range(min([statement.lineno, *above]), statement.end_lineno + 1))
    return lines


def lines_of(source: str, numbers: set[int]) -> str:
    """Some lines of a source, in order."""
    every = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(every[number - 1] + "\n" for number in sorted(numbers))
