"""Every layout against the model's own full logits, sequence by sequence: each architecture of the table is proven."""

import logging
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmalign.errors import UserError
from llmalign.scores import prefix
from llmalign.scores.scoring import (
    KINDS,
    PADDED,
    PADDING_FREE,
    PROVEN,
    SHARED_PROMPT,
    Gaps,
    Scorer,
    batch_dependent,
    shortest_window,
    why_not,
)
from llmalign.types import PromptGroups

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
EXTRA = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


def build(kind, *, attention="sdpa", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | EXTRA.get(kind, {}) | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def ragged(seed=0, empty=False):
    """Prompts of 7, 1 and 12 tokens with 2, 3 and 1 completions of unlike lengths, one of a single token."""
    rng = random.Random(seed)

    def ids(count):
        return [rng.randrange(3, 97) for _ in range(count)]

    last = [ids(3), []] if empty else [ids(3)]
    return PromptGroups([ids(7), ids(1), ids(12)], [[ids(5), ids(9)], [ids(1), ids(4), ids(1)], last])


def from_full_logits(model, groups):
    """Log-probs (N,) from the logits of one sequence at a time."""
    totals = []
    for prompt, completion in groups.sequences():
        logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        totals.append(sum((logps[len(prompt) - 1 + i, token] for i, token in enumerate(completion)), torch.zeros(())))
    return torch.stack(totals)


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ready(model, requested="auto"):
    scorer = Scorer(requested, pad_token_id=0)
    scorer.choose(model.config)
    scorer.attach(model)
    return scorer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", sorted(PROVEN))
def test_log_probs_and_gradients_of_every_proven_architecture(monkeypatch, architecture, checkpointing):
    monkeypatch.setattr(prefix, "BLOCK", 4)  # so that these short texts take several blocks
    model = build(architecture)
    if checkpointing:
        model.gradient_checkpointing_enable()
    groups = ragged()
    scorer = ready(model)
    assert scorer.kind == SHARED_PROMPT
    expected = from_full_logits(model, groups)
    wanted = gradients(model, expected)
    for kind in (SHARED_PROMPT, PADDING_FREE, PADDED):
        scored = scorer.logps(model, groups, device=CPU, kind=kind)
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
        found = gradients(model, scored)
        assert set(found) == set(wanted)
        for name, gradient in wanted.items():
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=f"{kind} {name}")


def test_the_layout_never_feeds_a_prompt_twice_and_pads_nothing():
    groups = ragged()
    scorer = ready(build("llama"))
    shared, free, padded = (scorer.lay_out(groups, CPU, kind) for kind in (SHARED_PROMPT, PADDING_FREE, PADDED))
    completions = sum(groups.lengths()) - len(groups.lengths())  # the last token of each is not fed
    assert shared.inputs["input_ids"].numel() == 20 + completions
    assert free.inputs["input_ids"].numel() == 2 * 7 + 3 * 1 + 12 + completions
    assert padded.inputs["input_ids"].shape == (6, 15)
    assert shared.lengths == free.lengths == padded.lengths == groups.lengths()
    assert shared.targets.tolist() == padded.targets.tolist()


@pytest.mark.parametrize("kind", [SHARED_PROMPT, PADDING_FREE, PADDED])
def test_an_empty_completion_scores_nothing(kind):
    model, groups = build("llama"), ragged(empty=True)
    scored = ready(model).logps(model, groups, device=CPU, kind=kind)
    torch.testing.assert_close(scored, from_full_logits(model, groups), rtol=1e-5, atol=1e-5)
    assert scored[-1] == 0


def test_flex_attention_reads_the_same_forest():
    """Forward only: on a CPU flex attention has no backward."""
    groups = ragged()
    model = build("qwen2", attention="flex_attention")
    expected = from_full_logits(build("qwen2"), groups)
    with torch.no_grad():
        scored = ready(model).logps(model, groups, device=CPU, kind=SHARED_PROMPT)
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_held_to_twice_the_noise_of_a_split_batch(monkeypatch):
    model = build("llama").bfloat16()
    scorer = ready(model)
    gaps = scorer.gaps(model, ragged(), device=CPU, exact=False, limit=1e-4)
    assert gaps.passed
    monkeypatch.setattr(scorer, "split_gap", lambda *args, **options: 0.3)
    assert scorer.gaps(model, ragged(), device=CPU, exact=False, limit=1e-4).limit == 0.6
    assert scorer.gaps(model, ragged(), device=CPU, exact=True, limit=1e-4).limit == 1e-4


# What cannot be scored as trees: other attention, recurrent layers, capped logits, windows. Each falls back by itself.
UNFIT = {
    "gemma2": {"sliding_window": 8},  # soft-capped, every other layer with a window
    "gemma3_text": {"sliding_window": 8},
    "qwen3_next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention", "full_attention"],
    },  # linear attention
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},  # hybrid
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("architecture", UNFIT)
def test_an_unproven_architecture_is_padded_and_right(architecture, caplog):
    attention = "eager" if architecture == "gemma2" else "sdpa"  # gemma2 caps the scores, which sdpa cannot
    model = build(architecture, attention=attention, **UNFIT[architecture])
    scorer = ready(model)
    assert scorer.kind == PADDED and architecture in scorer.reason
    groups = ragged()
    scored = scorer.logps(model, groups, device=CPU)
    torch.testing.assert_close(scored, from_full_logits(model, groups), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"scoring: shared_prompt is not possible: the architecture {architecture}"):
        Scorer(SHARED_PROMPT, pad_token_id=0).choose(model.config)


@pytest.mark.parametrize(("window", "layouts"), [(8, {PADDED}), (21, {SHARED_PROMPT})])
def test_a_window_shorter_than_the_batch_falls_back(window, layouts):
    model = build("mistral", sliding_window=window)
    scorer = ready(model)
    groups = ragged()
    assert {PADDED if "branches" not in scorer.lay_out(groups, CPU).inputs else scorer.kind} == layouts
    scored = scorer.logps(model, groups, device=CPU)
    torch.testing.assert_close(scored, from_full_logits(model, groups), rtol=1e-5, atol=1e-5)
    forced = scorer.logps(model, groups, device=CPU, kind=SHARED_PROMPT)
    assert ((forced - scored).abs().max() > 0.01) == (window == 8)  # what the guard is for


def test_windows_are_read_as_the_models_use_them():
    assert shortest_window(AutoConfig.for_model("mistral", sliding_window=4096)) == 4096
    assert shortest_window(AutoConfig.for_model("mistral", sliding_window=None)) is None
    assert shortest_window(AutoConfig.for_model("qwen2", sliding_window=64, use_sliding_window=False)) is None
    assert shortest_window(AutoConfig.for_model("llama")) is None


def test_rotary_embeddings_that_follow_the_batch_are_padded_and_not_cached():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **SMALL | {"rope_parameters": rope})
    config._attn_implementation = "sdpa"
    assert batch_dependent(config) and "longest position" in why_not(config)
    assert not batch_dependent(AutoConfig.for_model("llama"))


def test_eager_attention_is_padded():
    config = build("llama", attention="eager").config
    scorer = Scorer("auto", pad_token_id=0)
    scorer.choose(config)
    assert scorer.kind == PADDED and "eager" in scorer.reason


def test_a_layout_that_fails_its_check_is_left_or_refused(caplog):
    caplog.set_level(logging.WARNING, logger="llmalign")  # whatever tests before it in this process left
    scorer = ready(build("llama"))
    scorer.settle(Gaps(0.5, 1e-4))
    assert scorer.kind == PADDING_FREE and "falling back on padding_free" in caplog.text
    scorer.settle(Gaps(float("nan"), 1e-4))
    assert scorer.kind == PADDED
    named = ready(build("llama"), SHARED_PROMPT)
    with pytest.raises(UserError, match="0.5 nats from the padded layout"):
        named.settle(Gaps(0.5, 1e-4))


def test_an_attention_that_ignores_the_forest_is_caught_on_a_batch(monkeypatch):
    model = build("llama")
    scorer = ready(model)
    assert scorer.gaps(model, ragged(), device=CPU, exact=True, limit=1e-4).passed
    model.set_attn_implementation("sdpa")  # does not know the forest
    assert not scorer.gaps(model, ragged(), device=CPU, exact=True, limit=1e-4).passed


def test_kinds_are_those_of_the_recipes():
    assert KINDS == ("auto", "shared_prompt", "padding_free", "padded")
