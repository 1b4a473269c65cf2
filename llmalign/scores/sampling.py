"""Completions sampled from a model, reproducibly."""

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text: the tokenizer's EOS and those of the model's generation config, sorted."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> list[list[int]]:
    """Sample one completion per prompt and return its token ids, the end token included where one was produced.

    Prompts are batched by length, longest first, so an out-of-memory shows at once. `temperature` 0 is greedy.
    The caller's random state, the model's mode and its generation config are untouched; the same seed, prompts and
    batch size give the same completions. `progress` wraps the iterable of batch starts. Not covered: beam search,
    several completions a prompt (repeat the prompt), models split over ranks (ZeRO-3, FSDP).
    """
    ends = end_token_ids(model, tokenizer)
    greedy = temperature == 0
    # Every option that changes the distribution is set: what is left open would come from the model's own config.
    # Greedy search has the library's defaults for the rest, or it warns that they have no effect.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=not greedy,
        temperature=1.0 if greedy else temperature,
        top_p=1.0 if greedy else top_p,
        top_k=50 if greedy else 0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
    )
    device = model.device
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    starts: Iterable[int] = range(0, len(order), batch_size)
    completions: list[list[int]] = [[] for _ in prompt_ids]
    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in progress(starts) if progress is not None else starts:
            rows = order[start : start + batch_size]
            width = max(len(prompt_ids[i]) for i in rows)
            pads = [width - len(prompt_ids[i]) for i in rows]
            ids = [[tokenizer.pad_token_id] * pad + list(prompt_ids[i]) for pad, i in zip(pads, rows, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
            for i, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                stops = [position for position, token in enumerate(tokens) if token in ends]
                completions[i] = tokens[: stops[0] + 1] if stops else tokens
    model.train(was_training)
    return completions
