"""The prompt read once: prompts and their completions laid out in one row, without padding, and attention over it.

A row holds trees. A tree is a prompt followed by the branches of its completions; a branch token sees the prompt and
its own branch up to itself, and its position counts on from the prompt. `padding_free` is the same layout with one
branch to a tree, so that every completion has its prompt to itself. The last token of a completion is never fed: no
score depends on what follows it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from llmalign.types import PromptGroups

SDPA, FLASH, FLEX = "shared_prompt_sdpa", "shared_prompt_flash", "flex_attention"
#: what a model is loaded with -> the attention that reads trees and leaves everything else to the former
IMPLEMENTATIONS = {"sdpa": SDPA, "flash_attention_2": FLASH, "flex_attention": FLEX}
#: queries at a time where no kernel leaves masked keys out by itself: a block is given no key behind its last query
BLOCK = 96


@dataclass(frozen=True)
class Tree:
    """A prompt of `prompt` tokens from position `start` of the row on, then branches of so many fed tokens each."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The position after the last branch."""
        return self.start + self.prompt + sum(self.branches)


@dataclass(frozen=True)
class Varlen:
    """The forest as flash attention's variable-length batch: query and key offsets, and where each key stands."""

    queries: Tensor
    keys: Tensor
    gather: Tensor
    longest_query: int
    longest_key: int


class Forest:
    """The trees of one row of `total` tokens, with what attention over them needs; made once a batch."""

    def __init__(self, trees: list[Tree], device: torch.device) -> None:
        self.trees = trees
        self.device = device
        self.total = trees[-1].stop
        self._masks: dict[torch.dtype, Tensor] = {}

    @cached_property
    def pieces(self) -> list[int]:
        """Lengths that cut the row: of each tree the prompt with its first branch, then each further branch."""
        return [
            length for tree in self.trees for length in (tree.prompt + tree.branches[0], *tree.branches[1:])
        ]  # fmt: skip

    def blocks(self, length: int) -> list[int]:
        """Lengths, nearly equal, of the blocks that a piece's queries go through attention in."""
        if self.device.type == "cuda":
            return [length] if length else []  # the fused kernels skip what a causal mask hides
        count = -(-length // BLOCK)
        return [length // count + (block < length % count) for block in range(count)]

    @cached_property
    def query_blocks(self) -> list[int]:
        """The blocks of all pieces in the order of the row."""
        return [block for length in self.pieces for block in self.blocks(length)]

    @cached_property
    def scored(self) -> Tensor:
        """Positions whose hidden state predicts a token that is scored: the prompt's end and all branch tokens."""
        spans = [torch.arange(tree.start + tree.prompt - 1, tree.stop) for tree in self.trees]
        return torch.cat(spans).to(self.device)

    @cached_property
    def ends(self) -> Tensor:
        """Position of the last token of every branch, tree by tree; of its prompt where a branch is empty."""
        last: list[int] = []
        for tree in self.trees:
            before = tree.start + tree.prompt
            for length in tree.branches:
                last.append(before + length - 1 if length else tree.start + tree.prompt - 1)
                before += length
        return torch.tensor(last, device=self.device)

    def mask(self, queries: int, keys: int, dtype: torch.dtype) -> Any:
        """What the last `queries` of `keys` tokens see: all that is before them, and themselves causally."""
        if self.device.type == "cuda":
            return causal_lower_right(queries, keys)  # handled inside the fused kernels
        longest = max(tree.prompt + length for tree in self.trees for length in tree.branches)
        if dtype not in self._masks:  # one for all: each is a part of the mask of a whole block behind all keys
            full = torch.full((BLOCK, longest + BLOCK), -torch.inf, dtype=dtype, device=self.device)
            self._masks[dtype] = full.triu_(diagonal=longest + 1)
        return self._masks[dtype][:queries, longest + queries - keys : longest + queries]

    @cached_property
    def varlen(self) -> Varlen:
        """Each piece is a query; a further branch has [prompt | branch] as keys, aligned at the end (causal)."""
        queries, keys, gather = [0], [0], []
        for tree in self.trees:
            first = tree.start + tree.prompt + tree.branches[0]
            spans = [torch.arange(tree.start, first)]
            for length in tree.branches[1:]:
                prompt = torch.arange(tree.start, tree.start + tree.prompt)
                spans.append(torch.cat([prompt, torch.arange(first, first + length)]) if length else prompt[:0])
                first += length
            for span, length in zip(spans, (tree.prompt + tree.branches[0], *tree.branches[1:]), strict=True):
                queries.append(queries[-1] + length)
                keys.append(keys[-1] + len(span))
                gather.append(span)

        def offsets(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        def longest(values: list[int]) -> int:
            return max(after - before for before, after in zip(values, values[1:], strict=False))

        return Varlen(
            offsets(queries), offsets(keys), torch.cat(gather).to(self.device), longest(queries), longest(keys)
        )

    @cached_property
    def block_mask(self) -> BlockMask:
        """The forest as flex attention's mask."""
        tree_of = torch.cat([torch.full((t.stop - t.start,), i) for i, t in enumerate(self.trees)]).to(self.device)
        branch_of = torch.cat(
            [
                torch.full((length,), branch)
                for tree in self.trees
                for branch, length in enumerate((tree.prompt, *tree.branches))
            ]
        ).to(self.device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (branch_of[key] == 0) | (branch_of[key] == branch_of[query])
            return (query >= key) & (tree_of[query] == tree_of[key]) & same

        return create_block_mask(sees, None, None, self.total, self.total, device=str(self.device))


@dataclass(frozen=True)
class Layout:
    """Token ids laid out for a model, and where its scores lie.

    `inputs`: the backbone's keyword arguments. `scored` (S,): positions in the flattened hidden states that predict
    the tokens `targets` (S,), sequence by sequence; `lengths`: how many of them each of the N sequences has.
    """

    inputs: dict[str, Any]
    scored: Tensor
    targets: Tensor
    lengths: list[int]


def lay_out_trees(
    groups: PromptGroups, *, share: bool, device: torch.device, flex: bool = False, whole: bool = False
) -> Layout:
    """Lay prompts and completions out in one row: one tree a prompt (`share`), or one a completion.

    `whole` feeds the last tokens too, for what is read from the hidden states there (`Forest.ends`).
    Prompts must not be empty.
    """
    if not share:
        sequences = groups.sequences()
        groups = PromptGroups([prompt for prompt, _ in sequences], [[completion] for _, completion in sequences])
    ids: list[int] = []
    positions: list[Tensor] = []
    scored: list[Tensor] = []
    targets: list[int] = []
    trees: list[Tree] = []
    for prompt, completions in zip(groups.prompts, groups.completions, strict=True):
        start, end = len(ids), len(ids) + len(prompt) - 1
        ids += prompt
        positions.append(torch.arange(len(prompt)))
        branches: list[int] = []
        for completion in completions:
            fed = len(completion) if whole else max(len(completion) - 1, 0)
            if completion:
                scored += [torch.tensor([end]), torch.arange(len(ids), len(ids) + fed)]
            positions.append(torch.arange(len(prompt), len(prompt) + fed))
            ids += completion[:fed]
            targets += completion
            branches.append(fed)
        trees.append(Tree(start, len(prompt), tuple(branches)))
    forest = Forest(trees, device)
    # A mask of four dimensions is taken as it is; without one the models would build their own, of total x total.
    mask = forest.block_mask if flex else torch.zeros((1, 1, 1, 1), device=device)
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.cat(positions)[None].to(device),
        "attention_mask": mask,
        "branches": forest,
    }
    return Layout(
        inputs, joined(scored, device), torch.tensor(targets, dtype=torch.long, device=device), groups.lengths()
    )


def joined(spans: list[Tensor], device: torch.device) -> Tensor:
    """Spans of positions end to end, none of them included."""
    return torch.cat([torch.empty(0, dtype=torch.long), *spans]).to(device)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attention over a forest, piece by piece; (1, heads, T, D) in, (1, T, heads, D) out."""
    forest: Forest | None = kwargs.pop("branches", None)
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split each: its gradient is one concatenation, where slices would each fill a whole row with zeros.
    queries = iter(query.split(forest.query_blocks, dim=2))
    pieces = zip(key.split(forest.pieces, dim=2), value.split(forest.pieces, dim=2), strict=True)
    results: list[Tensor] = []
    for tree in forest.trees:
        keys, values = next(pieces)
        results += _attend(forest, queries, tree.prompt + tree.branches[0], keys, values, kwargs)
        prompt_key, prompt_value = keys[:, :, : tree.prompt], values[:, :, : tree.prompt]
        for length in tree.branches[1:]:
            own_key, own_value = next(pieces)
            keys, values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
            results += _attend(forest, queries, length, keys, values, kwargs)
    return torch.cat(results, dim=1), None


def _attend(
    forest: Forest, queries: Iterator[Tensor], length: int, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Iterator[Tensor]:
    """Attention of the next `length` queries, which are the last of the keys' tokens, block by block."""
    seen = key.shape[2] - length
    for block in forest.blocks(length):
        causal, seen = seen == 0, seen + block
        result = scaled_dot_product_attention(
            next(queries),
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=None if causal else forest.mask(block, seen, key.dtype),
            is_causal=causal,
            scale=options.get("scaling"),
        )
        yield result.transpose(1, 2)


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The same by flash attention's variable-length kernel; its causal mask is aligned at the end of the keys."""
    forest: Forest | None = kwargs.pop("branches", None)
    if forest is None:
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    varlen_attention = lazy_import_flash_attention("flash_attention_2")[0][1]
    return varlen_attend(varlen_attention, forest.varlen, query, key, value, kwargs.get("scaling")), None


def varlen_attend(
    kernel: Callable[..., Any], batch: Varlen, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """Call a kernel with the interface of `flash_attn_varlen_func` on (1, heads, T, D); (1, T, heads, D) out."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    result = kernel(
        query,
        key.index_select(0, batch.gather),
        value.index_select(0, batch.gather),
        cu_seqlens_q=batch.queries,
        cu_seqlens_k=batch.keys,
        max_seqlen_q=batch.longest_query,
        max_seqlen_k=batch.longest_key,
        softmax_scale=scaling,
        causal=True,
    )
    return (result[0] if isinstance(result, tuple) else result)[None]


def register_attention() -> None:
    """Make the attention functions known to transformers, with the masks of those that they stand in for."""
    for name, function, like in ((SDPA, _sdpa, "sdpa"), (FLASH, _flash, "flash_attention_2")):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])
