"""What is scored, token ids, and what a model hands to a loss: log-probability scores, as frozen dataclasses.

Every log-probability is summed over the tokens of a completion, end-of-text included and prompt and padding
excluded, in nats. One instance of scores holds one floating dtype, float32 or float64. The classes check nothing
themselves: each loss checks shapes and dtypes of what it is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptGroups:
    """Token ids of P prompts, each with completions of its own (any number, any lengths), N completions in all.

    Sequences are ordered prompt by prompt: completion j of prompt p is sequence `sum(counts[:p]) + j`.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]

    def __len__(self) -> int:
        return len(self.prompts)

    def counts(self) -> list[int]:
        """Completions of each prompt, P numbers."""
        return [len(group) for group in self.completions]

    def lengths(self) -> list[int]:
        """Tokens of each completion, N numbers."""
        return [len(completion) for group in self.completions for completion in group]

    def unique_tokens(self) -> list[int]:
        """Tokens of each prompt and all of its completions, the prompt counted once: P numbers."""
        return [
            len(prompt) + sum(map(len, group)) for prompt, group in zip(self.prompts, self.completions, strict=True)
        ]

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """The N pairs of prompt and completion."""
        return [
            (prompt, completion)
            for prompt, group in zip(self.prompts, self.completions, strict=True)
            for completion in group
        ]

    def batches(self, tokens: int) -> Iterator[list[int]]:
        """All prompts in batches of about so many tokens, or of one prompt, those with most tokens first."""
        sizes = self.unique_tokens()
        batch: list[int] = []
        room = tokens
        for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
            if batch and sizes[row] > room:
                yield batch
                batch, room = [], tokens
            batch.append(row)
            room -= sizes[row]
        if batch:
            yield batch

    def take(self, rows: Sequence[int]) -> "PromptGroups":
        """Some of the prompts with all of their completions, in the order of `rows`."""
        return PromptGroups([self.prompts[row] for row in rows], [self.completions[row] for row in rows])

    def first(self, count: int) -> "PromptGroups":
        """Every prompt with its first `count` completions alone."""
        return PromptGroups(self.prompts, [group[:count] for group in self.completions])


@dataclass(frozen=True)
class PairScores:
    """Scores of B pairs of responses, every tensor of shape (B,); only the policy's carry a gradient.

    ``chosen``, ``rejected``: under the policy. ``ref_*``: under the frozen reference. ``last_*``: under the previous
    iterate (INPO). ``base``: the policy's log-probability of RPO's baseline sample; None stands for the chosen
    response. ``*_lengths``: number of completion tokens, any numeric dtype (irpo, metrics).
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    last_chosen: Tensor | None = None
    last_rejected: Tensor | None = None
    base: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None


@dataclass(frozen=True)
class GroupScores:
    """Scores of up to K completions of each of P prompts, every tensor of shape (P, K).

    ``mask`` is bool or 0/1 of any dtype and true where a completion exists; None means everywhere. What stands at
    masked places is never read, so it may be anything, NaN included.
    """

    policy: Tensor
    reference: Tensor
    rewards: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class RolloutScores:
    """What an on-policy trainer hands to its loss: K sampled completions of each of P prompts, of up to T tokens.

    ``policy``, ``proposal`` (the sampler), ``reference``, ``rewards`` and ``mask`` have shape (P, K);
    ``token_policy``, ``token_old``, ``token_reference`` and ``token_mask`` have shape (P, K, T).
    """

    policy: Tensor
    proposal: Tensor
    reference: Tensor
    rewards: Tensor
    mask: Tensor
    token_policy: Tensor
    token_old: Tensor
    token_reference: Tensor
    token_mask: Tensor
