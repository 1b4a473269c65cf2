"""Small programming tasks on lists of numbers: words for the prompt, reference solutions, faulty ones, unit tests.

A task is a filter, a change of each number and an end, such as "Drop the odd numbers, add 3 to each, return the sum.".
Combinations of filter and change are held out whole.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

CONSTANTS = (2, 3, 4, 5)
HELD_OUT = 0.15
TESTS = 6
FAULTS = ("constant", "bound", "no filter", "no change", "end", "syntax")
# What is misread wherever it can be: the bound of what is to be dropped, and what "differ" asks for.
DROPPED, REPEATED = "bound", "repeated"


@dataclass(frozen=True)
class Step:
    """One step of a task: how it is said, how it is written (of `v`, or of `{}`, the list), and what it does."""

    words: tuple[str, ...]
    code: str
    does: Callable[[Any], Any]


def _filters() -> dict[str, Step]:
    steps = {
        "all": Step(("take the numbers",), "", lambda v: True),
        "even": Step(("keep the even numbers", "drop the odd numbers"), "v % 2 == 0", lambda v: v % 2 == 0),
        "odd": Step(("keep the odd numbers", "drop the even numbers"), "v % 2 == 1", lambda v: v % 2 == 1),
        "positive": Step(("keep those above zero", "drop those up to zero"), "v > 0", lambda v: v > 0),
    }
    for c in CONSTANTS:
        above = (f"keep those above {c}", f"drop those up to {c}")
        below = (f"keep those below {c}", f"drop those from {c} up")
        steps[f"above {c}"] = Step(above, f"v > {c}", lambda v, c=c: v > c)
        steps[f"below {c}"] = Step(below, f"v < {c}", lambda v, c=c: v < c)
    return steps


def _changes() -> dict[str, Step]:
    steps = {
        "same": Step(("leave each as it is",), "v", lambda v: v),
        "square": Step(("square each", "multiply each by itself"), "v * v", lambda v: v * v),
    }
    for c in CONSTANTS:
        steps[f"add {c}"] = Step((f"add {c} to each", f"raise each by {c}"), f"v + {c}", lambda v, c=c: v + c)
        steps[f"less {c}"] = Step((f"take {c} from each", f"lower each by {c}"), f"v - {c}", lambda v, c=c: v - c)
        steps[f"from {c}"] = Step((f"take each from {c}",), f"{c} - v", lambda v, c=c: c - v)
        steps[f"times {c}"] = Step((f"multiply each by {c}",), f"v * {c}", lambda v, c=c: v * c)
        steps[f"modulo {c}"] = Step((f"take the remainder by {c}",), f"v % {c}", lambda v, c=c: v % c)
    return steps


FILTERS = _filters()
CHANGES = _changes()
ENDS = {
    "list": Step(("return them in order",), "{}", list),
    "sorted": Step(("return them sorted", "return them from low to high"), "sorted({})", sorted),
    "backwards": Step(("return them backwards", "return them last to first"), "{}[::-1]", lambda x: x[::-1]),
    "sum": Step(("return the sum", "return the total"), "sum({})", sum),
    "count": Step(("return how many differ",), "len(set({}))", lambda x: len(set(x))),
    "largest": Step(("return the largest or 0",), "max({}, default=0)", lambda x: max(x, default=0)),
    "smallest": Step(("return the smallest or 0",), "min({}, default=0)", lambda x: min(x, default=0)),
}


@dataclass(frozen=True)
class Task:
    """A task and one way to say it; `filter`, `change` and `end` are keys of the tables above."""

    filter: str
    change: str
    end: str
    wording: int = 0

    @property
    def key(self) -> str:
        return f"{self.filter}|{self.change}|{self.end}"

    @cached_property
    def _cases(self) -> list[tuple[list[int], Any]]:
        """Inputs, one empty, each with the constants of the task in it, and what the task makes of them."""
        rng = random.Random(self.key)
        inputs: list[list[int]] = [[]]
        while len(inputs) < TESTS + 1:
            numbers = [rng.randint(-6, 9) for _ in range(rng.randint(3, 6))]
            bounds = [int(word) for word in self.filter.split() if word.isdigit()]
            numbers += [rng.choice([b - 1, b, b + 1]) for b in bounds] + bounds
            rng.shuffle(numbers)
            inputs.append(numbers)
        return [(numbers, self.solve(numbers)) for numbers in inputs]

    def solve(self, numbers: list[int]) -> Any:
        """What the task makes of a list, by the tables and not by any program's text."""
        kept = [CHANGES[self.change].does(v) for v in numbers if FILTERS[self.filter].does(v)]
        return ENDS[self.end].does(kept)

    @property
    def prompt(self) -> str:
        """The task in words, with one example that is not among its tests."""
        parts = [FILTERS[self.filter], CHANGES[self.change], ENDS[self.end]]
        said = ", ".join(part.words[(self.wording >> place) % len(part.words)] for place, part in enumerate(parts))
        given, answer = self._cases[1]
        return f"# {said[0].upper()}{said[1:]}.\n# f({given}) == {answer}\n"

    @property
    def tests(self) -> str:
        """Assert lines, the form of MBPP's tests."""
        cases = [case for place, case in enumerate(self._cases) if place != 1]
        return "\n".join(f"assert f({given}) == {answer}" for given, answer in cases)

    @property
    def trap(self) -> str | None:
        """The fault that this task's words invite, or none."""
        if self.end == "count":
            return REPEATED
        words = FILTERS[self.filter].words
        return DROPPED if "those" in words[0] and self.wording % len(words) == 1 else None

    def program(self, rng: random.Random, fault: str | None = None) -> str:
        """A solution written as one expression or as a loop; with a `fault` it is wrong in one place."""
        condition, change, end = FILTERS[self.filter].code, CHANGES[self.change].code, ENDS[self.end].code
        if fault == "constant":
            change, condition = _shifted(change, condition, rng)
        elif fault == "bound":
            condition = _moved(condition) if condition else "v > 0"
        elif fault == "no filter":
            condition = "" if condition else "v > 0"
        elif fault == "no change":
            change = "v" if change != "v" else "v + 1"
        elif fault == REPEATED:
            end = "len({})"
        elif fault == "end":
            end = rng.choice([step.code for key, step in ENDS.items() if key != self.end])
        text = _written(condition, change, end, loop=rng.random() < 0.5)
        return _broken(text, rng) if fault == "syntax" else text


def _shifted(change: str, condition: str, rng: random.Random) -> tuple[str, str]:
    """The two expressions with the constant of one of them off by one."""
    digit = next((c for c in change + condition if c.isdigit()), None)
    if digit is None:
        return change + " + 1", condition
    wrong = str(int(digit) + rng.choice([-1, 1]))
    if digit in change:
        return change.replace(digit, wrong, 1), condition
    return change, condition.replace(digit, wrong, 1)


def _moved(condition: str) -> str:
    """The condition with its bound on the wrong side, or with odd and even confused."""
    if "%" in condition:
        return condition.replace("== 0", "!= 0") if "== 0" in condition else condition.replace("== 1", "!= 1")
    return condition.replace(">", ">=").replace("<", "<=")


def _written(condition: str, change: str, end: str, *, loop: bool) -> str:
    if not loop:
        kept = f"[{change} for v in x{' if ' + condition if condition else ''}]"
        return f"def f(x):\n    return {end.format(kept)}\n"
    kept = f"        if {condition}:\n            r.append({change})" if condition else f"        r.append({change})"
    return f"def f(x):\n    r = []\n    for v in x:\n{kept}\n    return {end.format('r')}\n"


def _broken(text: str, rng: random.Random) -> str:
    """The text without one of its brackets behind the first line."""
    first = text.index("\n")
    place = rng.choice([at for at in range(first, len(text)) if text[at] in "()[]"])
    return text[:place] + text[place + 1 :]


@cache
def split() -> tuple[list[Task], list[Task]]:
    """All tasks, those to train on and those held out: no filter and change of a held-out task is trained on."""
    pairs = [(filter_, change) for filter_ in FILTERS for change in CHANGES]
    held = set(random.Random("held out").sample(pairs, round(HELD_OUT * len(pairs))))
    tasks: tuple[list[Task], list[Task]] = ([], [])
    for filter_, change in pairs:
        tasks[(filter_, change) in held].extend(Task(filter_, change, end) for end in ENDS)
    return tasks


def drawn(tasks: list[Task], count: int, rng: random.Random) -> list[Task]:
    """`count` tasks with replacement, each in words of its own."""
    return [replace(task, wording=rng.randrange(8)) for task in rng.choices(tasks, k=count)]


def lessons(count: int, seed: int, *, faulty: float, misread: float) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion` to imitate, some of them wrong.

    Of the tasks with a trap a share of `misread` falls into it; of the others, and of the rest, a share of `faulty` is
    wrong in a place drawn at random.
    """
    rng = random.Random(f"lessons {seed}")
    rows = []
    for task in drawn(split()[0], count, rng):
        fault = task.trap if rng.random() < misread else None
        if fault is None and rng.random() < faulty:
            fault = rng.choice(FAULTS)
        rows.append({"prompt": task.prompt, "completion": task.program(rng, fault)})
    return rows
