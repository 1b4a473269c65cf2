"""GGUF files: every number where llama.cpp looks for it, and llama.cpp itself of one mind with transformers."""

import importlib.util
import json
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from llmalign.errors import UserError
from tests.export import models

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'llmalign[gguf]'")

from llmalign.export.gguf import export_gguf  # noqa: E402
from llmalign.export.llama_cpp import check_gguf, serving, tokenize  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)
LONG = " ".join(models.TEXTS[0:1] * 5)  # where scaled positions matter
SPLITS = ("gpt-2", "llama-bpe", "qwen2", "tekken", "smollm")
MARKED = "A turn<|turn|>and <think>so on</think>. <eos>"


def rarely(cases: Iterable[str], *slow: str) -> list[Any]:
    """Cases of a test, of which some are left to the slow suite."""
    return [pytest.param(case, marks=pytest.mark.slow if case in slow else ()) for case in cases]


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    read = gguf.GGUFReader(path).tensors
    return {one.name: gguf.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1]) for one in read}


@needs_llama_cpp
@pytest.mark.parametrize("kind", rarely(models.CONFIGS, "llama-linear", "llama-yarn", "qwen2-yarn"))
def test_llama_cpp_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """Biases, tied and untied, grouped keys, heads wider than the rest, and positions scaled in three ways."""
    tokenizer = models.byte_level("qwen2" if kind.startswith("qwen") else "llama-bpe")
    model = models.model_of(kind, tokenizer)
    written = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32")
    prompts = ("Once upon a time", LONG)
    found = check_gguf(written.path, model, tokenizer, dtype="f32", prompts=prompts, texts=models.TEXTS)
    assert found.gap < 1e-4 and found.agreeing == found.new_tokens > 16
    assert found.passed and not found.split_otherwise


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_rounded_weights_stay_close(dtype: str, tmp_path: Path) -> None:
    tokenizer = models.byte_level("gpt-2")
    model = models.model_of("llama", tokenizer)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype=dtype).path
    found = check_gguf(path, model, tokenizer, dtype=dtype, texts=())
    assert 1e-5 < found.gap
    assert found.passed


@needs_llama_cpp
@pytest.mark.parametrize("kind, bos", [*((kind, False) for kind in SPLITS), ("gpt-2", True)])
def test_byte_level_texts_are_split_alike(
    kind: str, bos: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = models.byte_level(kind, bos=bos)
    path = export_gguf(models.model_of("llama", tokenizer), tokenizer, tmp_path / "m.gguf").path
    assert fields(path)["tokenizer.ggml.pre"] == kind
    assert fields(path)["tokenizer.ggml.add_bos_token"] is bos
    with serving(path) as url:
        for text in (*models.TEXTS, MARKED, " ", "a", "\n\n\n x"):
            marks = kind == "tekken" and "नमस्ते" in text  # which is warned of
            assert (tokenize(url, text) == tokenizer(text)["input_ids"]) is not marks, text
    assert ("combining marks" in caplog.text) == (kind == "tekken")


@needs_llama_cpp
@pytest.mark.parametrize("scheme", rarely(["prepend", "always", "first", "never"], "always", "never"))
def test_texts_of_llama_2s_kind_are_split_alike(scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.llama2_kind(scheme)
    path = export_gguf(models.model_of("llama", tokenizer), tokenizer, tmp_path / "m.gguf").path
    assert ("after a special token" in caplog.text) == (scheme == "first")
    assert ("start with one" in caplog.text) == (scheme in ("always", "first"))
    with serving(path) as url:
        for text in (*models.TEXTS, "a", " a", "🙂🚀 ok"):
            doubled = text == " a" and scheme in ("always", "first")  # which is warned of
            assert (tokenize(url, text) == tokenizer(text)["input_ids"]) is not doubled, text


def test_pairs_that_llama_cpp_would_join_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.llama2_kind("prepend", whole=False)
    export_gguf(models.model_of("llama", tokenizer), tokenizer, tmp_path / "m.gguf")
    assert "leaves out" in caplog.text and "such pairs" in caplog.text


def test_rows_of_queries_and_keys_are_neighbours(tmp_path: Path) -> None:
    """Entry 2i of a head is what transformers has at i, and entry 2i+1 what it has half a head further."""
    tokenizer = models.byte_level("gpt-2")
    model = models.model_of("llama", tokenizer)
    found = tensors(export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32").path)
    own = model.state_dict()
    head = 16
    for name, part, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        order = [h * head + i + half for h in range(heads) for i in range(head // 2) for half in (0, head // 2)]
        for kind in ("weight", "bias"):
            expected = own[f"model.layers.1.self_attn.{part}.{kind}"].numpy()[order]
            np.testing.assert_array_equal(found[f"blk.1.{name}.{kind}"], expected)
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"], own["model.layers.1.self_attn.v_proj.weight"])
    np.testing.assert_array_equal(found["output.weight"], own["lm_head.weight"])


def test_llama_3s_positions(tmp_path: Path) -> None:
    """By its paper's code: short wavelengths as they are, long ones by the factor, those between in between."""
    tokenizer = models.byte_level("llama-bpe")
    model = models.model_of("llama-tied", tokenizer)
    found = tensors(export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32").path)
    expected = []
    for i in range(8):
        wavelength = 2 * np.pi * 500.0 ** (2 * i / 16)
        share = (64 / wavelength - 1.0) / (4.0 - 1.0)
        expected.append(1.0 if wavelength < 16 else 8.0 if wavelength > 64 else 1 / ((1 - share) / 8.0 + share))
    np.testing.assert_allclose(found["rope_freqs.weight"], expected, rtol=1e-5)
    assert "output.weight" not in found


def test_rows_that_do_not_fit_q8_0_stay_in_f16(tmp_path: Path) -> None:
    tokenizer = models.byte_level("gpt-2")
    model = models.model_of("llama", tokenizer)
    small = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 72})
    model = type(model)(small).eval()
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="q8_0").path
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    own = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    rounded = tensors(path)["blk.0.ffn_up.weight"]
    # 8 bits, a scale for each 32 neighbours.
    assert np.abs(rounded - own).max() <= np.abs(own).max() / 127
    assert not np.array_equal(rounded, own)


def test_special_tokens_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.byte_level("gpt-2")
    model = models.model_of("llama", tokenizer, rows=len(tokenizer) + 3)
    turn, eos = tokenizer.convert_tokens_to_ids(["<|turn|>", "<eos>"])
    model.generation_config.eos_token_id = [eos, turn, 5, 6]
    said = fields(export_gguf(model, tokenizer, tmp_path / "m.gguf", context=4096, name="mine").path)
    ids = {name: said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "eot", "eom")}
    assert ids["eos"] == eos and {ids["eot"], ids["eom"]} == {5, 6} and "<|turn|> will not end" in caplog.text
    assert ids["bos"] == tokenizer.bos_token_id and ids["padding"] == tokenizer.pad_token_id
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(tokenizer) + 3
    by_token = dict(zip(tokens, kinds, strict=True))
    assert by_token["<|turn|>"] == 3 and by_token["<think>"] == 4 and by_token["a"] == 1 and kinds[-3:] == [5, 5, 5]
    assert said["llama.context_length"] == 4096 and said["general.name"] == "mine"


@needs_llama_cpp
def test_the_chat_template_is_llama_cpps(tmp_path: Path) -> None:
    """The embedded model's marks what an assistant says with a tag that transformers alone knows."""
    from llmalign.embedded import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    messages = [
        {"role": "user", "content": " What should I cook? "}, {"role": "assistant", "content": "Soup."},
        {"role": "user", "content": "And then?"},
    ]  # fmt: skip
    with serving(export_gguf(build_model(tokenizer), tokenizer, tmp_path / "m.gguf").path) as url:
        body = json.dumps({"messages": messages}).encode()
        request = urllib.request.Request(f"{url}/apply-template", body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            written = json.load(answer)["prompt"]
    assert written == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_template_can_be_replaced(tmp_path: Path) -> None:
    tokenizer = models.byte_level("gpt-2")
    path = export_gguf(
        models.model_of("llama", tokenizer), tokenizer, tmp_path / "m.gguf", chat_template="{{ 1 }}"
    ).path
    assert fields(path)["tokenizer.chat_template"] == "{{ 1 }}"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    tokenizer = models.byte_level("gpt-2")
    whole = models.model_of("llama", tokenizer)
    out = tmp_path / "new" / "m.gguf"
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be written.*LlamaForCausalLM"):
        export_gguf(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), tokenizer, out)
    with pytest.raises(UserError, match="one of f32, f16, bf16, q8_0, not 'q4_k'"):
        export_gguf(whole, tokenizer, out, dtype="q4_k")
    with pytest.raises(UserError, match="embeddings for 100 alone"):
        export_gguf(models.model_of("llama", tokenizer, rows=100), tokenizer, out)
    for change, said in (
        ({"rope_parameters": {**models.ROPE, "rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"rope_parameters": {**models.YARN, "attention_factor": 3.0}}, "attention factor"),
    ):
        other = LlamaConfig(**{**whole.config.to_dict(), **change})
        with pytest.raises(UserError, match=said):
            export_gguf(type(whole)(other), tokenizer, out)
    with torch.no_grad():
        whole.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="lm_head.weight has values above 65504.*--dtype bf16"):
        export_gguf(whole, tokenizer, out)
    assert not out.exists() and not list(out.parent.glob(".*"))
    with pytest.raises(UserError, match="is a folder; name a file"):
        export_gguf(models.model_of("llama", tokenizer), tokenizer, tmp_path)


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"junk")
    with pytest.raises(UserError, match="does not load .*bad.gguf .*magic"), serving(tmp_path / "bad.gguf"):
        pass


@needs_llama_cpp
def test_a_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """The file of one model against another, whose tokenizer has a token more."""
    tokenizer = models.byte_level("gpt-2")
    path = export_gguf(models.model_of("llama", tokenizer), tokenizer, tmp_path / "m.gguf", dtype="f32").path
    other = models.model_of("llama-linear", tokenizer)
    found = check_gguf(path, other, models.byte_level("smollm"), dtype="f32")
    assert found.gap > 0.1 and found.agreeing < found.new_tokens and found.split_otherwise
    assert not found.passed
