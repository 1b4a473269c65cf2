"""`llmalign judge` with the recorded answers of AlpacaEval's judge, and on real pairs with a server that fails."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llmalign.cli import main
from llmalign.evaluation.annotations import read_annotations, write_json
from tests.judges.scripted import Reply, ScriptedJudge, completion
from tests.judges.serving import LlamaServer
from tests.judges.test_real_server import forwarded

TEMPLATE = "{prompt}\n###\n{first}\n###\n{second}\n###"
CONCURRENCY = 4


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def command(folder: Path, rows: list[tuple[str, str, str]], url: str) -> list[str]:
    """`llmalign judge` on rows of (instruction, the reference's output, the model's)."""
    for place, name in enumerate(("reference", "outputs"), 1):
        write_json(
            folder / f"{name}.json", [{"instruction": r[0], "output": r[place], "generator": name} for r in rows]
        )
    (folder / "template.txt").write_text(TEMPLATE)
    return [
        "judge", str(folder / "outputs.json"), "--reference", str(folder / "reference.json"), "--out",
        str(folder / "annotations.json"), "--template", str(folder / "template.txt"), "--judge", "m", "--url", url,
        "--api_key_env", "", "--concurrency", str(CONCURRENCY),
    ]  # fmt: skip


def prompt_of(body: dict) -> str:
    return body["messages"][-1]["content"].split("\n###\n")[0]


@pytest.mark.parametrize("count", [90, pytest.param(805, marks=pytest.mark.slow)])
def test_the_published_preferences_come_out(
    shared: Path, judge: ScriptedJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """To the digits that were kept; where neither letter is left, the row is null and says so."""
    whole = read(shared / "datasets" / "alpaca_eval" / "vicuna-7b.raw_judge.jsonl.gz")
    recorded = {row["instruction"]: row for row in sorted(whole, key=lambda row: not row["same_output"])[:count]}
    assert len(recorded) == count and sum(row["same_output"] for row in recorded.values()) == 2
    gone = random.Random(0).sample([name for name, row in recorded.items() if not row["same_output"]], 3)

    def answer(body: dict, times: int) -> Reply:
        logprobs = dict(recorded[prompt_of(body)]["top_logprobs"])
        if prompt_of(body) in gone and not times:
            logprobs = {"The": -0.1}
        return Reply(completion(max(logprobs, key=logprobs.__getitem__), logprobs))

    judge.answer = answer
    rows = [(name, "theirs", "theirs" if row["same_output"] else "ours") for name, row in recorded.items()]
    arguments = [*command(tmp_path, rows, judge.url), "--letters", "m", "M"]
    assert main(arguments) == 0
    found = read_annotations(tmp_path / "annotations.json")
    unread = [row for row in found if row["preference"] is None]
    assert sorted(row["instruction"] for row in unread) == sorted(gone)
    assert {row["reason"] for row in unread} == {"neither of m and M is among the likeliest first tokens"}
    assert "3 rows have no result" in caplog.text and len(judge.bodies) == count - 2
    assert main(arguments) == 0
    assert len(judge.bodies) == count + 1
    found = read_annotations(tmp_path / "annotations.json")
    wrong = [row for row in found if abs(row["preference"] - recorded[row["instruction"]]["preference"]) > 1e-6]
    assert len(found) == count and not wrong and not any("reason" in row for row in found)


@pytest.mark.slow
def test_killed_with_a_server_that_fails_loses_no_row(
    shared: Path, gguf_model: Path, judge: ScriptedJudge, tmp_path: Path
) -> None:
    """200 real pairs; before the real server a proxy with 429 and 500; the command is killed in the middle."""
    pairs = read(shared / "datasets" / "preference" / "alpaca_eval_pairs.jsonl.gz")
    chosen = {row["prompt"]: row for row in pairs if sum(len(row[k]) for k in ("prompt", "chosen", "rejected")) < 1500}
    rows = [(row["prompt"], row["rejected"], row["chosen"]) for row in chosen.values()][:200]
    numbers = {row[0]: number for number, row in enumerate(rows)}
    server, process, paid = LlamaServer(gguf_model), None, Counter[str]()

    def answer(body: dict, times: int) -> Reply:
        number = numbers[prompt_of(body)]
        if not times and number % 7 == 0:
            return Reply({}, status=429, headers={"Retry-After": "0.01"})
        if not times and number % 11 == 0:
            return Reply({}, status=500)
        reply = Reply(forwarded(server.url, body))
        paid[body["messages"][-1]["content"]] += 1
        if sum(paid.values()) == 80 and process is not None:
            os.kill(process.pid, signal.SIGKILL)
        return reply

    judge.answer = answer
    arguments = [*command(tmp_path, rows, judge.url), "--top_logprobs", "512"]
    try:
        process = subprocess.Popen([sys.executable, "-m", "llmalign.cli", *arguments], stderr=subprocess.DEVNULL)
        assert process.wait(timeout=300) == -signal.SIGKILL
        process, killed_at = None, sum(paid.values())
        assert main(arguments) == 0
    finally:
        server.kill()
    found = read_annotations(tmp_path / "annotations.json")
    assert [row["instruction"] for row in found] == [row[0] for row in rows] and len(found) == 200
    assert all(1 <= row["preference"] <= 2 for row in found) and len({row["preference"] for row in found}) > 150
    assert killed_at < 90 and len(paid) == 200
    # What was in flight when the command died was answered to nobody.
    assert sum(paid.values()) - 200 <= CONCURRENCY and max(paid.values()) <= 2
