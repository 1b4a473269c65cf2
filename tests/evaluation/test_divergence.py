"""The sampled KL against its exact value."""

import pytest
import torch

from llmalign.embedded import build_model, build_tokenizer
from llmalign.evaluation.divergence import sampled_kl


def test_a_model_does_not_diverge_from_itself() -> None:
    tokenizer, model = build_tokenizer(), build_model(build_tokenizer())
    found = sampled_kl(model, model, tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=4)
    assert (found.mean, found.low, found.high, found.n) == (0, 0, 0, 2)


def test_one_token_has_the_exact_divergence() -> None:
    tokenizer = build_tokenizer()
    model, reference = build_model(tokenizer, seed=0), build_model(tokenizer, seed=1)
    prompt = tokenizer("Set a gloomy scene at the attic.\n")["input_ids"]
    with torch.no_grad():
        own, other = (one(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for one in (model, reference))
    exact = float((own.exp() * (own - other)).sum())
    assert exact > 0.1
    # One prompt is one cluster, so the interval has no width; the sample's own error is what bounds the mean.
    found = sampled_kl(model, reference, tokenizer, [prompt] * 600, max_new_tokens=1, batch_size=300)
    deviation = float((own.exp() * (own - other - exact) ** 2).sum()) ** 0.5
    assert found.mean == pytest.approx(exact, abs=4 * deviation / 600**0.5)
    assert found.n == 600
