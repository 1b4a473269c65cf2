"""`llmalign generate` by an endpoint: the answers that came are kept, those that failed are asked for again."""

import json
from pathlib import Path

import pytest

from llmalign.cli import main
from llmalign.evaluation.generate import Prompt, Sampling, generate_remotely
from llmalign.judges import ChatRequest
from llmalign.judges.endpoint import Endpoint
from tests.judges.scripted import Reply, ScriptedJudge, completion


def test_failed_prompts_are_asked_again(judge: ScriptedJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    judge.answer = lambda body, times: (
        Reply({"error": "no"}, 400) if body["messages"][-1]["content"] == "two" else Reply(completion("an answer"))
    )
    arguments = ["generate", "m", "--url", judge.url, "--prompts", str(tmp_path / "p.txt"), "--api_key_env", ""]
    arguments += ["--out", str(tmp_path / "o.json"), "--system", "be brief", "--temperature", "0.7"]
    assert main(arguments) == 1
    assert "1 prompts have no answer" in caplog.text
    judge.answer = lambda body, times: Reply(completion("late"))
    assert main([*arguments, "--overwrite"]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["output"] for row in rows] == ["an answer", "late", "an answer"] and len(judge.bodies) == 4
    body = judge.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "be brief"} and "logprobs" not in body
    assert body["temperature"] == 0.7 and "seed" in body


def test_empty_answers_are_none(judge: ScriptedJudge, tmp_path: Path) -> None:
    """A model that thinks may use up all tokens before it says anything: that is not kept as an answer."""
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    judge.answer = lambda body, times: (
        Reply(completion(None, tokens=(5, 7))) if body["messages"][-1]["content"] == "two" else Reply(completion("yes"))
    )
    arguments = ["generate", "m", "--url", judge.url, "--prompts", str(tmp_path / "p.txt"), "--api_key_env", ""]
    arguments += ["--out", str(tmp_path / "o.json"), "--max_new_tokens", "7"]
    assert main(arguments) == 1
    row = json.loads((tmp_path / "o.json").read_text())[1]
    assert row["output"] == "" and "all 7 tokens are used: give more with max_new_tokens" in row["error"]
    judge.answer = lambda body, times: Reply(completion("late"))
    assert main(arguments) == 0 and len(judge.bodies) == 3
    assert [row["output"] for row in json.loads((tmp_path / "o.json").read_text())] == ["yes", "late"]


def test_empty_answers_that_were_kept_are_asked_again(judge: ScriptedJudge, client, tmp_path: Path) -> None:
    request = ChatRequest([{"role": "user", "content": "one"}], max_tokens=2048, top_logprobs=None)
    judge.answer = lambda body, times: Reply(completion("" if times == 0 else "yes"))
    one = client()
    assert one.ask([request])[0].text == ""
    rows, failed = generate_remotely(one, [Prompt("one")], Sampling(), generator="m", out=tmp_path / "o.json")
    assert (rows[0]["output"], failed) == ("yes", 0)


@pytest.mark.parametrize("given, expected", [([], 60 + 4096 / 10), (["--timeout", "7", "--patience", "3"], 7)])
def test_long_answers_have_time(judge: ScriptedJudge, tmp_path: Path, monkeypatch, given, expected) -> None:
    seen = {}

    class Watched(Endpoint):
        def __init__(self, *arguments, **options) -> None:
            seen.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("llmalign.judges.client.Endpoint", Watched)
    (tmp_path / "p.txt").write_text("one\n")
    arguments = ["generate", "m", "--url", judge.url, "--prompts", str(tmp_path / "p.txt"), "--api_key_env", ""]
    assert main([*arguments, "--out", str(tmp_path / "o.json"), "--max_new_tokens", "4096", *given]) == 0
    assert seen["timeout"] == expected
