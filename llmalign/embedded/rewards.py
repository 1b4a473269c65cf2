"""Reward and preference functions of the embedded world, for recipes: `llmalign.embedded.rewards:worth`."""

import math
from collections.abc import Sequence
from typing import Any

from llmalign.embedded.truth import proxy_score, score, traits


def worth(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The ground truth of every answer, 4.5 at best."""
    return [score(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def proxy(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A biased judge of every answer, which likes courteous and long ones and never checks what was asked."""
    return [proxy_score(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def courteous(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for an answer with a courteous sentence, else 0."""
    return [float(traits(prompt, answer).courtesy > 0) for prompt, answer in zip(prompts, completions, strict=True)]


def better(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """P(first beats second) of every pair: the logistic function of the difference of their ground truths."""
    rows = zip(prompts, first, second, strict=True)
    return [1 / (1 + math.exp(score(prompt, other) - score(prompt, own))) for prompt, own, other in rows]
