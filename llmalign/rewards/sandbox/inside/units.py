"""The tests' text as units that are run one after another, and which of them are tests.

A test is `check`, or a top-level statement that asserts, itself or through functions of the tests that it calls. Every
assert says when it has been reached: an assert that nothing runs proves nothing of the answer.
"""

from _ast import Call, Load, Name

from llmalign.rewards.sandbox.inside.names import SCOPES, Unusable, kind_of, parse, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

REACHED = "__asserted__"  # what every assert passes its condition through
CANDIDATE = "__candidate__"
LATER = ("FunctionDef", "AsyncFunctionDef", "Lambda")  # their bodies do not run where they stand


def split(tree: "Any") -> "tuple[list[tuple[bool, CodeType]], int]":
    """(statements as pairs (is it a test, code), number of tests): calls of `check` are left out, one comes last.

    Unusable when `check` is asynchronous.
    """
    checks = [node for node in _run_at_once(tree, SCOPES) if kind_of(node) in LATER[:2] and node.name == "check"]
    if any(kind_of(node) == "AsyncFunctionDef" for node in checks):
        raise Unusable("unsupported: check is an async function")
    asserting = _asserting_functions(tree)
    if checks:
        _leave_out_calls_of_check(tree)
    tests = [_is_test(statement, asserting) for statement in tree.body]
    _mark_asserts(tree)
    units = [
        (is_test, compile(type(tree)([statement], []), "tests", "exec", dont_inherit=True))
        for is_test, statement in zip(tests, tree.body, strict=True)
    ]
    if checks:
        units.append((True, compile(f"check({CANDIDATE})", "tests", "exec", dont_inherit=True)))
    return units, sum(is_test for is_test, _ in units)


def asserts_anywhere(tree: "Any") -> bool:
    return any(kind_of(node) == "Assert" for node in walk(tree))


def _run_at_once(node: "Any", closed: "tuple[str, ...]" = LATER) -> "list[Any]":
    """What runs when a statement does; nothing in the bodies of the kinds `closed`."""
    return walk(node, lambda inner: kind_of(inner) not in closed)


def _is_test(statement: "Any", asserting: set[str]) -> bool:
    nodes = _run_at_once(statement)
    return any(kind_of(node) == "Assert" for node in nodes) or bool(_called(nodes) & asserting)


def _called(nodes: "list[Any]") -> set[str]:
    """Names of the functions and methods that are called."""
    functions = [node.func for node in nodes if kind_of(node) == "Call"]
    names = {function.id for function in functions if kind_of(function) == "Name"}
    return names | {function.attr for function in functions if kind_of(function) == "Attribute"}


def _asserting_functions(tree: "Any") -> set[str]:
    """Functions and methods of the tests that assert or call one that does; not `check`, which is run once anyway."""
    bodies = {node.name: walk(node) for node in walk(tree) if kind_of(node) in LATER[:2]}
    bodies.pop("check", None)
    calls = {name: _called(nodes) for name, nodes in bodies.items()}
    found = {name for name, nodes in bodies.items() if any(kind_of(node) == "Assert" for node in nodes)}
    while more := {name for name, called in calls.items() if name not in found and called & found}:
        found |= more
    return found


def _leave_out_calls_of_check(tree: "Any") -> None:
    for node in _run_at_once(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                kept = [statement for statement in block if not _calls_check(statement)]
                block[:] = kept or (parse("pass").body if block and node is not tree else [])


def _calls_check(statement: "Any") -> bool:
    if kind_of(statement) != "Expr" or kind_of(statement.value) != "Call":
        return False
    function = statement.value.func
    return kind_of(function) == "Name" and function.id == "check"


def _mark_asserts(tree: "Any") -> None:
    for node in walk(tree):
        if kind_of(node) == "Assert":
            at = {name: getattr(node.test, name) for name in node.test._attributes}
            node.test = Call(Name(REACHED, Load(), **at), [node.test], [], **at)
