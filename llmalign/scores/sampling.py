"""Completions sampled from a model, reproducibly, each prompt read once for all of its completions."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from llmalign.errors import UserError

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text: the tokenizer's EOS and those of the model's generation config, sorted."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model's context holds, under whatever name its config has for them; None where it has no limit."""
    text = config.get_text_config()
    name = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return text.to_dict().get(name)


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise UserError for a temperature below 0 or none, a top_p outside (0, 1] and fewer than one new token."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is at least 0, not {temperature:g}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is above 0 and at most 1, not {top_p:g}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is at least 1, not {max_new_tokens}")


@contextmanager
def memory_said(way_out: str) -> Iterator[None]:
    """Where memory runs out, of the GPU or of this machine, raise UserError that ends in `way_out`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in NO_MEMORY):
            raise
        raise UserError(f"there is not enough memory to draw these answers: {way_out}") from error


def sample_completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[Sequence[int]], **options: Any
) -> list[list[int]]:
    """Sample one completion per prompt and return its token ids; `options` are those of `sample_groups`."""
    return [group[0] for group in sample_groups(model, tokenizer, prompt_ids, samples=1, **options)]


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> list[list[list[int]]]:
    """Sample completions of each prompt, token ids with the end token included where one was produced.

    Prompts are batched by length, longest first, so an out-of-memory shows at once; a batch has `batch_size`
    completions, or those of one prompt. With several samples a prompt is read once, where the model keeps a plain cache
    of keys and values; another model reads it for each of them. `temperature` 0 is greedy. The caller's random state,
    the model's mode and its generation config are untouched; the same seed, prompts and batch size give the same
    completions. `progress` wraps the iterable of batch starts. Not covered: beam search, models split over ranks
    (ZeRO-3, FSDP).
    """
    config = generation_config(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    device = model.device
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    at_a_time = max(1, batch_size // samples)
    starts: Iterable[int] = range(0, len(order), at_a_time)
    groups: list[list[list[int]]] = [[] for _ in prompt_ids]
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in progress(starts) if progress is not None else starts:
            rows = order[start : start + at_a_time]
            ids, mask = _padded_left([prompt_ids[i] for i in rows], tokenizer.pad_token_id)
            drawn = _generate(model, ids.to(device), mask.to(device), samples, config)
            for place, i in enumerate(rows):
                own = drawn[place * samples : (place + 1) * samples]
                groups[i] = [cut_at_end(tokens, config.eos_token_id or []) for tokens in own]
    model.train(was_training)
    return groups


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    """How to draw from the model's own distribution, for `generate_plainly`; temperature 0 is greedy."""
    greedy = temperature == 0
    # Greedy search has the library's defaults for what it does not read, or it warns that they have no effect.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_ids(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=not greedy,
        temperature=1.0 if greedy else temperature,
        top_p=1.0 if greedy else top_p,
        top_k=50 if greedy else 0,
        use_cache=True,
    )


@torch.no_grad()
def generate_plainly(model: PreTrainedModel, config: GenerationConfig, **inputs: Any) -> Tensor:
    """What the model's `generate` gives with `config` alone.

    transformers fills what a config leaves open from the model's own: penalties, min_p, typical_p, suppressed tokens,
    least lengths. None of that is in the model's distribution, so its own config is put aside until the call returns.
    """
    # An adapter hands its own to the model inside.
    holders: Any = [model, *(module for module in model.modules() if isinstance(module, GenerationMixin))]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        return model.generate(generation_config=config, **inputs)
    finally:
        for holder, before in zip(holders, own, strict=True):
            holder.generation_config = before


def cut_at_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends a text, which stays."""
    stops = [position for position, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0] + 1] if stops else tokens


def _padded_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    ids = [[pad_token_id] * pad + list(own) for pad, own in zip(pads, prompts, strict=True)]
    return torch.tensor(ids), torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])


def _generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, samples: int, config: GenerationConfig
) -> list[list[int]]:
    """The new tokens of `samples` completions of each row, row by row."""
    options = {}
    if samples > 1:
        cache = _read_prompts(model, ids[:, :-1], mask[:, :-1]) if ids.shape[1] > 1 else None
        if cache is not None:
            cache.batch_repeat_interleave(samples)
            options["past_key_values"] = cache
        ids, mask = ids.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
    output = generate_plainly(model, config, input_ids=ids, attention_mask=mask, **options)
    return output[:, ids.shape[1] :].tolist()


def _read_prompts(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Keys and values of all prompt tokens but the last, or None for a model that keeps anything else.

    Sliding windows, states of recurrent layers and caches of other kinds are not known to survive being repeated.
    """
    cache = DynamicCache(config=model.config)
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache if output.get("past_key_values") is cache else None
