"""Earlier rollouts kept for later steps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmalign.trainers.rollouts import Rollout

#: tensors padded on the left; all others are padded on the right, in their last dimension
_LEFT = ("prompt_ids", "prompt_mask")


class ReplayBuffer:
    """The last `capacity` prompts of this rank with their completions, rewards and scores, on the CPU, without padding.

    What is drawn has the names and shapes of a rollout. A rank draws from what it sampled itself, so that every rank
    holds and draws equally many. Not covered: priorities.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: list[Rollout] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rollout: Rollout) -> None:
        """Keep the prompts of a rollout; the oldest leave."""
        prompt, longest = rollout["prompt_mask"].sum(1), rollout["completion_mask"].sum(2).amax(1)
        for row, (size, length) in enumerate(zip(prompt.tolist(), longest.tolist(), strict=True)):
            own = {name: tensor[row].detach().cpu() for name, tensor in rollout.items()}
            for name, tensor in own.items():
                if name in _LEFT:
                    own[name] = tensor[-size:].clone()
                elif tensor.ndim == 2:
                    own[name] = tensor[:, :length].clone()
            self._rows.append(own)
        self._rows = self._rows[-self.capacity :]

    def draw(self, count: int) -> list[Rollout]:
        """Different prompts chosen at random by torch's own generator. ValueError where fewer are held."""
        if count > len(self._rows):
            raise ValueError(f"{count} prompts were asked for and {len(self._rows)} are held.")
        return [self._rows[index] for index in torch.randperm(len(self._rows))[:count].tolist()]

    def state(self) -> list[dict[str, Tensor]]:
        """What a checkpoint must hold."""
        return self._rows

    def load(self, rows: list[dict[str, Any]]) -> None:
        """Take `state` back."""
        self._rows = rows


def joined(rollout: Rollout, rows: list[Rollout]) -> Rollout:
    """A rollout with further prompts behind its own, padded to the longest of both."""
    result = {}
    for name, tensor in rollout.items():
        own = [*tensor.unbind(0), *(row[name].to(tensor.device) for row in rows)]
        if own[0].ndim == 2 or name in _LEFT:
            width = max(part.shape[-1] for part in own)
            missing = [width - part.shape[-1] for part in own]
            own = [pad(part, (gap, 0) if name in _LEFT else (0, gap)) for part, gap in zip(own, missing, strict=True)]
        result[name] = torch.stack(own)
    return result
