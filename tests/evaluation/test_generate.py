"""Generated outputs: transformers' own greedy answers, interrupted and gone on, by endpoints, and bad prompts."""

import json
from pathlib import Path

import pytest
import torch

from llmalign.cli import main
from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.evaluation import generate
from llmalign.evaluation.generate import Prompt, Sampling, generate_locally, read_prompts
from llmalign.inference import load_for_inference

PROMPTS = [Prompt(f"Tell me about number {i} and {'the fox ' * (i % 4)}", "set") for i in range(11)]


@pytest.fixture(scope="module")
def tiny():
    return load_for_inference("embedded:tiny", dtype="float32", device="cpu")


def answers(tiny, out: Path, prompts=PROMPTS, **options) -> list[dict]:
    sampling = Sampling(**{"max_new_tokens": 12, "batch_size": 1, **options})
    return generate_locally(*tiny, prompts, sampling, generator="tiny", identity="tiny", out=out)


def test_greedy_answers_are_transformers_own(tiny, tmp_path: Path) -> None:
    model, tokenizer = tiny
    rows = answers(tiny, tmp_path / "o.json")
    for prompt, row in zip(PROMPTS, rows, strict=True):
        chat = [{"role": "user", "content": prompt.content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            own = model.generate(**ids, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(own[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row == {"dataset": "set", "instruction": prompt.content, "output": text, "generator": "tiny"}
    assert json.loads((tmp_path / "o.json").read_text()) == rows
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_equals_uninterrupted(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    whole = answers(tiny, tmp_path / "whole.json", temperature=1.0)
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    sample = generate.sample_groups
    monkeypatch.setattr(generate, "sample_groups", dies)
    with pytest.raises(KeyboardInterrupt):
        answers(tiny, tmp_path / "o.json", temperature=1.0)
    monkeypatch.setattr(generate, "sample_groups", sample)
    partial = tmp_path / "o.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + generate.BATCHES and not (tmp_path / "o.json").exists()
    if torn:
        partial.write_text(partial.read_text()[:-9])
    assert answers(tiny, tmp_path / "o.json", temperature=1.0) == whole
    assert whole != answers(tiny, tmp_path / "other.json", temperature=1.0, seed=1)


def test_another_models_rest_is_not_gone_on_with(tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "o.json.partial.jsonl").write_text('{"of": "else"}\n{"place": 0, "output": "wrong"}\n')
    assert answers(tiny, tmp_path / "o.json")[0]["output"] != "wrong"
    assert "begun anew" in caplog.text


def test_cut_answers_are_counted_and_full_prompts_refused(tiny, tmp_path: Path, caplog) -> None:
    answers(tiny, tmp_path / "o.json", max_new_tokens=1)
    assert "11 of 11 answers did not end by themselves" in caplog.text
    context = tiny[0].config.max_position_embeddings
    with pytest.raises(UserError, match=f"1 prompts fill the model's whole context of {context} tokens, .* row 1"):
        answers(tiny, tmp_path / "p.json", [Prompt("a"), Prompt("fox " * context)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in ("tell me", chat)))
    arguments = ["generate", str(ensure_tiny()), "--prompts", str(prompts), "--out", str(tmp_path / "o.json")]
    assert main([*arguments, "--max_new_tokens", "4", "--name", "me"]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["generator"] for row in rows] == ["me", "me"] and rows[1]["instruction"] == "user: hello"
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"text": "x"}', "row 0 of .* has no text in 'instruction' or 'prompt'"),
        ('{"prompt": " "}', "no text"),
        ('{"prompt": [{"role": "user"}]}', "no text"),
        ("", "no prompt"),
        ("{", "line 1 of"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"raw": True, "system": "x"}]
)
def test_settings_that_cannot_be_meant(bad: dict) -> None:
    with pytest.raises(UserError):
        Sampling(**bad)
