"""The API key goes to the judge and nowhere else."""

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.judges import Answer, Failure, JudgeClient
from llmalign.judges.endpoint import Endpoint
from tests.judges.scripted import ANSWER, Reply, ScriptedJudge, ask_for

Clients = Callable[..., JudgeClient]
KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 405, 429, 500])
def test_the_key_is_never_shown(
    judge: ScriptedJudge,
    client: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    status: int,
) -> None:
    """Also where the server repeats it, in any kind of answer, with every logger at its most talkative."""
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    echo = Reply({"error": {"message": f"your key {KEY} in Bearer {KEY}"}}, status=status)
    judge.answer = lambda body, times: ANSWER if status == 200 else echo
    asker = client(api_key_env="MY_JUDGE_KEY", patience=0.05)
    shown = [repr(asker), str(asker)]
    with caplog.at_level(logging.DEBUG):
        try:
            shown += map(repr, asker.ask(ask_for("x"), progress=True))
        except UserError as error:
            shown += traceback.format_exception(error)
            assert status != 400, "a bad request stops nothing"
            if status in (401, 403):
                assert "MY_JUDGE_KEY" in str(error)
    asker.close()
    assert judge.headers[0]["authorization"] == f"Bearer {KEY}"
    assert caplog.records, "the HTTP library does log"
    shown += [record.getMessage() for record in caplog.records] + list(capfd.readouterr())
    assert KEY not in "\n".join(shown)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_the_key_comes_from_the_named_variable(
    judge: ScriptedJudge, client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the default")
    monkeypatch.setenv("ANOTHER", f" {KEY}\n")
    client().ask(ask_for("a"))
    client(api_key_env="ANOTHER").ask(ask_for("b"))
    client(api_key_env=None).ask(ask_for("c"))
    sent = [headers["authorization"] for headers in judge.headers]
    assert sent == ["Bearer the default", f"Bearer {KEY}", "Bearer none"]


def test_a_server_elsewhere_needs_a_key(tmp_path: Path) -> None:
    with JudgeClient("m", "https://judge.invalid/v1", cache=tmp_path / "c.sqlite", api_key_env="NOT_SET") as asker:
        with pytest.raises(UserError, match="environment variable NOT_SET, or set api_key_env to null"):
            asker.check()
    with JudgeClient("m", "https://judge.invalid/v1", cache=tmp_path / "c.sqlite", api_key_env=None) as asker:
        asker.check()


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}é"])
def test_a_key_that_cannot_be_one_is_not_quoted(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("BROKEN_KEY", key)
    with pytest.raises(UserError, match="BROKEN_KEY holds characters that no API key has") as caught:
        Endpoint("http://127.0.0.1:1/v1", "m", api_key_env="BROKEN_KEY", timeout=1).connect()
    assert KEY not in str(caught.value)


def test_a_proxy_for_the_outside_is_not_asked_for_the_loopback(
    judge: ScriptedJudge, client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    (answer,) = client(patience=0.1).ask(ask_for("x"))
    assert isinstance(answer, Answer)


def test_what_a_server_says_is_one_short_line(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(b"<html>\n" + b"word " * 5000, status=400)
    (failure,) = client().ask(ask_for("x"))
    assert isinstance(failure, Failure) and len(failure.message) < 400 and "\n" not in failure.message


def test_a_missing_package_is_named(client: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'llmalign\[judge\]'"):
        client().ask(ask_for("x"))
