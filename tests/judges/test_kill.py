"""SIGKILL at any instant: the file stays whole, and only what was in flight is asked again."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.judges import Answer, JudgeClient
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, ask_for

Clients = Callable[..., JudgeClient]
ROWS, CONCURRENCY = 60, 4

PROCESS = """
import sys
from llmalign.judges import ChatRequest, JudgeClient
rows = [ChatRequest([{"role": "user", "content": str(number)}]) for number in range(int(sys.argv[3]))]
print(flush=True)
JudgeClient("m", sys.argv[1], cache=sys.argv[2], concurrency=int(sys.argv[4])).ask(rows)
"""


def killed_at(judge: ScriptedJudge, cache: Path, request: int) -> None:
    """Start a process that asks `ROWS` questions, and kill it the moment its request of that number arrives."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, judge.url, str(cache), str(ROWS), str(CONCURRENCY)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()

    def answer(body: dict, times: int) -> Reply:
        if len(judge.bodies) >= request:
            os.kill(process.pid, signal.SIGKILL)
        return ANSWER

    judge.answer = answer
    assert process.wait(timeout=120) == -signal.SIGKILL
    process.stdout.close()
    judge.answer = lambda body, times: ANSWER


def check_whole(judge: ScriptedJudge, client: Clients, cache: Path) -> None:
    with sqlite3.connect(cache) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = reader.execute("SELECT count(*) FROM answers").fetchone()[0]
    reader.close()
    reached = len(judge.bodies)
    assert reached - CONCURRENCY <= kept <= reached
    asker = client(cache=cache)
    assert asker.spent[0] >= reached, "what was sent is on the books before it leaves"
    answers = asker.ask(ask_for(*map(str, range(ROWS))))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert asker.found == kept and len(judge.bodies) == reached + ROWS - kept
    assert len(judge.counts) == ROWS and max(judge.counts.values()) <= 2
    assert sum(times - 1 for times in judge.counts.values()) <= CONCURRENCY


def test_killed_in_the_middle(judge: ScriptedJudge, client: Clients, tmp_path: Path) -> None:
    killed_at(judge, tmp_path / "answers.sqlite", 25)
    check_whole(judge, client, tmp_path / "answers.sqlite")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_request(judge: ScriptedJudge, client: Clients, tmp_path: Path, seed: int) -> None:
    killed_at(judge, tmp_path / "answers.sqlite", random.Random(seed).randint(1, ROWS - CONCURRENCY))
    check_whole(judge, client, tmp_path / "answers.sqlite")


@pytest.mark.slow
def test_killed_again_and_again(judge: ScriptedJudge, client: Clients, tmp_path: Path) -> None:
    """Two kills repeat at most what each had in flight."""
    cache = tmp_path / "answers.sqlite"
    killed_at(judge, cache, 15)
    killed_at(judge, cache, 40)
    client(cache=cache).ask(ask_for(*map(str, range(ROWS))))
    assert len(judge.counts) == ROWS
    assert sum(times - 1 for times in judge.counts.values()) <= 2 * CONCURRENCY
