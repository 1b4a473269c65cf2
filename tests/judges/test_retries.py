"""What is tried again, for how long, and what is a row's own fault."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial

import pytest

from llmalign.errors import UserError
from llmalign.judges import Answer, Failure, JudgeClient, JudgeStopped
from llmalign.judges import client as judges_client
from llmalign.judges.endpoint import _retry_after
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, ask_for, completion, question

Clients = Callable[..., JudgeClient]
TEXTS = [str(number) for number in range(12)]
PASSING = {
    "429": Reply({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0"}),
    "408": Reply({}, status=408),
    "409": Reply({}, status=409),
    "500": Reply({"error": "broken"}, status=500),
    "502, a page": Reply(b"<html>Bad Gateway</html>", status=502, headers={"Content-Type": "text/html"}),
    "503": Reply({}, status=503, headers={"Retry-After": "0.01"}),
    "cut in the middle": Reply(completion("A", {"A": -0.2}), cut=40),
    "cut before the body": Reply(completion("A", {"A": -0.2}), cut=0),
    "half a JSON": Reply(b'{"choices": [{"message"'),
    "a page": Reply(b"<html>login</html>", headers={"Content-Type": "text/html"}),
    "no JSON": Reply(b"\xff\xfe\x00"),
    "no choices": Reply({"choices": []}),
    "an error with status 200": Reply({"error": {"message": "upstream is busy"}}),
    "null": Reply(b"null"),
    "a message that is no text": Reply({"choices": [{"message": {"content": [{"type": "text"}]}}]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again_and_loses_nothing(judge: ScriptedJudge, client: Clients, kind: str) -> None:
    """Every question meets the trouble once."""
    judge.answer = lambda body, times: ANSWER if times else PASSING[kind]
    asker = client()
    answers = asker.ask(ask_for(*TEXTS))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert set(judge.counts.values()) == {2}
    assert (asker.asked, asker.sent, asker.failed) == (12, 24, 0)
    assert asker.spent[0] == len(judge.bodies)
    again = client()
    again.ask(ask_for(*TEXTS))
    assert (again.found, len(judge.bodies)) == (12, 24), "each is kept"


@pytest.mark.parametrize("kind", ["half a JSON", "no choices", "an error with status 200"])
def test_an_answer_that_can_never_be_read_costs_its_row_alone(judge: ScriptedJudge, client: Clients, kind: str) -> None:
    judge.answer = lambda body, times: PASSING[kind] if question(body) == "bad" else ANSWER
    good, bad = client().ask(ask_for("good", "bad"))
    assert isinstance(good, Answer)
    assert isinstance(bad, Failure) and bad.message.endswith("3 times")
    assert judge.questions.count("bad") == 3


@pytest.mark.parametrize("kind", ["500", "cut in the middle"])
def test_a_row_that_the_judge_cannot_digest_fails_alone(judge: ScriptedJudge, client: Clients, kind: str) -> None:
    """Also where it is the only one left, as in every later run: else no run would ever end."""
    judge.answer = lambda body, times: PASSING[kind] if question(body) == "bad" else ANSWER
    for _ in range(2):
        results = client(patience=0.1).ask(ask_for("a", "bad", "b"))
        assert [type(result) for result in results] == [Answer, Failure, Answer]
        assert "though others are answered" in results[1].message
    assert judge.questions.count("a") == judge.questions.count("b") == 1


def test_a_judge_that_stays_dead_stops_everything(client: Clients, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        asker = client(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", patience=0.2, max_requests=1)
        with caplog.at_level(logging.WARNING), pytest.raises(JudgeStopped, match="repeat the command when it is back"):
            asker.ask(ask_for(*TEXTS))
    assert asker.spent == (0, 0) and asker.sent == 0, "what never left is not on the books"
    assert len([record for record in caplog.records if "does not answer" in record.message]) == 1


def test_a_judge_that_dies_for_good_keeps_what_it_answered(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: ANSWER if len(judge.bodies) <= 5 else Reply({}, status=503)
    with pytest.raises(JudgeStopped, match="HTTP 503"):
        client(patience=0.2, concurrency=2).ask(ask_for(*TEXTS))
    before = len(judge.bodies)
    judge.answer = lambda body, times: ANSWER
    client().ask(ask_for(*TEXTS))
    assert len(judge.bodies) - before == 12 - 5


def test_an_answer_that_takes_too_long_is_asked_for_again(judge: ScriptedJudge, client: Clients) -> None:
    release = threading.Event()

    def answer(body: dict, times: int) -> Reply:
        if question(body) == "3" and not times:
            release.wait(20)
        return ANSWER

    judge.answer = answer
    answers = client(timeout=0.3).ask(ask_for(*TEXTS))
    release.set()
    assert all(isinstance(one, Answer) for one in answers)
    assert judge.questions.count("3") == 2


def test_who_is_told_to_wait_speaks_for_all(judge: ScriptedJudge, client: Clients) -> None:
    """Once one request is told to wait, none is sent before that time is over, whichever worker has it."""
    asker = client(concurrency=3)
    asker.ask(ask_for("warm"))
    sent: dict[str, float] = {}

    def answer(body: dict, times: int) -> Reply:
        sent.setdefault(question(body), time.monotonic())
        if question(body) == "0" and not times:
            return Reply({}, status=429, headers={"Retry-After": "0.4"})
        while asker._pause_until < 0:
            time.sleep(0.005)  # the others are busy until the first has been told
        return ANSWER

    judge.answer = answer
    asker.ask(ask_for(*TEXTS))
    assert min(sent[text] for text in TEXTS[3:]) - sent["0"] >= 0.4
    assert len(judge.bodies) == 1 + len(TEXTS) + 1


def test_a_wait_beyond_patience_is_said_at_once(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply({}, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(JudgeStopped, match="asking to wait 3600 s"):
        client().ask(ask_for("x"))
    assert len(judge.bodies) == 1


@pytest.mark.parametrize(
    "said, seconds",
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("nan", None), ("soon", None), ("inf", None), (formatdate(0), 0.0)],
)
def test_retry_after_in_all_its_forms(said: str, seconds: float | None) -> None:
    assert _retry_after({"retry-after": said}) == seconds


def test_retry_after_as_a_date() -> None:
    assert 20 < _retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30


@pytest.mark.parametrize(
    "reply, said",
    [
        (Reply({"error": {"message": "no"}}, status=404), "does not know the model 'm', or base_url is wrong"),
        (Reply({"error": {"message": "top up"}}, status=402), "wants to be paid first"),
        (Reply({"error": {"code": "insufficient_quota", "message": "x"}}, status=429), "wants to be paid first"),
        (Reply({}, status=405), "cannot be asked"),
        (Reply({}, status=401), "without an API key; put one into the environment variable OPENAI_API_KEY"),
    ],
)
def test_what_will_not_pass_stops_at_once(judge: ScriptedJudge, client: Clients, reply: Reply, said: str) -> None:
    judge.answer = lambda body, times: reply
    with pytest.raises(UserError, match=said):
        client().ask(ask_for(*TEXTS))
    assert len(judge.bodies) == 1


def test_a_stop_in_the_middle_keeps_answers_in_flight(judge: ScriptedJudge, client: Clients) -> None:
    """Three are being answered when a fourth is refused: they are waited for and kept."""
    together = threading.Barrier(4, timeout=20)

    def answer(body: dict, times: int) -> Reply:
        if question(body) == "0":
            return ANSWER
        together.wait()
        if question(body) == "4":
            return Reply({}, status=403)
        while sum(thread.name.startswith("judge") for thread in threading.enumerate()) > 3:
            time.sleep(0.005)  # until the refusal has arrived, and who got it is gone
        return ANSWER

    judge.answer = answer
    with pytest.raises(JudgeStopped, match="HTTP 403"):
        client(concurrency=4).ask(ask_for(*TEXTS))
    assert sorted(judge.questions) == ["0", "1", "2", "3", "4"]
    judge.answer = lambda body, times: ANSWER
    asker = client()
    asker.ask(ask_for(*TEXTS))
    assert asker.found == 4


def test_an_interrupt_keeps_answers_in_flight(
    judge: ScriptedJudge, client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does it: nothing more is sent, and the question that is being answered is waited for."""

    def answer(body: dict, times: int) -> Reply:
        if question(body) == "3":
            os.kill(os.getpid(), signal.SIGINT)
        if int(question(body)) >= 3:
            assert halted.wait(20), "the interrupt did not arrive"
        return ANSWER

    halted = threading.Event()
    judge.answer = answer
    before_it = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests ignore it
    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(judges_client, "_Call", partial(judges_client._Call, halted=halted))
            client(concurrency=2).ask(ask_for(*TEXTS))
    finally:
        signal.signal(signal.SIGINT, before_it)
    before = len(judge.bodies)
    assert before < len(TEXTS)
    resumed = client()
    resumed.ask(ask_for(*TEXTS))
    assert resumed.found == before


def test_text_that_cannot_be_sent_costs_its_row_alone(judge: ScriptedJudge, client: Clients) -> None:
    bad, good = client().ask(ask_for("half a pair: \ud83d", "good"))
    assert isinstance(bad, Failure) and "no text" in bad.message
    assert isinstance(good, Answer) and judge.questions == ["good"]
