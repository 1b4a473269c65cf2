"""The compact head: log-probs and gradients of full logits, for every kind of head, in bounded memory."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmalign.scores import text
from llmalign.scores.text import LogitRule, head_logps


def reference(head, hidden, targets, rule):
    return rule(head(hidden).float()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=3.0), LogitRule(2.0, 5.0)])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_values_and_gradients_equal_full_logits(monkeypatch, bias, rule, rows):
    monkeypatch.setattr(text, "CPU_CHUNK", 5 * 50)  # chunks of at most 5 rows
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias, dtype=torch.float64)
    hidden = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 50, (rows,)), torch.randn(rows)
    results = []
    for function in (head_logps, reference):
        logps = function(head, hidden, targets, rule)
        inputs = [hidden, *head.parameters()]
        results.append((logps, *torch.autograd.grad((logps * weights).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_tied_head_adds_both_of_its_gradients():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = embedding.weight
    ids, targets = torch.randint(0, 50, (9,)), torch.randint(0, 50, (9,))
    found, expected = (
        torch.autograd.grad(function(head, embedding(ids).tanh(), targets, LogitRule()).sum(), embedding.weight)[0]
        for function in (head_logps, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 3])
def test_no_more_than_the_kept_chunks_of_logits_are_ever_held(monkeypatch, kept):
    """All that autograd saves together, the weights aside, and every output of the head, forward and backward."""
    monkeypatch.setattr(text, "CPU_CHUNK", 4 * 1000)
    monkeypatch.setattr(text, "CPU_KEPT", kept)
    head = nn.Linear(8, 1000, bias=False)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    hidden, targets = torch.randn(64, 8, requires_grad=True), torch.randint(0, 1000, (64,))
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = head_logps(head, hidden, targets, LogitRule())
    for given in (head.weight, hidden, targets):
        saved.pop(given.data_ptr(), None)
    assert 0 <= sum(saved.values()) - kept * 4 * 1000 <= 8 * kept  # their log-probs, and a few numbers
    logps.sum().backward()
    assert sizes == [4] * (16 + 16 - kept)  # all others are computed twice


def test_autocast_computes_log_probs_in_float32():
    head, hidden = nn.Linear(16, 50), torch.randn(7, 16)
    targets = torch.randint(0, 50, (7,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = head_logps(head, hidden, targets, LogitRule())
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, reference(head, hidden, targets, LogitRule()), rtol=0.02, atol=0.02)


def test_an_adapter_on_the_head_counts():
    from peft import LoraConfig, get_peft_model

    from llmalign.scores.scoring import Scorer
    from llmalign.types import PromptGroups
    from tests.trainers import tiny

    base = tiny.model().eval()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    scorer = Scorer("auto", pad_token_id=0)
    scorer.choose(model.config)
    scorer.attach(model)
    groups = PromptGroups([[5, 6]], [[[7, 8], [9]]])
    scored = scorer.logps(model, groups, device=torch.device("cpu"))
    with torch.no_grad():
        full = [model(input_ids=torch.tensor([[5, 6, *c]])).logits[0].log_softmax(-1) for c in ([7, 8], [9])]
    expected = torch.stack([full[0][1, 7] + full[0][2, 8], full[1][1, 9]])
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert (scorer.logps(model, groups, device=torch.device("cpu")) - scored).abs().max() > 0.01


def test_the_rule_is_read_from_the_config():
    assert LogitRule.of(AutoConfig.for_model("llama")) == LogitRule()
    assert LogitRule.of(AutoConfig.for_model("gemma2")).softcap == 30.0
    assert LogitRule.of(AutoConfig.for_model("cohere")).scale == 0.0625
    assert LogitRule.of(AutoConfig.for_model("granite", logits_scaling=8.0)).scale == 0.125
