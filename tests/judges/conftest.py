"""What the judge's tests share: scripted endpoints, clients of them, and the tiny model of the real server."""

import importlib.util
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llmalign.judges import JudgeClient
from tests.judges.scripted import ScriptedJudge


@pytest.fixture(autouse=True)
def _needs_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("openai") is None:
        pytest.skip("needs the openai package: pip install 'llmalign[judge]'")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge() -> Iterator[ScriptedJudge]:
    """An endpoint that gives every question the same answer until a test says otherwise."""
    served = ScriptedJudge()
    yield served
    served.close()


@pytest.fixture
def client(
    judge: ScriptedJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., JudgeClient]]:
    """Makes clients of `judge` with short waits, all on one cache file."""
    import openai

    # Nothing here speaks TLS, and every client would read all certificates, which takes longer than most tests.
    no_certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(openai, "DefaultHttpxClient", partial(openai.DefaultHttpxClient, verify=no_certificates))
    made: list[JudgeClient] = []

    def make(**options) -> JudgeClient:
        settings = {"cache": tmp_path / "answers.sqlite", "backoff": 0.01, "patience": 20.0, "timeout": 20.0, **options}
        made.append(JudgeClient("m", settings.pop("base_url", judge.url), **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
