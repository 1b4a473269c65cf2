"""An image run whose loss stops being finite: rows by their captions, weights as they were, rounds that go on."""

import json
import math

import pytest
import torch
from transformers import TrainerCallback

from llmalign.errors import UserError
from tests.diffusion.drawing import captions, online
from tests.diffusion.training import CAPTIONS, pairs, trainer


class Spoil(TrainerCallback):
    """Makes one trained weight infinite before a step, and mends it after."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}
        if state.global_step + 1 == self.step:
            next(value for value in model.parameters() if value.requires_grad).data.view(-1)[0] = math.inf

    def mend(self, model):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(self.before[name])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.mend(model)


def lines_of(folder, step):
    return [json.loads(line) for line in (folder / "non_finite" / f"step-{step}.jsonl").read_text().splitlines()]


def test_pairs_of_pictures(tiny_pipeline, tmp_path):
    """The row is found by its number; what a huge learning rate does to the weights of the second step shows there."""
    built = trainer(tiny_pipeline("sd"), tmp_path, max_steps=3, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(UserError, match=r"The (loss|gradient) of step 2 is not finite.*lower learning_rate"):
        built.train()
    lines = lines_of(tmp_path / "out", 2)
    raw = pairs()
    assert len(lines) == 4 and built.state.global_step == 1
    assert all(line["caption"] == raw[line["row"]]["caption"] for line in lines)


def test_a_skipped_step_of_d3po_keeps_the_round(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, non_finite="skip", logging_steps=1)
    spoil = Spoil(2)
    built.add_callback(spoil)
    result = built.train()
    assert result.metrics["non_finite/skipped"] == 1
    lines = lines_of(tmp_path / "out", 2)
    known = set(captions()["caption"])
    assert lines and all(line["caption"] in known and "step" in line and "pair" in line for line in lines)
    assert all(bool(value.isfinite().all()) for value in built.model.parameters())


def test_captions_of_the_rows_are_the_data_s():
    assert set(CAPTIONS) == {row["caption"] for row in pairs()}
