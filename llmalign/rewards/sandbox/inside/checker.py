"""The program of the tests' sandbox: runs the tests, asks the answer's sandbox for every call, reports counts.

Frames sent: N total; P passed so far, then what failed first; V the end; A and H a request to the answer or to the
helpers; S the source of the helpers. Frames read: V a reply; X there will be none any more, and why.
"""

import sys
from _thread import allocate_lock

from llmalign.rewards.sandbox.inside.channel import Channel, Gone, known_errors
from llmalign.rewards.sandbox.inside.names import Refused, Unusable, free_names, kind_of, parse, walk
from llmalign.rewards.sandbox.inside.plan import plan
from llmalign.rewards.sandbox.inside.start import start
from llmalign.rewards.sandbox.inside.units import CANDIDATE, REACHED, asserts_anywhere, split
from llmalign.rewards.sandbox.inside.wire import Closed, Unsupported, write_frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

    from llmalign.rewards.sandbox.inside.channel import Send

LARGE = (RecursionError, MemoryError)


class Evidence:
    """What shows that a test has put the answer to the proof: an assert that was reached, or an error that it expects.

    Where the tests have no assert at all, and raise errors of their own, that the answer was asked.
    """

    def __init__(self, answer: Channel, asserts: bool) -> None:
        self.answer, self.asserts = answer, asserts
        self.reached = False

    def reach(self, condition: "Any") -> "Any":
        self.reached = True
        return condition

    def missing(self) -> str:
        """Empty where there is some, else what is wrong."""
        if self.reached or self.answer.raised or (self.answer.asked and not self.asserts):
            return ""
        return "none of its asserts was reached"


def main() -> None:
    """Runs the job's tests; the report is what has been written when the pipe closes."""
    reader, writer, job = start()

    def send(data: bytes) -> None:
        write_frame(writer, data)

    send(b"R")
    try:
        judge(reader, job, send)
    except Unusable as error:
        send(b"N0")
        send(f"P0 {error}".encode("ascii", "replace"))
    except (Refused, *LARGE) as error:
        send(f"P0 {describe(error)}".encode("ascii", "replace"))
    send(b"V")


def judge(reader: int, job: "dict[str, Any]", send: "Send") -> None:
    try:
        tree = parse(job["tests"])
        free = free_names(job["tests"])
        asserts, named = asserts_anywhere(tree), {node.id for node in walk(tree) if kind_of(node) == "Name"}
        units, total = split(tree)
    except (SyntaxError, ValueError, *LARGE) as error:
        raise Unusable(f"The tests do not compile: {describe(error)}.") from None
    send(b"N%d" % total)
    lock, errors = allocate_lock(), known_errors(named)  # one lock: both channels read the same pipe
    answer, helpers = (Channel(reader, send, target, lock, errors) for target in (b"A", b"H"))
    evidence = Evidence(answer, asserts)
    try:
        namespace = bind(free, job, answer, helpers, send)
    except (Refused, Unusable, *LARGE):
        raise
    except BaseException as error:
        send(f"P0 Before the tests: {explain(error, (answer, helpers))}".encode("ascii", "replace"))
        return
    namespace[REACHED] = evidence.reach
    run(units, total, namespace, (answer, helpers), evidence, send)


def bind(free: set[str], job: "dict[str, Any]", answer: Channel, helpers: Channel, send: "Send") -> "dict[str, Any]":
    """The namespace that the tests run in: the entry point, and what else they take from the program."""
    module = type(sys)("__main__")
    sys.modules["tests"] = sys.modules["__main__"] = module
    namespace = module.__dict__
    candidate = answer.function(job["entry_point"])
    namespace.update({job["entry_point"]: candidate, CANDIDATE: candidate})
    made = plan(free - {job["entry_point"], "check"}, job)
    answer.holds_objects = made.objects
    if made.helpers:
        send(b"S" + made.helpers.encode("utf-8", "surrogatepass"))
    for name, (source, attribute) in made.imports.items():
        loaded = __import__(source, fromlist=[attribute] if attribute or "." in source else [])
        namespace[name] = getattr(loaded, attribute) if attribute else loaded
    for where, channel in (("answer", answer), ("helpers", helpers)):
        namespace.update({name: channel.function(name) for name in made.functions[where]})
        namespace.update({name: channel.value(name) for name in made.values[where]})
    for name in made.values["prompt"]:
        try:
            namespace[name] = helpers.value(name)
        except (Unsupported, Exception) as error:
            raise Unusable(f"unsupported: the tests use {name} of the prompt ({describe(error)})") from None
    return namespace


def run(
    units: "list[tuple[bool, CodeType]]",
    total: int,
    namespace: "dict[str, Any]",
    channels: "tuple[Channel, Channel]",
    evidence: Evidence,
    send: "Send",
) -> None:
    """Runs the statements in order and reports after every test; the first that is no test and fails ends it."""
    passed, number, first = 0, 0, ""
    for is_test, code in units:
        number += is_test
        problem = run_one(code, namespace, channels, evidence)
        if is_test and not problem:
            problem = evidence.missing()
        if problem and not first:
            at = f"test {number} of {total}" if is_test else f"a statement before test {number + 1} of {total}"
            first = f"{problem} ({at})" if problem.startswith("unsupported") else f"{at.capitalize()}: {problem}"
        passed += is_test and not problem
        if is_test or problem:
            send(f"P{passed} {first}".encode("ascii", "replace"))
        if problem and (not is_test or any(channel.gone for channel in channels)):
            return


def run_one(
    code: "CodeType", namespace: "dict[str, Any]", channels: "tuple[Channel, Channel]", evidence: Evidence
) -> str:
    """What goes wrong in one statement, '' for nothing."""
    evidence.reached = False
    for channel in channels:
        channel.forget()
    problem = ""
    try:
        exec(code, namespace)
    except BaseException as error:
        problem = explain(error, channels)
    # A test that swallows every exception must not pass because nothing could cross, or nothing is there any more.
    for channel in channels:
        if channel.refused and not problem.startswith("unsupported"):
            problem = explain(Unsupported(channel.refused), channels)
        problem = problem or channel.gone
        if channel.ended_a_loop():
            problem = problem or "an error of the answer ended a loop of the tests"
    return problem


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
