"""The ledger counts what a pass holds: by hand on two layers, and to the byte beside real tensors on real models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmalign.plan.outline import TextOutline, decoder_layers
from llmalign.plan.passes import DPO, OURS, SCORER, SFT, Pass, Passes
from llmalign.plan.rows import Lengths
from llmalign.plan.trace import HEAD, Ledger, Peak, extended, largest, traced, weightless, without_numbers
from llmalign.scores.scoring import PADDED, SHARED_PROMPT, Scorer

ROWS = Lengths.alike(2, 40, [30, 20])


def outline(family: str, layers: int = 3) -> TextOutline:
    shape: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": layers, "num_attention_heads": 4}
    shape |= {"hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family != "gpt2":
        shape |= {"num_key_value_heads": 2, "intermediate_size": 160}
    config = AutoConfig.for_model(family, **shape)
    config._attn_implementation = "sdpa"
    return TextOutline(family, config, torch.float32)


def test_two_linear_layers_by_hand() -> None:
    """8 rows of 16 numbers through 16 -> 32 -> 4: what lives at the worst moment can be written down."""
    with torch.device("meta"):
        model: nn.Module = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    with without_numbers():
        model = weightless(model)
        rows = torch.zeros(8, 16)
        (peak,) = traced(model, lambda _: model(rows).sum().backward()).values()
    hidden, output = 8 * 32 * 4, 8 * 4 * 4
    second, first = 4 * 32 * 4, 32 * 16 * 4
    # At the end: the second layer's gradient is there, and the first's is made from the gradient before the ReLU. What
    # the ReLU gave is freed by then; the scalar loss and its gradient are 4 bytes each.
    at_the_end = second + first + hidden
    # Before: the loss and its gradient, the second layer's gradient and the hidden states' beside the ReLU's output.
    assert at_the_end <= peak.total <= at_the_end + hidden + output + 8
    assert peak.logits == peak.copies == 0


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass, weights left out: an independent count."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize(
    "family, kind", [("llama", SHARED_PROMPT), ("llama", PADDED), ("qwen2", PADDED), ("gpt2", PADDED)]
)
def test_activations_equal_what_autograd_saves(family: str, kind: str) -> None:
    """A real model's saved tensors, counted by PyTorch's own hooks, beside what the ledger holds after its forward."""
    own = outline(family)
    torch.manual_seed(0)
    real: Any = own.build().to_empty(device="cpu")
    for weight in real.parameters():
        nn.init.normal_(weight, std=0.02)
    for name, buffer in real.named_buffers():  # rotary frequencies, which to_empty leaves open
        buffer.fill_(0.01) if "inv_freq" in name else buffer.zero_()
    scorer = Scorer(kind, pad_token_id=0)
    scorer.choose(real.config)
    scorer.attach(real)
    layout = scorer.lay_out(ROWS.groups(), torch.device("cpu"))
    with saved_bytes(real) as kept:
        score = scorer.score(real, layout)
    held = sum(kept.values())
    del score
    with without_numbers():
        model = weightless(own.build())
        fake = Scorer(kind, pad_token_id=0)
        fake.choose(own.config)
        fake.attach(model)
        ledger = Ledger()
        ledger.know(model)
        layout = fake.lay_out(ROWS.groups(), torch.device("cpu"))
        with ledger:
            score = fake.score(model, layout)
            found = ledger.now.total
        assert score.requires_grad  # held until here, and what it was made of with it
        ledger.let_go()
    given = sum(t.numel() * t.itemsize for t in (layout.inputs["input_ids"], layout.scored, layout.targets))
    assert found == pytest.approx(held, rel=0.01, abs=given + 4096)


@pytest.mark.parametrize(
    "step, kind, checkpointing",
    [
        (OURS, SHARED_PROMPT, True),
        pytest.param(OURS, SHARED_PROMPT, False, marks=pytest.mark.slow),
        pytest.param(OURS, PADDED, True, marks=pytest.mark.slow),
        pytest.param(SFT, PADDED, True, marks=pytest.mark.slow),
        pytest.param(DPO, PADDED, False, marks=pytest.mark.slow),
    ],
)
def test_few_layers_extend_to_all(step: str, kind: str, checkpointing: bool) -> None:
    passes = Passes(outline("llama", layers=6), step=step)
    what = Pass(ROWS, kind, reference=step == OURS, checkpointing=checkpointing)
    whole = largest(list(passes.phases(what, 6).values()))
    assert passes.peak(what).total == pytest.approx(whole.total, rel=0.005)


def test_rows_without_padding_may_be_one() -> None:
    """Three pairs and the one row that stands for them, forward, reference and backward."""
    passes = Passes(outline("llama", layers=2))
    rows = Lengths(np.array([40, 25, 61]), np.array([30, 20, 11, 44, 25, 25]), np.array([2, 2, 2]))
    merged = rows.merged()
    assert merged.completions.tolist() == [66, 89]
    assert sum(rows.sizes(SHARED_PROMPT).tokens) == merged.prompts[0] + 66 + 89 + 4
    all_of_them, one = (
        largest(list(passes.phases(Pass(each, SHARED_PROMPT, reference=True), 2).values())) for each in (rows, merged)
    )
    assert one.total == pytest.approx(all_of_them.total, rel=0.01)


def test_extension_is_a_line_for_each_phase() -> None:
    few, more = {HEAD: Peak(100, 20), "top": Peak(40)}, {HEAD: Peak(150, 20), "top": Peak(45)}
    assert extended(few, more, (2, 3), 10) == Peak(500, 20)


def test_gradients_that_are_there_are_counted() -> None:
    passes = Passes(outline("llama", layers=2))
    first = passes.peak(Pass(ROWS, SHARED_PROMPT))
    again = passes.peak(Pass(ROWS, SHARED_PROMPT, gradients=True))
    own = passes.outline.weights()
    assert again.gradients == pytest.approx(own.trained_bytes)
    assert first.total < again.total <= first.total + own.trained_bytes + 300 * 64 * 4


def test_bfloat16_copies_of_weights_are_told_apart() -> None:
    passes = Passes(outline("llama", layers=2))
    mixed = passes.peak(Pass(ROWS, PADDED, bf16=True))
    linear = sum(weight.numel() for weight in passes.outline.build().parameters() if weight.ndim == 2)
    embeddings = 300 * 64  # looked up, not multiplied
    assert mixed.copies == pytest.approx(2 * (linear - embeddings), rel=0.01)
    assert passes.peak(Pass(ROWS, PADDED, bf16=True, engine=True)).copies == 0


def test_a_classifier_has_no_logits() -> None:
    passes = Passes(TextOutline("llama", outline("llama").config, torch.float32, scorer=True), step=SCORER)
    assert passes.peak(Pass(ROWS, PADDED)).logits == 0


def test_the_layers_are_found() -> None:
    model = outline("gpt2", layers=5).build()
    layers = decoder_layers(model, 5)
    assert layers is not None and len(layers) == 5
    assert decoder_layers(model, 7) is None
