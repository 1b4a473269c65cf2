"""The model that `embedded:tiny` stands for: the embedded world's Llama after a short lesson in its sentences."""

import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llmalign import assets
from llmalign.embedded.model import build_model, build_tokenizer
from llmalign.embedded.rows import Row, sft_rows

logger = logging.getLogger(__name__)

STEPS, BATCH_SIZE = 110, 32
LEARNING_RATE, WARM_UP = 8e-3, 10
Progress = Callable[[int, int], None]


def speak(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Teach a model the completions of SFT rows in one pass; the mean loss of the last ten steps, in nats a token.

    AdamW with a warm-up and a linear decay to zero; prompt tokens carry no loss. This is what makes `embedded:tiny`
    speak; it saves nothing on the way and knows no device but the CPU: real training goes through the trainers.
    """
    batches = list(_batches(tokenizer, rows, batch_size, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    losses = []
    model.train()
    for step, (input_ids, labels) in enumerate(batches):
        rate = min((step + 1) / WARM_UP, 1.0) * (1 - step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        answered = labels[:, 1:] != -100
        loss = cross_entropy(model.lm_head(hidden[answered]), labels[:, 1:][answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, len(batches))
    model.eval()
    return math.fsum(losses[-10:]) / len(losses[-10:])


def _batches(
    tokenizer: PreTrainedTokenizerFast, rows: list[Row], batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (input_ids, labels), each (batch, longest); rows of like length share a batch to save padding."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    examples = [
        (prompt, [*completion, tokenizer.eos_token_id]) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    examples.sort(key=lambda example: len(example[0]) + len(example[1]))
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    random.Random(seed).shuffle(batches)
    for batch in batches:
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        labels = torch.full((len(batch), longest), -100)
        for row, (prompt, completion) in enumerate(batch):
            end = len(prompt) + len(completion)
            input_ids[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(completion)
        yield input_ids, labels


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one thread: sums then give the same bytes everywhere, and a model this small gains nothing from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build_tiny(
    folder: Path | str, *, train: bool = True, seed: int = 0, steps: int = STEPS, progress: Progress | None = None
) -> Path:
    """Write the embedded tokenizer and model into `folder`, in the Hugging Face format, and return the folder.

    With `train` the model gets a short SFT on `steps` x 32 rows of its world (about ten seconds on one core), enough
    for it to answer in sentences, not enough to answer well; without, its weights are fresh. The same seed gives the
    same bytes under the same versions of torch, transformers and tokenizers on the same kind of processor.
    """
    folder = Path(folder)
    tokenizer = build_tokenizer()
    with one_thread():
        model = build_model(tokenizer, seed=seed)
        if train:
            loss = speak(model, tokenizer, sft_rows(steps * BATCH_SIZE, seed), seed=seed, progress=progress)
            logger.info("Taught the embedded model to speak in %d steps (loss %.2f nats a token).", steps, loss)
        # transformers writes on rank 0 alone, and a host with a cache of its own builds on another
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def content_key() -> str:
    """Sixteen hex digits that change with this package's source and with the libraries that shape the model's bytes."""
    return assets.content_key(Path(__file__).parent.glob("*.py"), torch, transformers, tokenizers)


def ensure_tiny(*, train: bool = True, progress: Progress | None = None) -> Path:
    """The folder of `embedded:tiny`, built on first use into the user's cache and found there afterwards.

    Several processes may ask for it at once, see `assets.ensure_folder`.
    """
    return assets.ensure_folder(
        f"tiny-{'taught' if train else 'fresh'}-{content_key()}",
        lambda folder: build_tiny(folder, train=train, progress=progress),
        "the embedded model",
        "about ten seconds",
    )
