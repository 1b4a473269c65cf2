"""How far a policy has moved from its reference, and how far it is from a target, estimated from samples."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
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


def target_terms(policy: Tensor, proposal: Tensor, log_p: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
    """Importance-sampled terms (N,) of the divergences between a policy pi and a target p; each metric is their mean.

    `policy`, `proposal`, `log_p`, `base` (N,): log-probabilities of samples of the proposal q under pi, q, the
    normalised target (log P - log Z, -inf where p = 0) and the frozen base a. With w_p = p/q and w_pi = pi/q: `kl_p_pi`
    w_p log(p/pi); `kl_pi_p` w_pi log(pi/p), +inf where p = 0; `tv` |w_p - w_pi|/2; `js` half of KL(p||m) and half of
    KL(pi||m) with m = (p + pi)/2; `kl_pi_base` w_pi log(pi/a), with a base; `entropy` -w_pi log pi; `weight` w_pi,
    whose mean is 1 but for chance. In nats, but for tv and weight; detached float64. Raises ValueError for shapes that
    differ. Not covered: the variance, which is huge for a q that is far from either.
    """
    given = {"policy": policy, "proposal": proposal, "log_p": log_p} | ({} if base is None else {"base": base})
    for name, value in given.items():
        if value.shape != policy.shape:
            raise ValueError(f"{name} must have the shape of policy, {tuple(policy.shape)}, got {tuple(value.shape)}.")
    pi, q, p = (value.detach().double() for value in (policy, proposal, log_p))
    possible = ~p.isneginf()
    safe = torch.where(possible, p, torch.zeros_like(p))
    w_pi = (pi - q).exp()
    w_p = torch.where(possible, (safe - q).exp(), torch.zeros_like(p))
    gap = pi - safe
    # log(p/m) = log 2 + log sigmoid(log p - log pi), and likewise for pi; where p = 0 it is log 2 for pi.
    to_middle = torch.where(possible, F.logsigmoid(gap), torch.zeros_like(gap)) + math.log(2)
    terms = {
        "kl_p_pi": -w_p * gap,
        "kl_pi_p": torch.where(possible, w_pi * gap, torch.inf),
        "tv": (w_p - w_pi).abs() / 2,
        "js": (w_p * (F.logsigmoid(-gap) + math.log(2)) + w_pi * to_middle) / 2,
        "entropy": -w_pi * pi,
        "weight": w_pi,
    }
    if base is not None:
        terms["kl_pi_base"] = w_pi * (pi - base.detach().double())
    return terms


def target_metrics(
    policy: Tensor,
    proposal: Tensor,
    log_p: Tensor,
    base: Tensor | None = None,
    features: Tensor | None = None,
) -> dict[str, float]:
    """The means of `target_terms`, and of `features` (N, K) under the policy as `satisfied_0` ... `satisfied_K-1`.

    For samples of one process; over several, add the terms up and divide once. Errors are those of `target_terms`, and
    ValueError for features that have not one row a sample, or for no samples.
    """
    if len(policy) == 0:
        raise ValueError("at least one sample is needed to estimate a divergence.")
    terms = target_terms(policy, proposal, log_p, base)
    if features is not None:
        if features.dim() != 2 or len(features) != len(policy):
            raise ValueError(f"features must have shape ({len(policy)}, K), got {tuple(features.shape)}.")
        for place, column in enumerate(features.double().unbind(dim=1)):
            terms[f"satisfied_{place}"] = terms["weight"] * column
    return {name: float(values.mean()) for name, values in terms.items()}
