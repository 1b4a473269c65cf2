"""Judges over HTTP: models behind OpenAI-compatible endpoints that say which answer is better.

The project's only client for them lives here, with its cache of answers and its budget. A judge that is a local model
or a Python function needs nothing of it.
"""

from llmalign.judges.chat import Answer, ChatRequest, Failure
from llmalign.judges.client import BudgetSpent, JudgeClient
from llmalign.judges.endpoint import JudgeStopped
from llmalign.judges.pairwise import PairwiseJudge
from llmalign.judges.reading import is_switched, letter_preference, logprob_preference
from llmalign.judges.template import DEFAULT_TEMPLATE, Template

__all__ = [
    "DEFAULT_TEMPLATE",
    "Answer",
    "BudgetSpent",
    "ChatRequest",
    "Failure",
    "JudgeClient",
    "JudgeStopped",
    "PairwiseJudge",
    "Template",
    "is_switched",
    "letter_preference",
    "logprob_preference",
]
