"""The client asks once, remembers, and keeps to its concurrency."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.judges import Answer, ChatRequest, Failure, JudgeClient
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, ask_for, completion, question

Clients = Callable[..., JudgeClient]


def test_an_answer_is_read_whole(judge: ScriptedJudge, client: Clients) -> None:
    (answer,) = client().ask(ask_for("which?"))
    assert answer == Answer("A", {"A": -0.2, "B": -1.8}, prompt_tokens=10, completion_tokens=1, cached=False)
    assert judge.paths == ["/v1/chat/completions"]
    assert judge.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "which?"}],
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 5,
        }
    ]


def test_identical_requests_are_sent_once_and_answers_keep_their_order(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(completion(question(body).upper(), {"A": -1.0}))
    asker = client()
    answers = asker.ask(ask_for("x", "y", "x", "z", "y"))
    assert [answer.text for answer in answers] == ["X", "Y", "X", "Z", "Y"]
    assert sorted(judge.questions) == ["x", "y", "z"]
    assert (asker.asked, asker.found, asker.failed, asker.sent, asker.tokens) == (3, 0, 0, 3, 33)


def test_the_cache_answers_the_second_time_without_key_or_network(judge: ScriptedJudge, client: Clients) -> None:
    first = client().ask(ask_for("x", "y"))
    judge.answer = lambda body, times: pytest.fail("asked again")
    again = client(max_requests=0)
    second = again.ask(ask_for("y", "x"))
    assert [answer.cached for answer in second] == [True, True]
    assert [(a.text, a.first_token_logprobs) for a in second] == [(a.text, a.first_token_logprobs) for a in first]
    assert (again.asked, again.found, again.sent) == (0, 2, 0)


def test_what_another_client_has_paid_for_meanwhile_is_not_asked(judge: ScriptedJudge, client: Clients) -> None:
    first, second = client(), client()

    def answer(body: dict, times: int) -> Reply:
        if question(body) == "0":
            second.ask(ask_for("1"))
        return ANSWER

    judge.answer = answer
    assert [answer.cached for answer in first.ask(ask_for("0", "1", "2"))] == [False, True, False]
    assert sorted(judge.questions) == ["0", "1", "2"]
    assert (first.asked, first.found) == (2, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 2}, {"temperature": 0.5, "seed": 0}, {"seed": 1}, {"top_logprobs": 4}, {"top_logprobs": None},
    ],
)  # fmt: skip
def test_every_parameter_is_part_of_the_question(judge: ScriptedJudge, client: Clients, change: dict) -> None:
    asker = client()
    asker.ask(ask_for("x"))
    asker.ask(ask_for("x", **change))
    assert len(judge.bodies) == 2 and len(judge.counts) == 2


def test_role_model_endpoint_and_extra_parameters_are_part_of_the_question(
    judge: ScriptedJudge, client: Clients, tmp_path: Path
) -> None:
    client().ask(ask_for("x"))
    client().ask([ChatRequest([{"role": "system", "content": "x"}])])
    client(extra_body={"chat_template_kwargs": {"enable_thinking": False}}).ask(ask_for("x"))
    client(base_url=judge.url.replace("127.0.0.1", "localhost")).ask(ask_for("x"))
    with JudgeClient("another", judge.url, cache=tmp_path / "answers.sqlite") as other:
        other.ask(ask_for("x"))
    assert len(judge.bodies) == 5
    client(base_url=judge.url + "/").ask(ask_for("x"))
    assert len(judge.bodies) == 5


def test_extra_parameters_replace_and_remove(judge: ScriptedJudge, client: Clients) -> None:
    asker = client(extra_body={"max_tokens": None, "max_completion_tokens": 4, "temperature": None})
    for _ in range(2):
        asker.ask(ask_for("x"))
    assert judge.bodies[0]["max_completion_tokens"] == 4
    assert not {"max_tokens", "temperature"} & set(judge.bodies[0])
    assert len(judge.bodies) == 2, "without a temperature the judge draws as it likes, and no draw is kept"


@pytest.mark.parametrize("seed, sent, kept", [(None, 2, 0), (7, 1, 1)])
def test_a_draw_is_kept_only_with_its_seed(
    judge: ScriptedJudge, client: Clients, tmp_path: Path, seed: int | None, sent: int, kept: int
) -> None:
    for _ in range(2):
        client().ask(ask_for("x", temperature=0.7, seed=seed))
    assert len(judge.bodies) == sent
    with sqlite3.connect(tmp_path / "answers.sqlite") as reader:
        assert reader.execute("SELECT count(*) FROM answers").fetchone() == (kept,)
    reader.close()


def test_a_question_without_log_probs_gets_none(judge: ScriptedJudge, client: Clients) -> None:
    (answer,) = client().ask(ask_for("x", top_logprobs=None))
    assert answer.first_token_logprobs is None and "logprobs" not in judge.bodies[0]


def test_concurrency_is_used_and_kept(judge: ScriptedJudge, client: Clients) -> None:
    together = threading.Barrier(4, timeout=20)

    def answer(body: dict, times: int) -> Reply:
        if question(body) != "0":
            together.wait()  # breaks unless four are here at once
        return ANSWER

    judge.answer = answer
    answers = client(concurrency=4).ask(ask_for(*map(str, range(13))))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert judge.most_busy == 4


def test_the_first_question_goes_alone(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply({"error": {"message": "no such model"}}, status=404)
    with pytest.raises(UserError, match="does not know the model 'm'"):
        client().ask(ask_for(*map(str, range(50))))
    assert len(judge.bodies) == 1


def test_a_bad_request_costs_its_row_alone_and_is_asked_again_next_time(judge: ScriptedJudge, client: Clients) -> None:
    def answer(body: dict, times: int) -> Reply:
        too_long = len(question(body)) > 10
        return Reply({"error": {"message": "9000 tokens exceed the context"}}, status=400) if too_long else ANSWER

    judge.answer = answer
    asker = client()
    rows = ask_for("x" * 11, "a", "y" * 11, "b")
    first, second, third, fourth = asker.ask(rows)
    assert first == third == Failure("HTTP 400: 9000 tokens exceed the context")
    assert isinstance(second, Answer) and isinstance(fourth, Answer)
    assert (asker.asked, asker.failed, len(judge.bodies)) == (4, 2, 4)
    client().ask(rows)
    assert sorted(judge.counts.values()) == [1, 1, 2, 2]


def test_a_withheld_answer_is_a_failure(judge: ScriptedJudge, client: Clients) -> None:
    withheld = completion("", {"A": -1.0})
    withheld["choices"][0]["finish_reason"] = "content_filter"
    judge.answer = lambda body, times: Reply(withheld) if question(body) == "bad" else ANSWER
    for _ in range(2):
        bad, good = client().ask(ask_for("bad", "good"))
        assert bad == Failure("the judge's provider withheld the answer (content filter)")
        assert isinstance(good, Answer)
    assert judge.questions.count("bad") == 2 and judge.questions.count("good") == 1


@pytest.mark.parametrize("logprobs", ["null", "absent", "only the drawn token"])
def test_a_judge_without_log_probs_is_found_out_by_the_first_answer(
    judge: ScriptedJudge, client: Clients, logprobs: str
) -> None:
    body = completion("A")
    if logprobs == "absent":
        del body["choices"][0]["logprobs"]
    elif logprobs == "only the drawn token":
        body["choices"][0]["logprobs"] = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": []}]}
    judge.answer = lambda _, times: Reply(body)
    with pytest.raises(UserError, match="returns no log-probs.*answers: text"):
        client().ask(ask_for(*map(str, range(20))))
    assert len(judge.bodies) == 1
    judge.answer = lambda _, times: ANSWER
    assert all(isinstance(answer, Answer) for answer in client().ask(ask_for("0", "1"))), "it was no answer to keep"


def test_one_answer_without_log_probs_among_others_is_a_failure(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(completion("sorry")) if question(body) == "b" else ANSWER
    a, b = client().ask(ask_for("a", "b"))
    assert isinstance(a, Answer) and isinstance(b, Failure) and "no log-probs" in b.message


def test_an_answer_that_ends_at_once_has_no_tokens(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(completion(""))
    (answer,) = client().ask(ask_for("a"))
    assert isinstance(answer, Answer) and answer.first_token_logprobs == {}


def test_a_refusal_without_content_is_an_empty_text(judge: ScriptedJudge, client: Clients) -> None:
    body = completion("")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "no"}
    judge.answer = lambda _, times: Reply(body)
    (answer,) = client().ask(ask_for("a", top_logprobs=None))
    assert isinstance(answer, Answer) and answer.text == ""


def test_nothing_to_ask(judge: ScriptedJudge, client: Clients) -> None:
    assert client().ask([]) == [] and not judge.bodies


def test_the_progress_bar_counts(judge: ScriptedJudge, client: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    judge.answer = lambda body, times: Reply({}, status=400) if question(body) == "c" else ANSWER
    client().ask(ask_for("a"))
    assert capsys.readouterr().err == ""
    client().ask(ask_for("a", "b", "c", "d"), progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "asked=3, cached=1, failed=1" in shown and "tokens/s" not in shown
    client(who="model").ask(ask_for("e"), progress=True)
    assert "Asking" in (shown := capsys.readouterr().err) and "tokens/s=" in shown


def test_text_of_any_kind_passes_through(judge: ScriptedJudge, client: Clients) -> None:
    text = 'ünï \u2028 \x00 \U0001f600 {braces} \\ "'
    judge.answer = lambda body, times: Reply(completion(question(body), {"A": -1.0}))
    assert client().ask(ask_for(text))[0].text == text
    assert client().ask(ask_for(text))[0].text == text and len(judge.bodies) == 1


@pytest.mark.parametrize(
    "options, said",
    [
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"timeout": 0}, "timeout > 0"),
        ({"patience": -1}, "patience >= 0"),
        ({"max_requests": -1}, "at least 0"),
        ({"base_url": "127.0.0.1:8000"}, "begins with http"),
        ({"base_url": "http://user:secret@host/v1"}, "holds no user, password or parameters"),
        ({"base_url": "http://host/v1?key=secret"}, "holds no user, password or parameters"),
    ],
)
def test_settings_that_cannot_be_meant(client: Clients, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        client(**options)
    assert "secret" not in str(caught.value)
