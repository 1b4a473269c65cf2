"""Sequence scores and sampling on a tiny model."""

import pytest
import torch

from llmalign.scores import sample_completions, sequence_logps
from llmalign.scores.text import completion_logps
from tests.trainers import tiny


def naive(model, prompt, completion):
    """One sequence, one token at a time."""
    total, ids = 0.0, list(prompt)
    for token in completion:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += torch.log_softmax(logits, dim=0)[token].item()
        ids.append(token)
    return total


def test_scores_equal_a_token_by_token_loop_whatever_the_batch():
    model = tiny.model().eval()
    sequences = [([5, 6, 7], [8, 9, 1]), ([10], [11, 12, 13, 14, 1]), ([20, 21], [1])]
    with torch.no_grad():
        expected = torch.tensor([naive(model, *s) for s in sequences])
    for size in (1, 2, 3):
        scored = sequence_logps(model, sequences, pad_token_id=0, batch_size=size)
        torch.testing.assert_close(scored, expected.float(), rtol=0, atol=1e-5)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        sequence_logps(tiny.model(), [([1], [2]), ([], [2])], pad_token_id=0)


def test_sums_run_in_float32():
    # 500 tokens of -0.01 in bfloat16 lose most of their sum when added one after the other in bfloat16.
    values = torch.full((502,), -0.01, dtype=torch.bfloat16)
    sums = completion_logps(values, [500, 0, 2])
    assert sums.tolist() == pytest.approx([500 * values[0].item(), 0.0, 2 * values[0].item()], rel=1e-6)
    assert sums.dtype == torch.float32


def test_sampling_is_reproducible_and_leaves_the_caller_s_state():
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    before = torch.get_rng_state()
    first = sample_completions(model, tokenizer, prompts, max_new_tokens=8, seed=3)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert first == sample_completions(model, tokenizer, prompts, max_new_tokens=8, seed=3)
    assert first != sample_completions(model, tokenizer, prompts, max_new_tokens=8, seed=4)


def test_completions_end_with_the_end_token_and_hold_nothing_behind_it():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.2
    drawn = sample_completions(model, tokenizer, [[5]] * 64, max_new_tokens=30, seed=0)
    ended = [ids for ids in drawn if ids[-1] == tokenizer.eos_token_id]
    assert ended and all(tokenizer.eos_token_id not in ids[:-1] for ids in drawn)
    assert all(tokenizer.pad_token_id not in ids[ids.index(tokenizer.eos_token_id) :] for ids in ended)


def test_samples_follow_the_model_at_temperature_one():
    """The first token's frequencies over 4,000 samples, within four standard errors, whatever the model's config."""
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    model.generation_config.top_p, model.generation_config.repetition_penalty = 0.5, 2.0  # must not be used
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1], dim=0)
    drawn = sample_completions(model, tokenizer, [[5, 6]] * 4000, max_new_tokens=1, seed=1, batch_size=1000)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=264) / 4000
    error = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((counts - probabilities).abs() <= 4 * error + 1e-3).all()


def test_greedy_takes_the_most_likely_token():
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    ids = sample_completions(model, tokenizer, [[5, 6]], max_new_tokens=1, temperature=0)[0]
    with torch.no_grad():
        assert ids == [model(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()]
