"""How many floating-point operations a step needs at least, for the fraction of the machine's limit.

A multiply-add counts as two. With P prompt tokens and k completions of C_1 ... C_k tokens, the last of which is never
fed because no score depends on what follows it:

    tokens   T = P + sum(C_j - 1), the prompt counted once
    scored   S = sum(C_j), the only positions that the language model's head is needed at
    pairs    A = P (P + 1) / 2 + sum((C_j - 1) P + (C_j - 1) C_j / 2): causal attention, each branch sees its prompt
             and itself
    weights  W = parameters of all layers' matrices; H = hidden * vocabulary, the head; D = layers * heads * head size

    forward  F = 2 (T W + S H) + 4 A D        (queries times keys, and weights times values)
    policy   3 F                              (backward: once for the inputs, once for the weights)
             with LoRA 2 * 2 (T W + S H) + 3 * 4 A D + 6 T L, L parameters of the adapters: frozen weights need no
             gradient of their own
    reference F
    sampling F                                (each prompt read once; further passes over a rollout are not counted)

Norms, embeddings, softmax, rotations, the optimizer and every recomputation count as nothing. The last layer is counted
at all tokens although only the scored ones need all of it, so that the formula stays tokens times parameters.
"""

from collections.abc import Iterable

from benching.cases import Case, Group, Shape

LORA_RANK = 16


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """Inputs and outputs of one layer's seven matrices: q, k, v, o, gate, up, down."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    return [
        (shape.hidden, shape.hidden),
        (shape.hidden, keys),
        (shape.hidden, keys),
        (shape.hidden, shape.hidden),
        (shape.hidden, shape.intermediate),
        (shape.hidden, shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]


def visible_pairs(group: Group) -> int:
    """Query-key pairs that causal attention has to see, the prompt's once."""
    pairs = group.prompt * (group.prompt + 1) // 2
    for length in group.completions:
        fed = length - 1
        pairs += fed * group.prompt + fed * (fed + 1) // 2
    return pairs


def fed_tokens(group: Group) -> int:
    """Tokens that a model has to read, the prompt once and no completion's last."""
    return group.prompt + sum(length - 1 for length in group.completions)


def sampled_flops(dense: int, attention: int) -> int:
    """Of a rollout that serves one step: every token read or drawn once, then the reference and the policy on them."""
    return (1 + 1 + 3) * (dense + attention)


def step_flops(case: Case, groups: Iterable[Group]) -> int:
    """Floating-point operations of one step of the case on these groups; see the module."""
    shape = case.shape
    tokens = scored = pairs = 0
    for group in groups:
        tokens += fed_tokens(group)
        scored += sum(group.completions)
        pairs += visible_pairs(group)
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in matrices(shape))
    dense = 2 * (tokens * weights + scored * shape.hidden * shape.vocabulary)
    attention = 4 * pairs * shape.layers * shape.hidden  # heads * head size = hidden
    policy = 3 * (dense + attention)
    if case.lora:
        adapters = shape.layers * LORA_RANK * sum(inputs + outputs for inputs, outputs in matrices(shape))
        policy = 2 * dense + 3 * attention + 6 * tokens * adapters
    if case.method is not None:
        return sampled_flops(dense, attention)
    reference = 0 if case.cached or case.forward_backward else dense + attention
    return policy + reference
