"""Where the names come from that the tests use beside the entry point."""

import sys

from llmalign.rewards.sandbox.inside.names import (
    Refused,
    Unusable,
    bindings_of,
    kind_of,
    lines_needed,
    lines_of,
    parse,
    shape,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FUNCTIONS = ("FunctionDef", "AsyncFunctionDef")


class Plan:
    """What the names stand for: things to import here, functions and values of the answer or of the helpers.

    `helpers` is the source for the helpers' own sandbox; `objects` says that the tests are about a class of the
    answer's, so that its objects may be used from outside.
    """

    def __init__(self) -> None:
        self.imports: dict[str, tuple[str, str]] = {}  # name here: (module, name in it or "")
        self.functions: dict[str, list[str]] = {"answer": [], "helpers": []}
        self.values: dict[str, list[str]] = {"answer": [], "helpers": [], "prompt": []}  # the prompt's in the helpers
        self.helpers = ""
        self.objects = False


class Source:
    """A text and what it binds; nothing where it is not Python."""

    def __init__(self, text: str, tree: "Any") -> None:
        self.text = text
        self.bindings = bindings_of(tree) if tree is not None else {}
        self.needed: set[int] = set()

    def need(self, statement: "Any") -> None:
        self.needed |= lines_needed(statement, self.bindings)


def plan(wanted: set[str], job: "dict[str, Any]") -> Plan:
    """Where each wanted name comes from.

    The definition that counts is the prompt's, and where the prompt has none (or is empty) the program's first. A
    function is called in a sandbox of its own that holds this definition and what it needs, so that nothing the
    program does later, in whatever way, reaches it. A class has to live beside the answer, which is given its objects:
    one of the prompt's could be changed there, so no tests that use one are run.

    Refused when the program gives a helper another definition than its first, Unusable when a name cannot be had from
    where it is defined.
    """
    made = Plan()
    prompt = _prompt(job["prompt"], wanted)
    made.objects = _is_class(job["entry_point"], prompt)
    if not wanted:
        return made
    _refuse_unknown(wanted, job)
    try:
        program = Source(job["program"], parse(job["program"]))
    except (SyntaxError, ValueError):
        program = Source("", None)  # the answer's sandbox will say so at the first call
    of_program = wanted & set(program.bindings)
    for name in sorted(wanted & set(prompt.bindings)):
        _from_prompt(name, prompt, program, made)
    for name in sorted(wanted - set(prompt.bindings)):
        if not _from_star(name, prompt, made) and name in of_program:
            classes = {kind_of(program.bindings[other][0]) for other in of_program - set(prompt.bindings)}
            if job["own_names"] or kind_of(program.bindings[name][0]) == "Import":
                _from_program(name, program, "answer" if "ClassDef" in classes else "helpers", made)
    made.helpers = lines_of(prompt.text, prompt.needed) + lines_of(program.text, program.needed)
    return made


def _refuse_unknown(wanted: set[str], job: "dict[str, Any]") -> None:
    """Where it is not known what every answer starts with, a helper could be the answer's own."""
    theirs = sorted(wanted - sys.stdlib_module_names)
    if not job["own_names"] and theirs:
        raise Unusable(
            f"unsupported: the tests use {', '.join(theirs[:3])}, and nothing tells the problem's definition from the "
            "answer's; give the column code_prompt ('' where answers start from nothing)"
        )


def _is_class(entry_point: str, prompt: Source) -> bool:
    """Whether the tests are about a class: the answer has no say in this, so its name tells where no prompt does."""
    if entry_point in prompt.bindings:
        return kind_of(prompt.bindings[entry_point][0]) == "ClassDef"
    return entry_point[0].isupper() and not entry_point.isupper() and "_" not in entry_point


def _from_prompt(name: str, prompt: Source, program: Source, made: Plan) -> None:
    first = prompt.bindings[name][0]
    kind = kind_of(first)
    if kind == "ClassDef":
        raise Unusable(f"unsupported: the tests use class {name} of the prompt, which an answer could change")
    if kind in ("Import", "ImportFrom"):
        made.imports[name] = _import_of(name, first)
        return
    prompt.need(first)
    if kind not in FUNCTIONS:
        made.values["prompt"].append(name)
        return
    _refuse_others(name, first, program)
    made.functions["helpers"].append(name)


def _import_of(name: str, statement: "Any") -> tuple[str, str]:
    """(module, name in it or "") for a name that an import statement binds; Unusable outside the standard library."""
    alias = next(alias for alias in statement.names if name == (alias.asname or alias.name.split(".")[0]))
    if kind_of(statement) == "ImportFrom":
        found = (statement.module or "", alias.name)
    else:
        found = (alias.name if alias.asname else name, "")
    if getattr(statement, "level", 0) or found[0].split(".")[0] not in sys.stdlib_module_names:
        raise Unusable(f"unsupported: the tests use {name} of the prompt's import of {found[0]}, not a standard module")
    return found


def _from_star(name: str, prompt: Source, made: Plan) -> bool:
    """Whether a star import of the prompt gives the name."""
    for statement in prompt.bindings.get("*", []):
        if kind_of(statement) == "ImportFrom" and (statement.module or "").split(".")[0] in sys.stdlib_module_names:
            module = __import__(statement.module, fromlist=[name])
            if not name.startswith("_") and name in dir(module):
                made.imports[name] = (statement.module, name)
                return True
    return False


def _from_program(name: str, program: Source, where: str, made: Plan) -> None:
    first = program.bindings[name][0]
    kind = kind_of(first)
    if kind == "Import":
        if name in sys.stdlib_module_names and any(alias.name == name for alias in first.names):
            made.imports[name] = (name, "")
        return
    if kind == "ClassDef":
        made.functions["answer"].append(name)
        made.objects = True
        return
    _refuse_others(name, first, program)
    (made.functions if kind in FUNCTIONS else made.values)[where].append(name)
    if where == "helpers":
        program.need(first)


def _refuse_others(name: str, first: "Any", program: Source) -> None:
    if any(shape(other) != shape(first) for other in program.bindings.get(name, [])):
        raise Refused(f"The program redefines {name}, which the tests use.")


def _prompt(text: str, wanted: set[str]) -> Source:
    """The prompt; one that ends in the head of a function gets a body. Unusable when names are wanted of no Python."""
    for source in (text, text.rstrip() + "\n    pass\n"):
        try:
            return Source(source, parse(source))
        except (SyntaxError, ValueError):
            continue
    if wanted:
        raise Unusable("The problem's prompt is not Python, so its helpers cannot be told from the answer.")
    return Source("", None)
