"""HumanEval and MBPP with their reference solutions, and with a fault planted in each."""

import gzip
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmalign.rewards.code import TestResult, run_tests

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("some_backend")]

OBJECTS = {"40", "88", "367", "533", "596", "601", "653", "902", "927"}  # of the program, across the boundary


def problems(shared: Path, name: str) -> Iterator[dict[str, Any]]:
    path = shared / "datasets" / "code" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            problem["number"] = problem["task_id"].split("/")[1]
            problem["code_prompt"] = problem["prompt"] if name == "humaneval" else ""
            yield problem


def reference(problem: dict[str, Any]) -> str:
    return problem["canonical_solution"]


def judged(shared: Path, name: str, completion: Callable[[dict[str, Any]], str] = reference) -> dict[str, TestResult]:
    def judge(problem: dict[str, Any]) -> tuple[str, TestResult]:
        program = problem["code_prompt"] + completion(problem)
        tests, entry_point = problem["tests"], problem["entry_point"]
        result = run_tests(program, tests, entry_point, timeout_s=30, prompt=problem["code_prompt"])
        return problem["number"], result

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(judge, problems(shared, name)))


@pytest.mark.parametrize("name, there, least", [("humaneval", 164, 164), ("mbpp", 974, 965)])
def test_reference_solutions_pass(shared: Path, name: str, there: int, least: int) -> None:
    results = judged(shared, name)
    failed = {number: result for number, result in results.items() if result.error is not None}
    assert len(results) == there
    assert there - len(failed) >= least, failed
    assert all(
        number in OBJECTS and (result.error or "").startswith("unsupported") for number, result in failed.items()
    )


def test_no_solution_passes_without_its_body(shared: Path) -> None:
    results = judged(shared, "humaneval", lambda problem: "    return None\n")
    assert [number for number, result in results.items() if result.passed] == []


def test_solutions_with_a_planted_fault_fail(shared: Path) -> None:
    """The right value comes back negated where it is a truth value, else inside a list."""

    def plant(problem: dict[str, Any]) -> str:
        name = problem["entry_point"]
        return f"""{problem["canonical_solution"]}
right = {name}
def {name}(*arguments):
    value = right(*arguments)
    return not value if isinstance(value, bool) else [value]
"""

    results = judged(shared, "humaneval", plant)
    assert [number for number, result in results.items() if result.passed] == []
