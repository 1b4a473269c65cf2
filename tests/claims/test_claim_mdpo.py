"""What MDPO is compared with: one step is plain policy gradient; without the divergence only its first term is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from claims import mdpo, sampled, start, world
from claims.cells import Cell, Store
from datasets import Dataset

SHORT = {**sampled.SHAPE, **sampled.SMOKE, "prompts": 3, "group": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    start.quiet()
    return sampled.taught(Store(tmp_path_factory.mktemp("start")), smoke=True)


def varied(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [sum(map(ord, text)) % 17 / 4 for text in completions]


def rollout_of(method: str, folder: Path, scratch: Path) -> tuple[Any, Any]:
    cell = Cell("mdpo", method, 3, {**SHORT, **mdpo.METHODS[method]})
    model, tokenizer = world.load(folder)
    prompts = Dataset.from_list([{"prompt": prompt.text} for prompt in sampled.train_prompts(cell)])
    given = {"model": model, "reward_funcs": varied, "train_dataset": prompts, "processing_class": tokenizer}
    trainer = mdpo.build_trainer(cell, str(scratch), **given)
    trainer.model.train()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_one_step_is_plain_policy_gradient(folder: Path, tmp_path: Path) -> None:
    trainer, rollout = rollout_of("one", folder, tmp_path)
    assert trainer.args.num_iterations == 1 and rollout["advantages"].std() > 0.5
    scores = trainer.rollout_scores(trainer.model, rollout)
    trainer.rollout_loss(scores, rollout).sum().backward()
    found = [weights.grad.clone() for weights in trainer.model.parameters()]
    trainer.model.zero_grad()
    scores = trainer.rollout_scores(trainer.model, rollout)
    (-rollout["advantages"] * scores.policy).sum().backward()
    for own, weights in zip(found, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(own, weights.grad, rtol=1e-3, atol=1e-4)


def test_without_the_divergence_the_first_term_is_left(folder: Path, tmp_path: Path) -> None:
    losses = {}
    for method in ("mdpo", "free"):
        trainer, rollout = rollout_of(method, folder, tmp_path / method)
        with torch.no_grad():
            for weights in trainer.model.parameters():
                weights *= 1.01
            scores = trainer.rollout_scores(trainer.model, rollout)
        ratio = (scores.policy - scores.proposal).exp()
        first = -ratio * rollout["advantages"]
        second = ratio * ratio.log() - ratio + 1
        assert (ratio - 1).abs().max() > 0.01
        losses[method] = trainer.rollout_loss(scores, rollout) - first, second
    assert losses["free"][0].abs().max() < 1e-5
    torch.testing.assert_close(*losses["mdpo"], rtol=1e-4, atol=1e-5)
