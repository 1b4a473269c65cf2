"""Generated outputs: transformers' own greedy answers, interrupted and gone on, by endpoints, and bad prompts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from llmalign.cli import main
from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.evaluation import generate
from llmalign.evaluation.generate import Prompt, Sampling, generate_locally, prompt_ids
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
    assert len(partial.read_text().splitlines()) == 2 and not (tmp_path / "o.json").exists()
    if torn:
        partial.write_text(partial.read_text()[:-9])
    assert answers(tiny, tmp_path / "o.json", temperature=1.0) == whole
    assert whole != answers(tiny, tmp_path / "other.json", temperature=1.0, seed=1)


def test_another_models_rest_is_not_gone_on_with(tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "o.json.partial.jsonl").write_text('{"of": "else"}\n{"batch": 0, "outputs": ["wrong"], "cut": 0}\n')
    assert "wrong" not in {row["output"] for row in answers(tiny, tmp_path / "o.json")}
    assert "begun anew" in caplog.text


def test_batches_do_not_change_greedy_answers(tiny, tmp_path: Path) -> None:
    assert answers(tiny, tmp_path / "a.json", batch_size=4) == answers(tiny, tmp_path / "b.json")


def test_the_context_bounds_answers_and_what_it_does_is_said(tiny, tmp_path: Path, caplog) -> None:
    """A prompt that fills it has no answer, one that nearly does a short one, and the others what was asked."""
    model, tokenizer = tiny
    fox = tokenizer("fox" * 60)["input_ids"]
    prompts = [Prompt("the"), Prompt(tokenizer.decode(fox[:37])), Prompt(tokenizer.decode(fox[:40])), Prompt("a")]
    lengths = [len(ids) for ids in prompt_ids(tokenizer, prompts, Sampling(raw=True))]
    assert lengths[1] < lengths[2]
    drawn: list[int] = []
    context = model.config.max_position_embeddings
    model.config.max_position_embeddings = lengths[2]
    try:
        with caplog.at_level("INFO"), pytest.MonkeyPatch.context() as patch:
            sample = generate.sample_groups

            def watched(*arguments, **options):
                drawn.append(options["max_new_tokens"])
                return sample(*arguments, **options)

            patch.setattr(generate, "sample_groups", watched)
            rows = answers(tiny, tmp_path / "o.json", prompts, raw=True, batch_size=4, max_new_tokens=12)
    finally:
        model.config.max_position_embeddings = context
    assert drawn == [lengths[2] - lengths[1], 12] and rows[2]["output"] == ""
    assert "1 prompts fill the model's context" in caplog.text and "such as prompt 3" in caplog.text
    assert "1 answers may have at least" in caplog.text and "answers are empty" not in caplog.text


def test_cut_answers_are_counted(tiny, tmp_path: Path, caplog) -> None:
    answers(tiny, tmp_path / "o.json", max_new_tokens=1)
    assert "11 of 11 answers did not end by themselves" in caplog.text


def test_what_needs_a_chat_template_is_refused_without(tiny, tmp_path: Path) -> None:
    chat = Prompt(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    with pytest.raises(UserError, match="prompt 2 is a conversation, which needs a chat template"):
        answers(tiny, tmp_path / "o.json", [Prompt("a"), chat], raw=True)
    assert answers(tiny, tmp_path / "o.json", [chat])[0]["instruction"] == "user: a\nassistant: b\nuser: c"


def test_a_system_message_comes_first_but_not_twice(tiny) -> None:
    _, tokenizer = tiny
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "a"}]
    with_system, kept = prompt_ids(tokenizer, [Prompt("a"), Prompt(own)], Sampling(system="be brief"))
    assert "be brief" in tokenizer.decode(with_system)
    assert "mine" in tokenizer.decode(kept) and "be brief" not in tokenizer.decode(kept)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in ("tell me", chat, "more")))
    arguments = ["generate", str(ensure_tiny()), "--prompts", str(prompts), "--out", str(tmp_path / "o.json")]
    assert main([*arguments, "--max_new_tokens", "4", "--name", "me", "--max_rows", "2"]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["generator"] for row in rows] == ["me", "me"] and rows[1]["instruction"] == "hello"
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--typo", "1"]) == 2 and "no option --typo" in capsys.readouterr().err
    assert main([*arguments, "--url", "http://127.0.0.1:9/v1", "--raw"]) == 2
    assert "loaded here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"raw": True, "system": "x"}]
)
def test_settings_that_cannot_be_meant(bad: dict) -> None:
    with pytest.raises(UserError):
        Sampling(**bad)


def test_a_context_of_another_name_and_none(tiny, tmp_path: Path) -> None:
    """GPT-2 has n_positions and would read past them; Bloom has no limit."""
    tokenizer, common = tiny[1], {"vocab_size": len(tiny[1]), "n_layer": 1, "n_head": 2}
    prompts = [Prompt("the fox " * 4), Prompt("the fox " * 40)]
    short = GPT2LMHeadModel(GPT2Config(n_embd=16, n_positions=32, **common)).eval()
    rows = answers((short, tokenizer), tmp_path / "g.json", prompts, raw=True, max_new_tokens=40)
    assert rows[0]["output"] and rows[1]["output"] == ""
    free = BloomForCausalLM(BloomConfig(hidden_size=16, **common)).eval()
    assert all(row["output"] for row in answers((free, tokenizer), tmp_path / "b.json", prompts, raw=True))


def test_memory_that_runs_out_is_said(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(tiny[0], "forward", full)
    with pytest.raises(UserError, match="not enough memory .* lower batch_size or max_new_tokens"):
        answers(tiny, tmp_path / "o.json")


@pytest.mark.parametrize("option", [["--cache", "f"], ["--timeout", "9"], ["--patience", "0"], ["--api_key_env", ""]])
def test_what_a_loaded_model_does_not_read_is_refused(tmp_path: Path, capsys, option: list[str]) -> None:
    arguments = ["generate", "embedded:tiny", "--prompts", "none.txt", "--out", str(tmp_path / "o.json")]
    assert main([*arguments, *option]) == 2
    assert f"takes {option[0]}, one that is loaded here does not" in capsys.readouterr().err
    assert main([*arguments, "--url", "http://127.0.0.1:9/v1", "--batch_size", "4"]) == 2
    assert "takes --batch_size, an endpoint does not" in capsys.readouterr().err
