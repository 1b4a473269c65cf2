"""Rewards of completions under a reward model: one number each, the prompt read once for all of its completions."""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from llmalign.errors import UserError
from llmalign.rewards.classifiers import load_classifier, reward_statistics, set_statistics, store_statistics
from llmalign.scores.prefix import IMPLEMENTATIONS, lay_out_trees, register_attention
from llmalign.scores.rounding import rounded_limit
from llmalign.scores.scoring import PADDED, SHARED_PROMPT, Gaps, shortest_window, why_not
from llmalign.types import PromptGroups

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
TOKENS_PER_BATCH = 16384

Content = str | list[dict[str, Any]]


class RewardScorer:
    """Scores prompts with completions by a sequence classifier of one label, read where the classifier reads itself.

    That is the last token which is not its config's pad token, so that a model trained with pad = EOS is read before
    the EOS. Prompts are shared where the architecture is proven for it and no sequence exceeds its sliding window, else
    every sequence is padded on the right; `kind` says which. The first batch is scored both ways: rewards must agree to
    1e-4 (more where float32 rounds large ones by more), in lower precision to twice what splitting the padded batch
    changes, else all is padded and a warning says so. Raises UserError for a model of several labels. Not covered:
    gradients, models wrapped for training, adapters.
    """

    def __init__(self, model: PreTrainedModel, *, pad_token_id: int) -> None:
        if model.config.num_labels != 1:
            raise UserError(f"a reward model gives one number, this one has {model.config.num_labels} labels")
        self._model: Any = model
        self._pad_token_id = pad_token_id
        self._ignored = model.config.get_text_config().pad_token_id
        self._window = shortest_window(model.config)
        # The others (encoders, older decoders) have heads of their own, which only their own forward knows.
        self._generic = isinstance(model, GenericForSequenceClassification)
        if not self._generic and self._ignored is None:
            model.config.pad_token_id = pad_token_id
        obstacle = why_not(model.config) if self._generic else "its head is not the usual one"
        self.kind = PADDED if obstacle else SHARED_PROMPT
        self.checked = self.kind == PADDED
        self._flex = model.config._attn_implementation == "flex_attention"
        if self.kind == SHARED_PROMPT:
            register_attention()
            current = model.config._attn_implementation
            model.set_attn_implementation(IMPLEMENTATIONS.get(current, current))
        else:
            logger.info("Rewards: padded (%s).", obstacle)

    @torch.no_grad()
    def rewards(self, groups: PromptGroups) -> Tensor:
        """Rewards (N,) float32 on the CPU, prompt by prompt, of one batch; prompts must not be empty."""
        was_training = self._model.training
        self._model.eval()
        rewards = self._batch(groups)
        self._model.train(was_training)
        return rewards

    def score(
        self, groups: PromptGroups, *, tokens_per_batch: int = TOKENS_PER_BATCH, progress: bool = False
    ) -> Tensor:
        """Rewards (N,) float32 on the CPU of any number of prompts, in batches of about so many tokens.

        A batch holds whole prompts, at least one, the longest first, so that an out-of-memory shows at once.
        """
        starts = [0, *itertools.accumulate(groups.counts())]
        results = torch.zeros(sum(groups.counts()))
        for rows in tqdm(list(groups.batches(tokens_per_batch)), desc="Scoring", unit="batch", disable=not progress):
            places = [starts[row] + place for row in rows for place in range(len(groups.completions[row]))]
            results[places] = self.rewards(groups.take(rows))
        return results

    def _batch(self, groups: PromptGroups) -> Tensor:
        if self.kind == PADDED or not self._can_share(groups):
            return self._padded(groups)
        if not self.checked:
            self._check(groups)
            return self._batch(groups)
        return self._shared(groups)

    def _can_share(self, groups: PromptGroups) -> bool:
        """Whether no sequence is longer than a sliding window, and none ends inside its prompt's padding tokens."""
        longest = max(len(prompt) + len(completion) for prompt, completion in groups.sequences())
        inside = any(ids[-1] == self._ignored and not self._read(own) for ids, own in groups.sequences())
        return not inside and (self._window is None or longest <= self._window)

    def _shared(self, groups: PromptGroups) -> Tensor:
        groups = PromptGroups(groups.prompts, [list(map(self._read, group)) for group in groups.completions])
        layout = lay_out_trees(groups, share=True, device=self._model.device, flex=self._flex, whole=True)
        row = self._model.base_model(**layout.inputs, use_cache=False).last_hidden_state[0]
        return self._head(row.index_select(0, layout.inputs["branches"].ends))

    def _padded(self, groups: PromptGroups) -> Tensor:
        sequences = [prompt + completion for prompt, completion in groups.sequences()]
        rows = [torch.tensor(ids) for ids in sequences]
        device = self._model.device
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad_token_id).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        if not self._generic:
            return self._model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
        states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        ends = torch.tensor([max(len(self._read(ids)) - 1, 0) for ids in sequences], device=device)
        return self._head(states[torch.arange(len(rows), device=device), ends])

    def _head(self, hidden: Tensor) -> Tensor:
        return self._model.score(hidden).squeeze(-1).float().cpu()

    def _read(self, ids: list[int]) -> list[int]:
        """The ids up to the token that the classifier reads."""
        length = len(ids)
        while length and ids[length - 1] == self._ignored:
            length -= 1
        return ids[:length]

    def _check(self, groups: PromptGroups) -> None:
        """Compare both layouts on a batch, and pad from here on where they disagree."""
        self.checked = True
        padded = self._padded(groups)
        gap = float((self._shared(groups) - padded).abs().max())
        limit = rounded_limit(TOLERANCE, float(padded.abs().max()))
        if self._model.dtype != torch.float32:
            single = [self._padded(PromptGroups([prompt], [[own]])) for prompt, own in groups.sequences()]
            limit = max(limit, 2 * float((torch.cat(single) - padded).abs().max()))
        gaps = Gaps(gap, limit)
        if gaps.passed:
            logger.info("Rewards: %s; the first batch is %.1e from padded rows (limit %.1e).", self.kind, gap, limit)
            return
        logger.warning(
            "Rewards: %s is %.3g from padded rows on the first batch (limit %.3g); all is padded.",
            self.kind,
            gap,
            limit,
        )
        self.kind = PADDED


class ModelReward:
    """A reward model as a reward function: texts in, rewards out, so that the policy's tokenizer may be another.

    Called with TRL's signature; prompts and completions are texts or conversations. A text is read as RewardTrainer
    reads it (prompt + completion + EOS, tokenized as one), a conversation under the reward model's own chat template.
    Completions of equal prompts share what their tokens share. A sequence above `max_length` tokens (default: the
    model's positions) loses its beginning; that is logged once and counted in `truncated`. With `normalize` rewards are
    (r - mean) / std with the statistics of the model's config. Raises UserError for conversations without a template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        normalize: bool = True,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        progress: bool = False,
        name: str = "reward_model",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.scorer = RewardScorer(model, pad_token_id=tokenizer.pad_token_id)
        self.max_length = max_length or model.config.to_dict().get("max_position_embeddings")
        self.normalize = normalize
        self.truncated = 0
        self.__name__ = name  # what TRL logs the rewards under
        self._tokens_per_batch, self._progress = tokens_per_batch, progress

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """Rewards of N completions, prompts and completions in pairs; all further columns are ignored."""
        mean, std = reward_statistics(self.model.config) if self.normalize else (0.0, 1.0)
        return ((self.raw(prompts, completions) - mean) / std).tolist()

    def raw(self, prompts: Sequence[Content], completions: Sequence[Content]) -> Tensor:
        """Rewards (N,) float32 as the model gives them."""
        if not len(prompts):
            return torch.zeros(0)
        sequences = self._cut([self._ids(*pair) for pair in zip(prompts, completions, strict=True)])
        groups, order = group_by_prompt([json.dumps(prompt) for prompt in prompts], sequences)
        scored = self.scorer.score(groups, tokens_per_batch=self._tokens_per_batch, progress=self._progress)
        results = torch.zeros(len(prompts))
        results[order] = scored
        return results

    def fit(self, prompts: Sequence[Content], completions: Sequence[Content], folder: str | Path | None = None) -> None:
        """Set the mean and standard deviation that `normalize` takes from the rewards of these completions.

        They are kept in the model's config, and in that of `folder` where it is given. Raises UserError where all
        rewards are equal.
        """
        rewards = self.raw(prompts, completions).double()
        set_statistics(self.model.config, float(rewards.mean()), float(rewards.std(correction=0)))
        if folder is not None:
            store_statistics(folder, self.model.config)

    def _ids(self, prompt: Content, completion: Content) -> list[int]:
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise UserError("a completion is a conversation and its prompt is text; give both in one form")
            eos = self.tokenizer.eos_token
            return self.tokenizer(prompt + completion + ("" if completion.endswith(eos) else eos))["input_ids"]
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the data are conversations, but the reward model's tokenizer has no chat template; set "
                "chat_template in its tokenizer_config.json, or give plain text"
            )
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self.tokenizer.apply_chat_template(list(prompt) + answer, tokenize=True, return_dict=True)["input_ids"]

    def _cut(self, sequences: list[list[int]]) -> list[list[int]]:
        limit = self.max_length
        long = sum(limit is not None and len(ids) > limit for ids in sequences)
        if long and not self.truncated:
            logger.warning(
                "%d of %d sequences exceed the reward model's %d tokens and lose their beginning; later ones are "
                "counted and not logged.",
                long, len(sequences), limit,
            )  # fmt: skip
        self.truncated += long
        return [ids if limit is None else ids[-limit:] for ids in sequences]


def load_reward_model(
    path: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ModelReward:
    """The reward model of a folder (such as `method: reward` writes) or a Hub name; `options` are ModelReward's.

    Raises UserError as `load_classifier` does.
    """
    model, tokenizer = load_classifier(
        path, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    return ModelReward(model, tokenizer, **{"name": os.path.basename(path.rstrip("/")) or path, **options})


def group_by_prompt(keys: Sequence[str], sequences: Sequence[list[int]]) -> tuple[PromptGroups, list[int]]:
    """Sequences of token ids as groups of equal key, split after the tokens that a group shares, and their order.

    The n-th completion of the groups belongs to sequence `order[n]`. A completion that its group shares whole is empty;
    where the first tokens differ, as after a cut, each sequence is a group of its own.
    """
    members: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    order: list[int] = []
    for rows in members.values():
        # The common beginning of all is that of the smallest and the largest.
        low, high = (pick(sequences[row] for row in rows) for pick in (min, max))
        shared = len(os.path.commonprefix([low, high]))
        for own in [rows] if shared else [[row] for row in rows]:
            cut = shared or len(sequences[own[0]])
            prompts.append(sequences[own[0]][:cut])
            completions.append([sequences[row][cut:] for row in own])
            order += own
    return PromptGroups(prompts, completions), order
