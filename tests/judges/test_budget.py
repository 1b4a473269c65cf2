"""Budgets bind over threads, calls and processes, and nothing that was paid for is lost to them."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.judges import Answer, BudgetSpent, JudgeClient, JudgeStopped
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, ask_for, completion, question

Clients = Callable[..., JudgeClient]
TEXTS = [str(number) for number in range(20)]


def test_requests_end_at_the_budget_and_go_on_when_it_is_raised(judge: ScriptedJudge, client: Clients) -> None:
    with pytest.raises(BudgetSpent) as caught:
        client(max_requests=7, budget="run 1").ask(ask_for(*TEXTS))
    said = str(caught.value)
    assert "budget 'run 1' of 7 requests is spent (7 requests and 77 tokens over all runs)" in said
    assert "7 of 20 questions are answered" in said and "raise max_requests and repeat the command" in said
    assert len(judge.bodies) == 7
    with pytest.raises(BudgetSpent, match="7 of 20 questions are answered"):
        client(max_requests=7, budget="run 1").ask(ask_for(*TEXTS))
    assert len(judge.bodies) == 7
    answers = client(max_requests=20, budget="run 1").ask(ask_for(*TEXTS))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert set(judge.counts.values()) == {1} and len(judge.bodies) == 20


def test_a_budget_that_just_suffices_is_not_spent(judge: ScriptedJudge, client: Clients) -> None:
    client(max_requests=20, max_tokens=220).ask(ask_for(*TEXTS))
    assert client(max_requests=20, max_tokens=220).ask(ask_for(*TEXTS))[0].cached
    assert client().spent == (20, 220)


def test_tokens_end_the_run_with_at_most_those_in_flight_above(judge: ScriptedJudge, client: Clients) -> None:
    asker = client(max_tokens=50, concurrency=2)
    with pytest.raises(BudgetSpent, match="of 50 tokens is spent.*raise max_tokens"):
        asker.ask(ask_for(*TEXTS))
    assert 50 <= asker.spent[1] <= 50 + 2 * 11 and asker.spent[1] == 11 * len(judge.bodies)


def test_budgets_of_other_names_and_no_limit(judge: ScriptedJudge, client: Clients) -> None:
    client(max_requests=5, budget="a").ask(ask_for(*TEXTS[:5]))
    client(max_requests=5, budget="b").ask(ask_for(*TEXTS[5:10]))
    asker = client()
    asker.ask(ask_for(*TEXTS))
    assert asker.spent == (10, 110)


def test_answers_in_flight_are_kept_when_the_budget_ends(judge: ScriptedJudge, client: Clients) -> None:
    """Four are on their way when the fifth is denied; none of the four may be lost."""
    together = threading.Barrier(3, timeout=20)

    def answer(body: dict, times: int) -> Reply:
        if question(body) != "0":
            together.wait()
        return ANSWER

    judge.answer = answer
    with pytest.raises(BudgetSpent, match="4 of 20 questions are answered"):
        client(max_requests=4, concurrency=3).ask(ask_for(*TEXTS))
    asker = client(max_requests=4)
    with pytest.raises(BudgetSpent):
        asker.ask(ask_for(*TEXTS))
    assert asker.found == 4


def test_tries_count_because_they_are_sent(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: ANSWER if times else Reply({}, status=500)
    with pytest.raises(BudgetSpent):
        client(max_requests=9, concurrency=1).ask(ask_for(*TEXTS))
    assert len(judge.bodies) == 9


def test_a_judge_that_counts_no_tokens_cannot_keep_a_budget_of_them(judge: ScriptedJudge, client: Clients) -> None:
    uncounted = completion("A", {"A": -0.2})
    del uncounted["usage"]
    judge.answer = lambda body, times: Reply(uncounted)
    with pytest.raises(JudgeStopped, match="does not report the tokens.*max_requests"):
        client(max_tokens=100).ask(ask_for(*TEXTS))
    assert len(judge.bodies) == 1
    answers = client().ask(ask_for(*TEXTS))
    assert (answers[0].cached, answers[0].prompt_tokens, len(judge.bodies)) == (True, 0, 20)


PROCESS = """
import sys
from llmalign.judges import BudgetSpent, ChatRequest, JudgeClient
url, cache, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [ChatRequest([{"role": "user", "content": str(number)}]) for number in range(first, first + 30)]
client = JudgeClient("m", url, cache=cache, max_requests=25, concurrency=4, budget="both")
try:
    client.ask(rows)
except BudgetSpent as error:
    print(error)
"""


def test_two_processes_share_one_budget(judge: ScriptedJudge, client: Clients, tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, judge.url, str(cache), str(first)], stdout=subprocess.PIPE, text=True
        )
        for first in (0, 100)
    ]
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert all("of 25 requests is spent" in text for text in said)
    assert len(judge.bodies) == 25 and set(judge.counts.values()) == {1}
    both = client(budget="both", max_requests=25)
    rows = ask_for(*map(str, [*range(30), *range(100, 130)]))
    with pytest.raises(BudgetSpent, match="25 of 60 questions are answered"):
        both.ask(rows)
