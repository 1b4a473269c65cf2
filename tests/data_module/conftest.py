"""Files of rows, a ChatML tokenizer with one token a byte, and the preparation that trainers use."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows (a list) or text into a file of a given name and return its path."""

    def write_file(name: str, rows: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = rows if isinstance(rows, str) else json.dumps(rows) if ".json" == path.suffix else lines
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def chatml() -> Any:
    """A byte-level tokenizer whose replies end `<|im_end|>` and a newline; pad differs from EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def chat() -> Callable[..., list[dict[str, str]]]:
    """Messages from texts, user and assistant in turn; `first` says who begins."""

    def messages(*texts: str, first: str = "user") -> list[dict[str, str]]:
        roles = ("user", "assistant") if first == "user" else ("assistant", "user")
        return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]

    return messages
