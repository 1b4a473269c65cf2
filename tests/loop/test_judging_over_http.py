"""Rounds judged by a real server, llama.cpp on the loopback: its death, its silence on log-probs, what is paid for."""

import importlib.util
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmalign.judges.cache import AnswerCache
from tests.judges.scripted import Reply, ScriptedJudge
from tests.judges.serving import LlamaServer
from tests.judges.test_real_server import forwarded, without_logprobs
from tests.loop.running import Bench, results

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs openai: llmalign[judge]")
QUESTION = "{prompt} One said: {first} Two said: {second} The best was"


@pytest.fixture(scope="module")
def server(gguf_model: Path) -> Iterator[LlamaServer]:
    running = LlamaServer(gguf_model)
    yield running
    running.kill()


@pytest.fixture
def proxy(server: LlamaServer) -> Iterator[ScriptedJudge]:
    """Before the real judge stands one that writes down what it is asked."""
    before = ScriptedJudge()
    before.answer = lambda body, times: Reply(forwarded(server.url, body))
    yield before
    before.close()


def judged_by(bench: Bench, url: str, **keys) -> None:
    (bench.folder / "question.txt").write_text(QUESTION)
    bench.write(
        oracle="judge", judge_url=url, judge_model="stories", judge_template="question.txt", judge_letters=["T", "H"],
        judge_top_logprobs=20, judge_concurrency=2, **keys,
    )  # fmt: skip


def asked(judge: ScriptedJudge) -> Counter[str]:
    """How often each question about a pair was asked; a sign of life is none."""
    questions = [body["messages"][-1]["content"] for body in judge.bodies]
    return Counter(question for question in questions if "One said" in question)


def test_comparisons_are_read_from_log_probs_and_none_is_paid_for_twice(bench: Bench, proxy: ScriptedJudge) -> None:
    judged_by(bench, proxy.url)
    result = bench.run()
    known = [p for row in bench.rows(1, "judge", "judged.jsonl") for *_, p in row["comparisons"]]
    assert len(known) == 4 * 5 and any(p not in (None, 0.0, 0.5, 1.0) for p in known)
    assert result["rounds"][2]["against_start"]["n"] > 0
    questions = asked(proxy)
    assert questions and set(questions.values()) == {1}
    bench.run()
    assert asked(proxy) == questions


@pytest.mark.slow
def test_a_judge_that_is_away_stops_the_run_and_the_same_command_goes_on(
    bench: Bench, proxy: ScriptedJudge, server: LlamaServer, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(bench, proxy.url, judge_patience=0.0)
    there = proxy.answer
    proxy.answer = lambda body, times: there(body, times) if len(proxy.bodies) < 12 else Reply({}, status=503)
    assert bench.iterate() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("llmalign: the judge") and "Traceback" not in said
    paid = AnswerCache(bench.output / "judge-answers.sqlite")
    kept = len(asked(proxy)) - 2  # those that were answered, and not the (at most two) that met the 503
    assert paid.spent(str(bench.output.resolve()))[0] >= kept > 0
    first = asked(proxy)
    proxy.answer = there
    bench.run()
    again = [question for question, times in asked(proxy).items() if times > first[question] > 0]
    assert len(again) <= 2 + 1  # in flight, and the one whose last try the sign of life allows


@pytest.mark.slow
def test_killed_and_started_again_in_the_middle_it_loses_nothing(
    bench: Bench,
    gguf_model: Path,
    tmp_path: Path,
) -> None:
    server = LlamaServer(gguf_model)
    judged_by(bench, f"{server.url}/v1", judge_patience=60.0)
    status: list[int] = []
    running = threading.Thread(target=lambda: status.append(bench.iterate()))
    running.start()
    answers = bench.output / "judge-answers.sqlite"
    budget = str(bench.output.resolve())
    while not answers.is_file() or AnswerCache(answers).spent(budget)[0] < 8:
        time.sleep(0.005)
    server.kill()
    again = LlamaServer(gguf_model, server.port)
    running.join(300)
    disturbed = results(bench.output)
    other = Bench(tmp_path / "other", bench.model)
    judged_by(other, f"{again.url}/v1")
    other.run()
    again.kill()
    assert status == [0]
    for name in ("round-0/evaluate/samples.jsonl", "round-1/sample/samples.jsonl"):
        assert disturbed[name] == results(other.output)[name]
    rows = bench.rows(1, "judge", "judged.jsonl")
    assert all(p is not None for row in rows for *_, p in row["comparisons"])
    # The two servers are two processes: their log-probs agree to what float32 keeps.
    for row, same in zip(rows, other.rows(1, "judge", "judged.jsonl"), strict=True):
        for (*pair, p), (*other_pair, q) in zip(row["comparisons"], same["comparisons"], strict=True):
            assert pair == other_pair and p == pytest.approx(q, abs=1e-3)


def test_a_judge_without_log_probs_is_named_after_one_request(
    bench: Bench, proxy: ScriptedJudge, server: LlamaServer, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.answer = lambda body, times: Reply(without_logprobs(forwarded(server.url, body)))
    judged_by(bench, proxy.url)
    assert bench.iterate() == 2
    assert "returns no log-probs" in capsys.readouterr().err
    assert len(proxy.bodies) == 1


def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(
    bench: Bench, proxy: ScriptedJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(bench, proxy.url, judge_max_requests=5)
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert "budget" in said and len(proxy.bodies) == 5
    judged_by(bench, proxy.url, judge_max_requests=1000)
    bench.run()
    assert set(asked(proxy).values()) == {1}


def test_a_key_that_is_missing_is_asked_for_before_anything_is_sampled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    bench.write(oracle="judge", judge_url="https://judge.example/v1", judge_model="m", judge_api_key_env="SOME_KEY")
    assert bench.iterate() == 2
    assert "SOME_KEY" in capsys.readouterr().err
    assert not list(bench.output.glob("round-*"))
