"""Rewards of completions under a reward model: one number each, the prompt read once for all of its completions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llmalign.errors import UserError
from llmalign.scores.prefix import IMPLEMENTATIONS, lay_out_trees, register_attention
from llmalign.scores.scoring import shortest_window, why_not
from llmalign.types import PromptGroups


class RewardScorer:
    """Scores prompts with completions by a sequence classifier of one label, read at each completion's last token.

    Prompts are shared where the architecture is proven for it and no sequence exceeds its sliding window, else every
    sequence is padded on the right; `kind` says which. Raises UserError for a model of several labels. Not covered:
    gradients, models wrapped for training, adapters.
    """

    def __init__(self, model: PreTrainedModel, *, pad_token_id: int) -> None:
        if model.config.num_labels != 1:
            raise UserError(f"a reward model gives one number, this one has {model.config.num_labels} labels")
        self._model: Any = model
        self._pad_token_id = pad_token_id
        self._window = shortest_window(model.config)
        self.kind = "padded" if why_not(model.config) else "shared_prompt"
        self._flex = model.config._attn_implementation == "flex_attention"
        if self.kind == "shared_prompt":
            register_attention()
            current = model.config._attn_implementation
            model.set_attn_implementation(IMPLEMENTATIONS.get(current, current))

    @torch.no_grad()
    def rewards(self, groups: PromptGroups) -> Tensor:
        """Rewards (N,) float32 on the CPU, prompt by prompt; prompts and completions must not be empty."""
        was_training = self._model.training
        self._model.eval()
        sequences = groups.sequences()
        longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
        if self.kind == "padded" or (self._window is not None and longest > self._window):
            hidden = self._padded([prompt + completion for prompt, completion in sequences])
        else:
            layout = lay_out_trees(groups, share=True, device=self._model.device, flex=self._flex, whole=True)
            row = self._model.base_model(**layout.inputs, use_cache=False).last_hidden_state[0]
            hidden = row.index_select(0, layout.inputs["branches"].ends)
        rewards = self._model.score(hidden).squeeze(-1).float().cpu()
        self._model.train(was_training)
        return rewards

    def _padded(self, sequences: list[list[int]]) -> Tensor:
        rows = [torch.tensor(ids) for ids in sequences]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad_token_id).to(self._model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self._model.device)
        states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states[torch.arange(len(rows)), mask.sum(dim=1) - 1]
