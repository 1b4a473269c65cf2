"""Our losses against TRL's own: its DPOTrainer computes a real batch, we score the same batch from full logits."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from llmalign.losses import dpo, ipo, rdpo, rpo
from llmalign.types import PairScores

PAIRS = [
    ("The river was", " calm in the morning.", " slow."),
    ("Please write a short", " and polite answer to the question.", " letter, then read it twice."),
    ("A good soup needs", " salt.", " the capital of France and some patience, of course."),
    ("She read", " it.", " onions."),
]


@pytest.fixture
def policy(tiny_model: PreTrainedModel) -> PreTrainedModel:
    return tiny_model


@pytest.fixture
def reference(policy: PreTrainedModel) -> PreTrainedModel:
    """A model near the policy: equal ones would leave every margin at nought."""
    moved = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return moved


def trl_loss(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **fields: object,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """TRL's loss of one batch of all pairs, its gradient in every weight of the policy, and the batch."""
    names = ("prompt", "chosen", "rejected")
    arguments = DPOConfig(
        str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", beta=0.3, **fields
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=arguments,
        train_dataset=Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in PAIRS]),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(PAIRS))])
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(trainer.model.parameters()))), batch


def summed_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen and rejected completions, from the full logits of the plain model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    chosen, rejected = (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    return chosen, rejected


def scored(policy: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, Tensor]) -> PairScores:
    with torch.no_grad():
        ref_chosen, ref_rejected = summed_logps(reference, batch)
    chosen_lengths, rejected_lengths = batch["completion_mask"].sum(1).chunk(2)
    return PairScores(
        *summed_logps(policy, batch),
        ref_chosen,
        ref_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )


def assert_equal(ours: Tensor, policy: PreTrainedModel, theirs: Tensor, their_gradients: list[Tensor]) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, list(policy.parameters())), their_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        (partial(dpo, beta=0.3), {"loss_type": "sigmoid"}),
        (partial(rdpo, beta=0.3, flip_rate=0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
        (partial(rdpo, beta=0.3, flip_rate=0.45), {"loss_type": "robust", "label_smoothing": 0.45}),
    ],
    ids=["sigmoid", "robust-.2", "robust-.45"],
)
def test_dpo_and_rdpo_are_trls_sigmoid_and_robust(loss, fields, policy, reference, tiny_tokenizer, tmp_path):
    theirs, their_gradients, batch = trl_loss(policy, reference, tiny_tokenizer, tmp_path, **fields)
    scores = scored(policy, reference, batch)
    margins = (scores.chosen - scores.ref_chosen - scores.rejected + scores.ref_rejected).abs()
    assert margins.min() > 1e-3  # or every loss would agree
    assert_equal(loss(scores).mean(), policy, theirs, their_gradients)


def test_trls_ipo_is_ours_on_means_per_token(policy, reference, tiny_tokenizer, tmp_path):
    theirs, their_gradients, batch = trl_loss(policy, reference, tiny_tokenizer, tmp_path, loss_type="ipo")
    scores = scored(policy, reference, batch)
    chosen, rejected = scores.chosen_lengths, scores.rejected_lengths
    assert chosen is not None and rejected is not None
    per_token = PairScores(
        scores.chosen / chosen, scores.rejected / rejected, scores.ref_chosen / chosen, scores.ref_rejected / rejected
    )
    assert ipo(scores, tau=0.3).mean().item() != pytest.approx(theirs.item(), rel=1e-2)
    assert_equal(ipo(per_token, tau=0.3).mean(), policy, theirs, their_gradients)


def test_trls_documented_rpo_is_another_objective(policy, reference, tiny_tokenizer, tmp_path):
    """TRL adds eta times the mean over all chosen tokens of the batch; the paper eta beta times each sum."""
    eta = 0.5
    mixture = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, eta]}
    theirs, their_gradients, batch = trl_loss(policy, reference, tiny_tokenizer, tmp_path, **mixture)
    scores = scored(policy, reference, batch)
    assert rpo(scores, beta=0.3, eta=eta).mean().item() != pytest.approx(theirs.item(), rel=1e-2)
    assert scores.chosen_lengths is not None
    token_mean = scores.chosen.sum() / scores.chosen_lengths.sum()
    assert_equal(dpo(scores, beta=0.3).mean() - eta * token_mean, policy, theirs, their_gradients)
