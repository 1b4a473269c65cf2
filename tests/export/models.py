"""Tiny models of Llama's shape and BPE tokenizers of every kind that GGUF knows, built in code."""

from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXTS = (
    "Once upon a time there was a small boat, and it wasn't fast. They'll say it's 100%.",
    "What would you like to cook? 1,234,567.89 at 7:30 in 2026\n\n  indented   twice\tand a tab",
    "Zürich, naïve, Москва, 東京, नमस्ते, HTMLParser XMLHttpRequest, ISN'T IT?",
    "def f(x):\n    return x**2  # squares\r\n",
)
# As the tokenizers of these models publish them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def splitter(kind: str) -> Any:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    patterns = {"llama-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}
    if kind in patterns:
        return split_by(patterns[kind])
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole]) if kind == "smollm" else whole


@cache
def byte_level(kind: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as `kind` does; special tokens at its end, one of them not special."""
    bpe = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    bpe.pre_tokenizer = splitter(kind)
    bpe.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        bpe.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(["<pad>", "<bos>", "<eos>", "<|turn|>"])
    bpe.add_tokens(["<think>"])
    if bos:
        special = [("<bos>", bpe.token_to_id("<bos>"))]
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@cache
def llama2_kind(scheme: str, *, whole: bool = True) -> PreTrainedTokenizerFast:
    """A BPE of Llama 2's kind: bytes first, all merges that make a piece, the earlier piece first; or with one each.

    `scheme` is how a space comes in front: `prepend` (a normalizer), or Metaspace's `first`, `always` or `never`.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    singles, joined = [p for p in pieces if len(p) == 1], [p for p in pieces if len(p) > 1]
    vocabulary = {t: n for n, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for piece in [*joined, *singles]:
        vocabulary[piece] = len(vocabulary)
    merges = []
    for piece in joined:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += known if whole else known[:1]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = [("<s>", 1)]
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Each has something that the others have not.
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE, rope_parameters=ROPE, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear": lambda: LlamaConfig(**SHAPE, rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}),
    "llama-yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SHAPE, rope_parameters=ROPE, head_dim=32, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen2-yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SHAPE, rope_parameters=ROPE, head_dim=32),
}


def model_of(kind: str, tokenizer: PreTrainedTokenizerFast, *, rows: int | None = None) -> Any:
    """A model in float32 with every weight random, biases and norms included; `rows` of embeddings."""
    config = CONFIGS[kind]()
    config.vocab_size = len(tokenizer) if rows is None else rows
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    return model
