"""The rounds of an online method: which pairs and steps come when, and what a round has drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from llmalign.diffusion.latents import LatentCollator
from llmalign.diffusion.noise import row_generator

FILE = "round.safetensors"
INDICES = ("round", "pair", "step")


class RoundRows(Dataset):
    """The rows of all rounds in the order of training: a round, a pair in it, and one of the pair's steps.

    Everything is a function of the place and the seed: captions come in passes over all of them, each in a new order,
    and the steps of a round in an order of its own. `row_id` counts pairs over all rounds.
    """

    def __init__(
        self, captions: Any, *, rounds: int, pairs: int, steps: list[int], kept_steps: int, inner_epochs: int, seed: int
    ) -> None:
        self._caption_ids = [int(value) for value in captions["caption_id"]]
        self._steps, self._kept = steps, kept_steps
        self._pairs, self._inner, self._seed = pairs, inner_epochs, seed
        self.per_round = pairs * kept_steps * inner_epochs
        self._length = rounds * self.per_round
        self._latest: tuple[int, list[tuple[int, int]], list[int]] = (-1, [], [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> dict[str, int]:
        number, within = divmod(place, self.per_round)
        if self._latest[0] != number:
            self._latest = (number, self._planned(number), self.caption_ids(number))
        pair, step = self._latest[1][within]
        return {
            "row_id": number * self._pairs + pair,
            "caption_id": self._latest[2][pair],
            "round": number,
            "pair": pair,
            "step": step,
        }

    def caption_ids(self, number: int) -> list[int]:
        """The captions of a round's pairs."""
        places = range(number * self._pairs, (number + 1) * self._pairs)
        size = len(self._caption_ids)
        passes = {place // size for place in places}
        orders = {number: self._shuffled_captions(number) for number in passes}
        return [self._caption_ids[orders[place // size][place % size]] for place in places]

    def _planned(self, number: int) -> list[tuple[int, int]]:
        plan = []
        for inner in range(self._inner):
            generator = row_generator(self._seed, "round", number, inner)
            cells = [
                (pair, self._steps[int(choice)])
                for pair in range(self._pairs)
                for choice in torch.randperm(len(self._steps), generator=generator)[: self._kept]
            ]
            plan += [cells[int(place)] for place in torch.randperm(len(cells), generator=generator)]
        return plan

    def _shuffled_captions(self, number: int) -> list[int]:
        generator = row_generator(self._seed, "captions", number)
        return torch.randperm(len(self._caption_ids), generator=generator).tolist()


class RoundCollator(LatentCollator):
    """A batch of encoded captions, with the round, the pair and the step where rows have them."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in INDICES if name in rows[0]}


@dataclass(frozen=True)
class Round:
    """What a round drew, on the CPU: P pairs, T steps.

    ``latents`` (T+1, P, 2, C, h, w), ``log_probs`` (T, P, 2) under the policy that drew them, ``preference`` (P,) in
    {1, -1, 0}, ``rewards`` (P, 2, R).
    """

    number: int
    latents: Tensor
    log_probs: Tensor
    preference: Tensor
    rewards: Tensor

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if name != "number"}
        save_file(tensors, folder / FILE, metadata={"round": str(self.number)})

    @classmethod
    def load(cls, folder: Path) -> "Round | None":
        """The round that a checkpoint was written in the middle of, if it was."""
        path = folder / FILE
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return cls(int(file.metadata()["round"]), **{name: file.get_tensor(name) for name in file.keys()})
