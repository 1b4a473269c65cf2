"""`llmalign generate` by an endpoint: the answers that came are kept, those that failed are asked for again."""

import json
from pathlib import Path

import pytest

from llmalign.cli import main
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
