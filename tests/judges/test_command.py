"""`llmalign judge` from end to end: a scripted endpoint that fails in every way, and a real server that dies."""

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from llmalign.cli import main
from llmalign.evaluation.annotations import read_annotations, write_json
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, completion
from tests.judges.serving import LlamaServer

ROWS = 200


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Arguments of the command: two models' answers to 200 instructions, five of them alike."""
    for name, text in (("outputs", "It is a {}."), ("reference", "A {} it was.")):
        rows = [
            {"instruction": f"Tell me of {i}", "output": "same" if i < 5 else text.format(i), "generator": name}
            for i in range(ROWS)
        ]
        write_json(tmp_path / f"{name}.json", rows)
    (tmp_path / "template.txt").write_text("{prompt} One: {first} Two: {second}")
    return [
        "judge", str(tmp_path / "outputs.json"), "--reference", str(tmp_path / "reference.json"),
        "--out", str(tmp_path / "annotations.json"), "--template", str(tmp_path / "template.txt"), "--judge", "m",
        "--api_key_env", "",
    ]  # fmt: skip


def test_errors_of_a_server_lose_no_row_and_cost_nothing_twice(
    files: list[str], judge: ScriptedJudge, tmp_path: Path
) -> None:
    """Every third question meets a 429 or a 500 first; each is answered once in the end."""

    def answer(body: dict, times: int) -> Reply:
        number = int("".join(filter(str.isdigit, body["messages"][-1]["content"].split(" One:")[0])))
        if times == 0 and number % 3 == 0:
            return Reply({"error": "later"}, 429 if number % 2 else 500, {"retry-after": "0.01"})
        return ANSWER

    judge.answer = answer
    assert main([*files, "--url", judge.url]) == 0
    rows = read_annotations(tmp_path / "annotations.json")
    assert len(rows) == ROWS and all(row["preference"] is not None for row in rows)
    assert sum(row["preference"] == 1.5 for row in rows) == 5
    failing = sum(number % 3 == 0 for number in range(5, ROWS))
    assert len(judge.bodies) == ROWS - 5 + failing
    before = len(judge.bodies)
    assert main([*files, "--url", judge.url]) == 0
    assert len(judge.bodies) == before


def test_rows_that_are_refused_are_counted_and_asked_again(
    files: list[str], judge: ScriptedJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {"Tell me of 7", "Tell me of 8"}
    judge.answer = lambda body, times: (
        Reply({"error": {"message": "no"}}, 400) if body["messages"][-1]["content"].split(" One:")[0] in bad else ANSWER
    )
    assert main([*files, "--url", judge.url]) == 0
    rows = read_annotations(tmp_path / "annotations.json")
    assert [row["instruction"] for row in rows if row["preference"] is None] == ["Tell me of 7", "Tell me of 8"]
    assert "2 rows have no result" in caplog.text
    asked = len(judge.bodies)
    judge.answer = lambda body, times: ANSWER
    assert main([*files, "--url", judge.url]) == 0
    assert len(judge.bodies) == asked + 2
    assert all(row["preference"] is not None for row in read_annotations(tmp_path / "annotations.json"))


def test_a_judge_without_log_probs_is_told_of_and_read_as_text(
    files: list[str], judge: ScriptedJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.answer = lambda body, times: Reply(completion("B"))
    assert main([*files, "--url", judge.url]) == 2
    assert "returns no log-probs" in capsys.readouterr().err and len(judge.bodies) == 1
    assert main([*files, "--url", judge.url, "--answers", "text"]) == 0
    assert {row["preference"] for row in read_annotations(tmp_path / "annotations.json")} == {1.0, 1.5, 2.0}


def test_the_first_rows_alone(files: list[str], judge: ScriptedJudge, tmp_path: Path, caplog) -> None:
    """What was not to be judged is not missed; judging more later keeps these, and fewer loses none unasked."""
    arguments = [*files, "--url", judge.url]
    assert main([*arguments, "--max_rows", "12"]) == 0
    assert len(read_annotations(tmp_path / "annotations.json")) == 12 and len(judge.bodies) == 7
    assert "have no output" not in caplog.text
    assert main([*arguments, "--max_rows", "15"]) == 0 and len(judge.bodies) == 10
    assert main([*arguments, "--max_rows", "12"]) == 2
    assert main([*arguments, "--max_rows", "12", "--overwrite"]) == 0 and len(judge.bodies) == 10


def test_a_spent_budget_stops_and_goes_on(files: list[str], judge: ScriptedJudge, tmp_path: Path) -> None:
    judge.answer = lambda body, times: ANSWER
    assert main([*files, "--url", judge.url, "--max_requests", "50"]) == 2
    assert len(judge.bodies) == 50
    assert main([*files, "--url", judge.url, "--max_requests", "500"]) == 0
    assert len(judge.bodies) == ROWS - 5


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "say where with --url"),
        (["--url", "http://127.0.0.1:9/v1", "--function", "a.py:b"], "name one judge"),
        (["--url", "http://127.0.0.1:9/v1", "--max_rows", "0"], "--max_rows is at least 1"),
        (["--url", "http://127.0.0.1:9/v1", "--typo", "1"], "does not know --typo 1"),
    ],
)
def test_what_cannot_be_meant_is_said(
    files: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_function_judges(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(
        "def shorter(prompts, first, second):\n    return [float(len(a) < len(b)) for a, b in zip(first, second)]\n"
    )
    arguments = [word for word in files if word not in ("--judge", "m", "--template", str(tmp_path / "template.txt"))]
    arguments = [word for word in arguments if word not in ("--api_key_env", "")]
    assert main([*arguments, "--function", f"{tmp_path}/judges.py:shorter"]) == 0
    rows = read_annotations(tmp_path / "annotations.json")
    assert {row["preference"] for row in rows} == {1.5, 2.0} and rows[9]["annotator"].startswith("shorter-")


def test_a_real_server_that_is_killed_and_restarted(files: list[str], gguf_model: Path, tmp_path: Path) -> None:
    server = LlamaServer(gguf_model)
    answers = tmp_path / "judge-answers.sqlite"

    def kept() -> int:
        if not answers.is_file():
            return 0
        with sqlite3.connect(answers) as reader:
            tables = reader.execute("SELECT count(*) FROM sqlite_master WHERE name = 'answers'").fetchone()[0]
            return reader.execute("SELECT count(*) FROM answers").fetchone()[0] if tables else 0

    at_death: list[int] = []

    def interrupt() -> None:
        while kept() < 40:
            time.sleep(0.01)
        server.kill()
        at_death.append(kept())
        restarted.append(LlamaServer(gguf_model, server.port))

    restarted: list[LlamaServer] = []
    killer = threading.Thread(target=interrupt)
    killer.start()
    try:
        status = main([*files, "--url", f"{server.url}/v1", "--top_logprobs", "512", "--patience", "60"])
    finally:
        killer.join()
        for one in restarted:
            one.kill()
    assert status == 0 and 40 <= at_death[0] < ROWS - 5
    rows = read_annotations(tmp_path / "annotations.json")
    assert len(rows) == ROWS and all(row["preference"] is not None for row in rows)
    assert kept() == ROWS - 5
    # Answered questions are asked no more: the same command needs no server.
    assert main([*files, "--url", f"{server.url}/v1", "--top_logprobs", "512"]) == 0
    assert json.loads((tmp_path / "annotations.json").read_text()) == rows
