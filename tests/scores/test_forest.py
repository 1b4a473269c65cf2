"""How trees are laid out for kernels, worked out by hand and against a plain attention."""

import pytest
import torch

from llmalign.scores import prefix
from llmalign.scores.prefix import Forest, Tree, lay_out_trees, varlen_attend
from llmalign.types import PromptGroups

CPU = torch.device("cpu")


def two_trees():
    """A prompt of 3 with branches of 2, 0 and 1 fed tokens; a prompt of 1 with a branch of 2."""
    return Forest([Tree(0, 3, (2, 0, 1)), Tree(6, 1, (2,))], CPU)


def sees(forest):
    """Which key each query sees, (T, T) bool, straight from the definition."""
    place: list[tuple[int, int]] = []
    for number, tree in enumerate(forest.trees):
        place += [(number, 0)] * tree.prompt
        for branch, length in enumerate(tree.branches, 1):
            place += [(number, branch)] * length
    total = len(place)
    return torch.tensor(
        [
            [k <= q and place[k][0] == place[q][0] and place[k][1] in (0, place[q][1]) for k in range(total)]
            for q in range(total)
        ]
    )


def emulated_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """What flash-attn documents for `flash_attn_varlen_func`: (T, heads, D), causal aligned at the end of the keys."""
    assert causal
    output = torch.zeros_like(q)
    spans = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False)
    longest_q = longest_k = 0
    for q0, q1, k0, k1 in ((int(a), int(b), int(c), int(d)) for a, b, c, d in spans):
        longest_q, longest_k = max(longest_q, q1 - q0), max(longest_k, k1 - k0)
        if q0 == q1:
            continue
        keys, values = (x[k0:k1].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * softmax_scale
        offset = (k1 - k0) - (q1 - q0)
        visible = torch.arange(k1 - k0)[None] <= torch.arange(q1 - q0)[:, None] + offset
        output[q0:q1] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)
    assert (longest_q, longest_k) == (max_seqlen_q, max_seqlen_k)
    return output


def test_positions_ids_and_scored_places_by_hand():
    groups = PromptGroups([[5, 6, 7], [8]], [[[1, 2, 3], [4], [9, 9]], [[3, 2, 1]]])
    layout = lay_out_trees(groups, share=True, device=CPU)
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 2, 9, 8, 3, 2]]
    assert layout.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert layout.scored.tolist() == [2, 3, 4, 2, 2, 5, 6, 7, 8]
    assert layout.targets.tolist() == [1, 2, 3, 4, 9, 9, 3, 2, 1]
    assert layout.inputs["branches"].scored.tolist() == [2, 3, 4, 5, 6, 7, 8]
    alone = lay_out_trees(groups, share=False, device=CPU)
    assert alone.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 2, 5, 6, 7, 5, 6, 7, 9, 8, 3, 2]]
    assert alone.targets.tolist() == layout.targets.tolist()


def test_variable_length_offsets_by_hand():
    batch = two_trees().varlen
    assert batch.queries.tolist() == [0, 5, 5, 6, 9]
    assert batch.keys.tolist() == [0, 5, 5, 9, 12]
    assert batch.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert (batch.longest_query, batch.longest_key) == (5, 5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_variable_length_batch_is_the_forest(kv_heads):
    """Against dense attention with the definition's mask; the kernel itself needs a GPU and is not run here."""
    torch.manual_seed(0)
    forest = two_trees()
    query, key, value = (torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    found = varlen_attend(emulated_varlen, forest.varlen, query, key, value, 0.3)
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    scores = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~sees(forest), -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ values).transpose(1, 2))


def test_the_block_mask_is_the_forest():
    forest = two_trees()
    mask = forest.block_mask
    row = torch.arange(9)
    found = mask.mask_mod(torch.tensor(0), torch.tensor(0), row[:, None], row[None])
    assert torch.equal(found, sees(forest))


def test_the_mask_shows_what_is_before_a_block_and_its_past():
    forest, hidden = two_trees(), -torch.inf
    assert forest.mask(2, 5, torch.float32).tolist() == [[0, 0, 0, 0, hidden], [0, 0, 0, 0, 0]]
    assert forest.mask(3, 4, torch.float32).tolist() == [[0, 0, hidden, hidden], [0, 0, 0, hidden], [0, 0, 0, 0]]
    assert forest.mask(1, 2, torch.bfloat16).tolist() == [[0, 0]]


def test_blocks_of_queries_are_nearly_equal(monkeypatch):
    monkeypatch.setattr(prefix, "BLOCK", 4)
    forest = two_trees()
    assert [forest.blocks(length) for length in (0, 1, 4, 5, 9)] == [[], [1], [4], [3, 2], [3, 3, 3]]
    assert forest.query_blocks == [3, 2, 1, 3]


@pytest.mark.parametrize("block", [1, 2, 3, 96])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_block_by_block_is_the_forest(monkeypatch, block, kv_heads):
    """Values and gradients against dense attention with the definition's mask."""
    monkeypatch.setattr(prefix, "BLOCK", block)
    torch.manual_seed(0)
    forest = Forest([Tree(0, 3, (2, 0, 4)), Tree(9, 1, (2, 7)), Tree(19, 5, (0,))], CPU)
    inputs = [
        torch.randn(1, heads, 24, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    ]
    found, _ = prefix._sdpa(torch.nn.Identity(), *inputs, None, branches=forest, scaling=0.3)
    query, key, value = inputs
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    scores = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~sees(forest), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)
