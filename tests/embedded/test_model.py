"""The embedded tokenizer and model, and the cache that `embedded:tiny` comes from."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmalign.embedded import (
    as_conversation,
    broken_share,
    build_model,
    build_tiny,
    build_tokenizer,
    cache_folder,
    ensure_tiny,
    sft_rows,
    speak,
    split,
)
from llmalign.embedded.tiny import content_key


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for text in ("Set a gloomy scene at the attic.\n", "Ünïcode, 数 and\ttabs  too", "", "<|end|> said he"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_padding_is_not_the_end_of_text() -> None:
    tokenizer = build_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id not in tokenizer("It all depends.")["input_ids"]


def test_a_word_of_the_world_is_about_one_token() -> None:
    tokenizer = build_tokenizer()
    texts = [row["completion"] for row in sft_rows(300, 9)]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert 1.0 < tokens / words < 1.35  # a full stop is a token of its own
    assert len(tokenizer) == 2000


def test_a_conversation_has_the_tokens_of_the_plain_row() -> None:
    tokenizer = build_tokenizer()
    for row in sft_rows(50, 1):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert whole[: len(prompt)] == prompt
        talk = as_conversation(row)
        options = {"tokenize": True, "return_dict": False}
        assert tokenizer.apply_chat_template(talk["prompt"], add_generation_prompt=True, **options) == prompt
        assert tokenizer.apply_chat_template(talk["prompt"] + talk["completion"], **options) == whole


def test_the_chat_template_marks_what_the_assistant_says() -> None:
    tokenizer = build_tokenizer()
    turns = [("system", "Be kind."), ("user", "One?"), ("assistant", "One."), ("user", "Two?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokenizer.decode(encoded["input_ids"]) == "Be kind.\nOne?\nOne.<|end|>Two?\nTwo.<|end|>"
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "One.<|end|>Two.<|end|>"


def test_a_begin_of_text_token_on_request() -> None:
    tokenizer = build_tokenizer(bos=True)
    assert tokenizer("One.")["input_ids"] == [tokenizer.bos_token_id, *build_tokenizer()("One.")["input_ids"]]
    message = [{"role": "user", "content": "One."}]
    ids = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_fresh_model_comes_from_its_seed_and_leaves_the_random_state() -> None:
    tokenizer = build_tokenizer()
    before = torch.get_rng_state()
    first, again, other = (build_model(tokenizer, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert abs(float(first[name].std()) - 0.06) < 0.001
    assert 500_000 < build_model(tokenizer).num_parameters() < 800_000


def test_a_saved_model_is_loaded_back_whole(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "fresh", train=False, seed=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    built = build_model(build_tokenizer(), seed=2)
    ids = tokenizer("Set a gloomy scene at the attic.\n", return_tensors="pt")["input_ids"]
    assert (
        ids.tolist()
        == build_tokenizer()("Set a gloomy scene at the attic.\n", return_tensors="pt")["input_ids"].tolist()
    )
    assert torch.equal(model(ids).logits, built(ids).logits)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_same_lesson_gives_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = build_tiny(tmp_path / "one", steps=2)
        torch.set_num_threads(2)
        second = build_tiny(tmp_path / "two", steps=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_lesson_lowers_the_loss() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    seen: list[tuple[int, int]] = []
    rows = sft_rows(16 * 8, 0)
    loss = speak(model, tokenizer, rows, batch_size=8, progress=lambda *step: seen.append(step))
    assert seen == [(step + 1, 16) for step in range(16)]
    assert loss < 6.5 < torch.tensor(2000.0).log()  # a uniform guess costs 7.6 nats a token
    assert not model.training


def test_the_cache_is_built_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: ensure_tiny(train=False), range(3)))
    (folder,) = folders
    assert folder.parent == cache_folder() == tmp_path / "cache"
    assert content_key() in folder.name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_tiny(train=False) == folder
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path))

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_tiny(progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_taught_model_speaks_in_sentences() -> None:
    folder = ensure_tiny()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    prompts = [prompt.text for prompt in split()[1][::3]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**batch, do_sample=False, max_new_tokens=64)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(map(broken_share, texts)) / len(texts) < 0.5
