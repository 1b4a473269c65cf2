"""Pair-preference models: P(first answer beats second | prompt), a classifier that reads both answers at once.

The model is a sequence classifier of one label on a text of markers (`PairText`), its logit s(x, a, b) the log-odds
that the answer in the first place is better. It prefers a place too, so an answer is read in both: the probability is
sigmoid((s(x, a, b) - s(x, b, a)) / 2), and P(a beats b) + P(b beats a) = 1 whatever the model says.
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmalign.errors import UserError
from llmalign.rewards.classifiers import load_classifier
from llmalign.rewards.model import TOKENS_PER_BATCH, Content, RewardScorer, group_by_prompt

logger = logging.getLogger(__name__)

#: in a model's config, so that no other classifier is taken for one
CONFIG_KEY, FORM = "pair_preference", "markers-1"
MARKERS = ("[[PROMPT]]\n", "\n[[FIRST ANSWER]]\n", "\n[[SECOND ANSWER]]\n", "\n[[THE FIRST IS BETTER]]")
PROMPT_SHARE = 0.5  # of the room, at most, where the answers need the rest
_BRACKETS = re.compile(r"\[(?=\[)")  # what markers begin with


class PairText:
    """Token ids of a prompt with two answers, the same in training and in scoring.

    Prompt, first and second answer each stand after a marker and are tokenized on their own; a last marker ends the
    text. Conversations become lines `role: content`. Special tokens and markers inside the texts are read as plain
    text, so that an answer cannot pretend to be the other. What exceeds `max_length` tokens is cut: the prompt's
    beginning down to half of the room, then the ends of the answers, the longer one first; `cut` counts how often.
    Raises UserError where `max_length` leaves no room.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token
        beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._markers = [self._plain(marker) for marker in MARKERS]
        self._markers[0] = beginning + self._markers[0]
        self._room = None if max_length is None else max_length - sum(map(len, self._markers))
        if self._room is not None and self._room < 3:
            raise UserError(f"max_length {max_length} leaves no room for two answers beside the markers; raise it")
        self.cut = 0

    def ids(self, prompt: Content, first: Content, second: Content) -> list[int]:
        """The text with `first` in the first place."""
        parts = [self._part(prompt), self._part(first, answer=True), self._part(second, answer=True)]
        filled = zip(self._markers, [*self._fit(parts), []], strict=True)
        return [token for marker, part in filled for token in marker + part]

    def _part(self, content: Content, *, answer: bool = False) -> list[int]:
        if isinstance(content, str):
            text = content.removesuffix(self._eos) if answer else content
        elif answer and len(content) == 1:
            text = str(content[0]["content"])
        else:
            text = "\n".join(f"{message['role']}: {message['content']}" for message in content)
        return self._plain(_BRACKETS.sub("[ ", text))

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _fit(self, parts: list[list[int]]) -> list[list[int]]:
        prompt, *answers = parts
        if self._room is None or sum(map(len, parts)) <= self._room:
            return parts
        self.cut += 1
        wanted = sum(map(len, answers))
        own = min(len(prompt), max(self._room - wanted, int(self._room * PROMPT_SHARE)))
        left = self._room - own
        shorter = min(map(len, answers))
        limit = max(left - shorter, left // 2)
        return [prompt[len(prompt) - own :], *(answer[:limit] for answer in answers)]


class PreferenceModel:
    """Probabilities that one answer beats another, in batches; texts or conversations in.

    The prompt is read once for both orders. A text above `max_length` tokens (default: the model's positions) is cut as
    PairText says, which is logged once and counted in `truncated`. Raises UserError for a model that was not trained as
    a pair-preference model. Not covered: ties, and models that answer in words (such as a language model choosing
    between A and B).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        progress: bool = False,
    ) -> None:
        require_pair_preference(model.config)
        self.model, self.tokenizer = model, tokenizer
        self.scorer = RewardScorer(model, pad_token_id=tokenizer.pad_token_id)
        self.text = PairText(tokenizer, max_length or model.config.to_dict().get("max_position_embeddings"))
        self._tokens_per_batch, self._progress = tokens_per_batch, progress

    @property
    def truncated(self) -> int:
        """How many texts were cut so far; every pair is two."""
        return self.text.cut

    def score(self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content]) -> list[float]:
        """P(first beats second) of each of N pairs."""
        return torch.sigmoid(self.logits(prompts, first, second)).tolist()

    def logits(self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content]) -> Tensor:
        """Log-odds (N,) float64 that first beats second: the mean of both orders, so exactly 0 for equal answers."""
        if not len(prompts) == len(first) == len(second):
            raise UserError(f"{len(prompts)} prompts need as many answers, got {len(first)} and {len(second)}")
        if not len(prompts):
            return torch.zeros(0, dtype=torch.float64)
        before = self.text.cut
        rows = list(zip(prompts, first, second, strict=True))
        sequences = [self.text.ids(*order) for x, a, b in rows for order in ((x, a, b), (x, b, a))]
        if self.text.cut and not before:
            logger.warning(
                "%d of %d texts are longer than the preference model reads and are cut; later ones are counted and not "
                "logged.",
                self.text.cut, len(sequences),
            )  # fmt: skip
        keys = [key for prompt in prompts for key in [json.dumps(prompt)] * 2]
        groups, order = group_by_prompt(keys, sequences)
        logits = torch.zeros(len(sequences), dtype=torch.float64)
        scored = self.scorer.score(groups, tokens_per_batch=self._tokens_per_batch, progress=self._progress)
        logits[order] = scored.double()
        # Equal texts score alike but for the rounding of their places in the batch.
        equal = torch.tensor([a == b for a, b in zip(sequences[0::2], sequences[1::2], strict=True)])
        return ((logits[0::2] - logits[1::2]) / 2).masked_fill(equal, 0.0)


def load_preference_model(
    path: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreferenceModel:
    """The pair-preference model of a folder that `method: preference` wrote; `options` are PreferenceModel's.

    Raises UserError as `load_classifier` does, and for another kind of model. An adapter's base says nothing of what
    the adapter is for, so that is taken on trust, and logged.
    """
    model, tokenizer = load_classifier(
        path, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        logger.info("%s is an adapter: that it was trained as a pair-preference model is taken on trust.", path)
        mark_pair_preference(model.config)
    return PreferenceModel(model, tokenizer, **options)


def mark_pair_preference(config: PretrainedConfig) -> None:
    """Write into a config that its model reads pairs."""
    config.update({CONFIG_KEY: FORM})


def require_pair_preference(config: PretrainedConfig) -> None:
    """Raise UserError unless the config says that its model reads pairs, in the form that this version writes."""
    found = config.to_dict().get(CONFIG_KEY)
    if found != FORM:
        what = "it was not trained as one" if found is None else f"its texts are of the form {found!r}, not {FORM!r}"
        raise UserError(f"this is no pair-preference model ({what}); train one with method: preference")
