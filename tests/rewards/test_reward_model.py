"""Rewards with a shared prompt, against the classifier's own forward one sequence at a time."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from llmalign.errors import UserError
from llmalign.rewards.model import RewardScorer
from tests.scores.test_proven import SMALL as BASE
from tests.scores.test_proven import AutoConfig, ragged


def classifier(kind, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **BASE | {"num_labels": 1} | options)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("kind", "options", "layout"),
    [
        ("llama", {}, "shared_prompt"),
        ("qwen2", {}, "shared_prompt"),
        ("mistral", {"sliding_window": 8}, "shared_prompt"),  # the batch is longer: padded, and right
        ("gemma3_text", {"sliding_window": 8}, "padded"),
    ],
)
def test_rewards_equal_the_classifier_s_own(kind, options, layout):
    model = classifier(kind, **options).eval()
    groups = ragged()
    expected = torch.stack([model(torch.tensor([p + c])).logits[0, 0] for p, c in groups.sequences()])
    scorer = RewardScorer(model, pad_token_id=0)
    assert scorer.kind == layout
    torch.testing.assert_close(scorer.rewards(groups), expected.detach(), rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_several_labels_are_refused():
    with pytest.raises(UserError, match="one number, this one has 3 labels"):
        RewardScorer(classifier("llama", num_labels=3), pad_token_id=0)
