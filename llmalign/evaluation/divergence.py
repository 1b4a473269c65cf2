"""How far a policy has moved from its reference, estimated from its own samples."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmalign.evaluation.winrate import Estimate, bootstrap_mean
from llmalign.scores.sampling import sample_completions
from llmalign.scores.text import sequence_logps


def sampled_kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Estimate:
    """KL(model || reference) in nats a response: the mean of log model(y|x) - log reference(y|x) over y from the model.

    One response is drawn at temperature 1 for each entry of `prompt_ids`; a prompt may stand there several times, and
    the interval draws whole prompts. The estimate is unbiased and may fall below zero by chance. Responses are cut at
    `max_new_tokens`, so divergence beyond them is not covered.
    """
    drawn = sample_completions(
        model,
        tokenizer,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    sequences = list(zip(prompt_ids, drawn, strict=True))
    own, other = (
        sequence_logps(one, sequences, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
        for one in (model, reference)
    )
    return bootstrap_mean((own - other).tolist(), [tuple(ids) for ids in prompt_ids], seed=seed)
