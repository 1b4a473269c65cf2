"""Which names the tests need beside the entry point, and where each comes from. Nothing of the program is run here."""

import builtins
import sys
from _ast import AST

from llmalign.rewards.sandbox.inside.wire import ONLY_AST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SCOPES = ("FunctionDef", "AsyncFunctionDef", "ClassDef", "Lambda")


class Refused(Exception):
    """The program may not be scored; the text says why."""


class Plan:
    """What the names stand for: modules to import, callables of the answer, callables of the helpers' own sandbox."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.in_answer: list[str] = []
        self.in_helpers: list[str] = []
        self.helpers = ""


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


def free_names(tests: "Any") -> set[str]:
    """Names that the tests read, never bind, and Python does not have."""
    read, bound = set(), set(dir(builtins))
    for node in walk(tests):
        if kind_of(node) == "Name" and kind_of(node.ctx) == "Load":
            read.add(node.id)
        else:
            bound |= _names_bound(node)
    return read - bound


def plan(wanted: set[str], program: str, prompt: str) -> Plan:
    """Where each wanted name comes from; Refused when the program gives a helper another definition than its first.

    The definition that counts is the prompt's, and where the prompt has none (or is empty) the program's first. A
    function is called in a sandbox of its own that holds this definition and what it needs, so that nothing the
    program does later, in whatever way, reaches it. A class has to live beside the answer, which is given its objects.
    """
    made = Plan()
    try:
        tree = parse(program)
    except (SyntaxError, ValueError):
        return made  # the answer's sandbox will say so at the first call
    in_program = _bindings(tree)
    prompt_tree, prompt = _prompt_tree(prompt)
    in_prompt = _bindings(prompt_tree)
    classes = any(kind_of(in_program[name][0]) == "ClassDef" for name in wanted & set(in_program))
    kept: dict[str, set[int]] = {"prompt": set(), "program": set()}
    for name in sorted(wanted & (set(in_program) | set(in_prompt))):
        first = (in_prompt.get(name) or in_program[name])[0]
        if kind_of(first) == "Import":
            if name in sys.stdlib_module_names and any(alias.name == name for alias in first.names):
                made.modules.append(name)
            continue
        is_class = kind_of(first) == "ClassDef"
        if name in in_prompt or not is_class:
            shape = _shape(first)
            if any(_shape(other) != shape for other in in_program.get(name, [])):
                raise Refused(f"The program redefines {name}, which the tests use.")
        if is_class or (classes and name not in in_prompt):
            made.in_answer.append(name)
        else:
            made.in_helpers.append(name)
            where, bindings = ("prompt", in_prompt) if name in in_prompt else ("program", in_program)
            kept[where] |= _lines_needed(first, bindings)
    made.helpers = _lines(prompt, kept["prompt"]) + _lines(program, kept["program"])
    return made


def _prompt_tree(prompt: str) -> "tuple[Any, str]":
    """The prompt's tree and text; one that ends in the head of a function gets a body."""
    try:
        return parse(prompt), prompt
    except SyntaxError:
        completed = prompt.rstrip() + "\n    pass\n"
        try:
            return parse(completed), completed
        except SyntaxError:
            raise Refused(
                "The problem's prompt is not Python, so its helpers cannot be told from the answer."
            ) from None


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


def _bindings(tree: "Any") -> "dict[str, list[Any]]":
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


def _shape(node: "Any") -> "Any":
    """A tree as tuples without positions and docstrings: equal for two statements that say the same."""
    if isinstance(node, list):
        return tuple([_shape(item) for item in node])
    if not isinstance(node, AST):
        return (type(node).__name__, repr(node))
    fields = []
    for field in node._fields:
        value = getattr(node, field, None)
        if field == "body" and kind_of(node) in SCOPES and isinstance(value, list) and _is_text(value[0]):
            value = value[1:]
        fields.append((field, _shape(value)))
    return (kind_of(node), tuple(fields))


def _is_text(statement: "Any") -> bool:
    return (
        kind_of(statement) == "Expr" and kind_of(statement.value) == "Constant" and type(statement.value.value) is str
    )


def _lines_needed(statement: "Any", bindings: "dict[str, list[Any]]") -> set[int]:
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


def _lines(source: str, numbers: set[int]) -> str:
    """Some lines of a source, in order."""
    every = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(every[number - 1] + "\n" for number in sorted(numbers))
