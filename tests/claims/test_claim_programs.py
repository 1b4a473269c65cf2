"""The programming tasks against hand-worked answers and the sandbox, the pairs made of them, and the verdict."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from claims import programs, programs_models, programs_report
from claims.programs_tasks import CHANGES, ENDS, FAULTS, FILTERS, REPEATED, Task, drawn, lessons, split

from llmalign.embedded.model import build_model


def function(program: str) -> Callable[[list[int]], Any]:
    """The `f` of a program that this project wrote."""
    names: dict[str, Any] = {}
    exec(program, names)
    return names["f"]


@pytest.mark.parametrize(
    ("keys", "numbers", "expected"),
    [
        (("above 3", "add 2", "sum"), [3, 4, 9, -4], 17),
        (("below 3", "from 5", "sorted"), [3, 2, -4, 1], [3, 4, 9]),
        (("odd", "modulo 4", "count"), [1, 5, 3, -1, 8], 2),
        (("positive", "square", "backwards"), [0, 2, -3, 5], [25, 4]),
        (("even", "times 3", "largest"), [1, 3], 0),
        (("all", "less 4", "smallest"), [7, 5, 9], 1),
    ],
)
def test_tasks_by_hand(keys: tuple[str, str, str], numbers: list[int], expected: Any) -> None:
    task = Task(*keys)
    assert task.solve(numbers) == expected
    for seed in range(4):
        assert function(task.program(random.Random(seed)))(numbers) == expected


def test_words_say_what_is_asked() -> None:
    first, second = (Task("above 3", "add 2", "sum", wording).prompt.split("\n")[0] for wording in (0, 7))
    assert first == "# Keep those above 3, add 2 to each, return the sum."
    assert second == "# Drop those up to 3, raise each by 2, return the total."


def test_every_solution_passes_and_its_example_is_no_test() -> None:
    rng = random.Random(0)
    for task in [task for half in split() for task in half]:
        names: dict[str, Any] = {"f": function(task.program(rng))}
        exec(task.tests, names)
        example = task.prompt.split("\n")[1].removeprefix("# ")
        assert len(task.tests.split("\n")) == 6
        assert f"assert {example}" not in task.tests.split("\n")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "syntax"] + [REPEATED])
def test_faults_are_found_by_most_tasks_tests(fault: str) -> None:
    rng = random.Random(1)
    tasks = [task for task in split()[0] if fault != REPEATED or task.end == "count"]
    found = 0
    for task in rng.sample(tasks, 150):
        wrong = function(task.program(rng, fault))
        found += any(wrong(numbers) != answer for numbers, answer in task._cases)
    assert found >= 105


def test_a_program_without_one_sign_does_not_compile() -> None:
    rng = random.Random(2)
    for task in rng.sample(split()[0], 60):
        with pytest.raises(SyntaxError):
            compile(task.program(rng, "syntax"), "program", "exec")


def test_held_out_combinations_are_not_trained_on_but_their_parts_are() -> None:
    trained, held_out = split()
    pairs = [{(task.filter, task.change) for task in half} for half in (trained, held_out)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0] | pairs[1]) == len(FILTERS) * len(CHANGES)
    assert 0.1 < len(pairs[1]) / len(pairs[0] | pairs[1]) < 0.2
    assert {task.filter for task in trained} == set(FILTERS)
    assert {task.change for task in trained} == set(CHANGES)
    assert {task.end for task in trained} == set(ENDS)


def test_lessons_are_wrong_as_often_as_is_said() -> None:
    tasks = {task.prompt: task for half in split() for one in half for task in _worded(one)}

    def wrong(rows: list[dict[str, str]]) -> float:
        return sum(not _passes(row["completion"], tasks[row["prompt"]]) for row in rows) / len(rows)

    assert wrong(lessons(200, 3, faulty=0.0, misread=0.0)) == 0
    assert 0.75 < wrong(lessons(400, 3, faulty=1.0, misread=0.0)) < 0.98
    # Half of the tasks have a trap at most, and some of those pass by chance.
    assert 0.15 < wrong(lessons(400, 3, faulty=0.0, misread=1.0)) < 0.5


def _worded(task: Task) -> list[Task]:
    return [Task(task.filter, task.change, task.end, wording) for wording in range(8)]


def _passes(program: str, task: Task) -> bool:
    try:
        solve = function(program)
        return all(solve(numbers) == answer for numbers, answer in task._cases)
    except (SyntaxError, TypeError, ValueError):
        return False


def test_traps() -> None:
    assert Task("above 3", "same", "sum", 1).trap == "bound"
    assert Task("above 3", "same", "sum", 0).trap is None
    assert Task("even", "same", "sum", 1).trap is None
    assert Task("all", "same", "count", 0).trap == REPEATED


def test_the_judge_counts_in_the_sandbox_and_runs_nothing_twice(some_backend: str) -> None:
    judge, task = programs_models.Judge(), Task("above 3", "add 2", "sum")
    right, wrong = task.program(random.Random(0)), "def f(x):\n    return 0\n"
    passed = sum(answer == 0 for place, (_, answer) in enumerate(task._cases) if place != 1) / 6
    assert judge([task] * 4, [right, wrong, "def f(x", right]) == [1.0, passed, 0.0, 1.0]
    assert len(judge._known) == 3
    assert judge([Task("below 3", "same", "list")], [wrong]) == [0.0]
    assert len(judge._known) == 4


def test_a_sandbox_that_did_not_start_is_tried_again(some_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, task, calls = programs_models.Judge(), Task("above 3", "add 2", "sum"), []

    def stubborn(answers: list[list[float | None]]) -> None:
        def reward(prompts: list[str], programs: list[str], **columns: list[str]) -> list[float | None]:
            calls.append(programs)
            return answers.pop(0)

        monkeypatch.setattr(judge, "_reward", reward)

    stubborn([[None, 0.5], [1.0]])
    assert judge([task, task], ["a", "b"]) == [1.0, 0.5]
    assert calls == [["a", "b"], ["a"]]
    stubborn([[None]] * programs_models.ATTEMPTS)
    with pytest.raises(RuntimeError, match="did not start for 1 program"):
        judge([task], ["c"])


def test_pairs_are_what_passes_most_and_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks whose programs all pass equally many tests make no pair."""
    shares = {"a": 0.5, "b": 1.0, "c": 0.0}
    recorded = ["a", "b", "c", "b", "b", "b"]
    monkeypatch.setattr(programs_models, "write_programs", lambda *given, **options: recorded)
    tokenizer = programs_models.build_tokenizer()
    model = build_model(tokenizer, config=programs_models._config(tokenizer, 1))
    rows = programs_models.judged_pairs(
        model, tokenizer, lambda tasks, texts: [shares[text] for text in texts], tasks=2, group=3, seed=5
    )
    asked = drawn(split()[0], 2, random.Random("pairs 5"))
    assert rows == [{"prompt": asked[0].prompt, "chosen": "b", "rejected": "c"}]


def test_the_tokenizer_gives_every_program_back() -> None:
    tokenizer = programs_models.build_tokenizer()
    for row in lessons(50, 4, faulty=0.5, misread=0.5):
        asked, written = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        assert tokenizer.decode(written) == row["completion"]
        assert len(written) < programs_models.ANSWER
        assert len(asked) + programs_models.ANSWER <= programs_models.LONGEST


def test_all_methods_sample_equally_many_programs_in_equally_many_steps() -> None:
    trained = [cell for cell in programs.cells(False) if cell.method != "beforehand"]
    assert {cell.setting["prompts"] * cell.setting["group"] for cell in trained} == {120}
    assert {programs._steps_a_rollout(cell) for cell in trained} == {4}


def records(ends: dict[str, float], r2: dict[str, float]) -> list[dict[str, Any]]:
    """Cells of three seeds which end so and whose rewards are so reliable."""
    made = []
    for seed in (1, 2, 3):
        strategies = [
            {"name": name, "r2": {"value": value}, "spearman": {"value": value / 2}} for name, value in r2.items()
        ]
        found = {"strategies": strategies, "recommended": max(r2, key=lambda name: r2[name])}
        made.append({"cell": {"method": "beforehand", "seed": seed, "setting": {}}, "result": found})
        for method, end in ends.items():
            end += 0.001 * seed
            curves = {key: [0.4, end] for key in ("passed", "greedy", "share", "reward", "kl")}
            last = {f"last_{key}": end for key in programs_report.KEYS}
            result = {**curves, **last, "programs": [0, 160], "explained": [0.1, end]}
            made.append({"cell": {"method": method, "seed": seed, "setting": {}}, "result": result})
    return made


ENDED = {"ppo_s": 0.5, "ppo_m": 0.6, "best_of_n": 0.5, "best_random": 0.7, "best_worst": 0.8}
RELIABLE = {"none": 0.3, "best_of_n": 0.1, "best_random": 0.35, "best_worst": 0.4}


@pytest.mark.parametrize(
    ("ends", "r2", "holds"),
    [
        ({}, {}, True),
        ({"best_random": 0.6}, {}, False),
        ({"best_of_n": 0.65}, {}, False),
        ({"best_random": 0.9}, {}, False),
        ({}, {"none": 0.5}, False),
    ],
)
def test_the_claim_holds_only_if_all_of_it_does(ends: dict[str, float], r2: dict[str, float], holds: bool) -> None:
    outcome = programs_report.judge(records(ENDED | ends, RELIABLE | r2))
    assert outcome.holds is holds
    assert all(len(row) == len(outcome.columns) for row in outcome.rows)
