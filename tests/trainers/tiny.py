"""A Llama of a few thousand weights with a byte-level tokenizer, built in code; and rows to train it on."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, plus padding, end and role markers; pad and EOS differ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def model(seed: int = 0, *, layers: int = 2, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(folder: Path, seed: int = 0, *, chat: bool = True) -> str:
    model(seed).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return str(folder)


def _text(rng: random.Random, low: int = 3, high: int = 20) -> str:
    return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))


def pairs(n: int, seed: int = 0, **extra) -> Dataset:
    rng = random.Random(seed)
    rows = [{"prompt": "q" + _text(rng), "chosen": "y" + _text(rng), "rejected": "n" + _text(rng)} for _ in range(n)]
    return Dataset.from_list([row | {k: f(i) for k, f in extra.items()} for i, row in enumerate(rows)])


def groups(n: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        k = rng.randint(2, 4)
        rows.append(
            {
                "prompt": "q" + _text(rng),
                "completions": ["c" + _text(rng) for _ in range(k)],
                "rewards": [rng.gauss(0, 1) for _ in range(k)],
            }
        )
    return Dataset.from_list(rows)
