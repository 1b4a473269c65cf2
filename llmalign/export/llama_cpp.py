"""A GGUF file checked in llama.cpp against the model that it was written from."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmalign.errors import UserError
from llmalign.scores.sampling import end_token_ids

TEXTS = (
    "Once upon a time there was a small boat, and it wasn't fast.",
    "  two spaces,\ta tab\n\nand line breaks \n",
    "In 2026 it cost 1,234,567.89 at 7:30; they'll say it's 100%.",
    "Zürich, naïve, Москва, 東京, नमस्ते, 🙂🚀",
    "def f(x):\n    return x**2  # squares\n",
)
PROMPTS = ("Once upon a time there was", "What would you like to", "The")
# Of log-probs of the first token, in nats, for tokens likelier than e^-10.
TOLERANCES = {"f32": 1e-3, "f16": 2e-2, "bf16": 0.15, "q8_0": 0.5}
LIKELY = -10.0
NEW_TOKENS = 16
TIMEOUT = 600.0


@dataclass(frozen=True)
class Check:
    """What llama.cpp makes of the file: `gap` in nats, and of `new_tokens` greedy ones those before the first that
    differs; texts of `texts` that are split into other tokens."""

    gap: float
    tolerance: float
    agreeing: int
    new_tokens: int
    texts: int
    split_otherwise: list[str]

    @property
    def passed(self) -> bool:
        return self.gap <= self.tolerance and not self.split_otherwise


def check_gguf(
    path: Path | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    prompts: Sequence[str] = PROMPTS,
    texts: Sequence[str] = TEXTS,
    new_tokens: int = NEW_TOKENS,
) -> Check:
    """Load the file in llama.cpp and compare it with transformers: tokens of `texts`, and of each prompt the log-probs
    of the first token and the greedy continuation.

    The model is taken to float32 and stays in it. In float32 the continuations should be the same; rounded weights may
    part from them at a near tie. Raises UserError without xllamacpp, and where llama.cpp does not load the file. Not
    covered: the chat template, other devices than the CPU.
    """
    require_llama_cpp()
    model = model.float().eval()
    ends = end_token_ids(model, tokenizer)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    gap, agreeing, told = 0.0, 0, 0
    with serving(Path(path)) as url:
        wrong = [text for text in texts if tokenize(url, text) != tokenizer(text)["input_ids"]]
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            expected, tokens = _continued(model, ids, new_tokens, ends)
            asked = {"prompt": ids, "temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
            found = _first_log_probs(url, asked, plain, len(expected))
            likely = expected > LIKELY
            gap = max(gap, float((found - expected)[likely].abs().max()))
            answer = _post(url, "completion", {**asked, "n_predict": len(tokens), "return_tokens": True})
            agreeing += _same(tokens, answer["tokens"])
            told += len(tokens)
    return Check(gap, TOLERANCES[dtype], agreeing, told, len(texts), wrong)


def require_llama_cpp() -> None:
    """Raise UserError without xllamacpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("--check loads the file in llama.cpp, which needs xllamacpp: pip install xllamacpp")


def tokenize(url: str, text: str) -> list[int]:
    """The ids that llama.cpp splits a text into, with the BOS and EOS that its file asks for."""
    return _post(url, "tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """The address of llama.cpp's server with a file in it, in a process that ends with the block.

    Raises UserError where llama.cpp does not load the file.
    """
    command = [sys.executable, "-m", "llmalign.export.llama_server", str(path)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
        )
        try:
            yield _address(process, path, log)
        finally:
            process.kill()
            process.communicate()


def _address(process: subprocess.Popen[str], path: Path, log: IO[str]) -> str:
    """What the server prints once the file is loaded."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http"):
            return line.strip()
    log.seek(0)
    wrong = [line for line in map(str.strip, log) if " E " in line]
    raise UserError(f"llama.cpp does not load {path} ({wrong[0].split(' E ')[1] if wrong else 'it says nothing'})")


def _continued(
    model: PreTrainedModel, ids: list[int], new_tokens: int, ends: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Log-probs of the first token (vocabulary,), and the likeliest tokens up to the first that ends a text."""
    tokens: list[int] = []
    first = None
    with torch.no_grad():
        while len(tokens) < new_tokens and not (tokens and tokens[-1] in ends):
            logits = model(input_ids=torch.tensor([ids + tokens], device=model.device)).logits[0, -1]
            first = logits.log_softmax(-1).cpu() if first is None else first
            tokens.append(int(logits.argmax()))
    assert first is not None
    return first, tokens


def _first_log_probs(url: str, asked: dict[str, Any], plain: int, vocabulary: int) -> Tensor:
    """llama.cpp's (vocabulary,) of the first token, before any sampler.

    It tells them with a token that is drawn, but not with a part of a character: so `plain`, a letter, is made to be.
    """
    drawn = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[plain, 1e6]]}
    (first,) = _post(url, "completion", {**asked, **drawn})["completion_probabilities"]
    found = torch.full((vocabulary,), -torch.inf)
    for entry in first["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    # llama.cpp does not return the token that ends a text.
    return len(one) if len(one) - len(other) <= 1 else len(other)


def _post(url: str, route: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT) as answer:
        return json.load(answer)
