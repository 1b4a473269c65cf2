"""Sequence log-probs of text: sums over completion tokens, EOS included, prompt and padding excluded."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def completion_logps(token_logps: Tensor) -> Tensor:
    """Sum per-token log-probs (N, T), 0 outside the completion, to sequence log-probs (N,) in nats, float32.

    The sum runs in float32 whatever the input's dtype: in bfloat16 a sum over 500 tokens loses about one nat.
    """
    return token_logps.float().sum(dim=-1)


@torch.no_grad()
def sequence_logps(
    model: nn.Module,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int = 16,
) -> Tensor:
    """Score (prompt ids, completion ids) pairs: log pi(completion | prompt), (N,) float32 on the CPU, in nats.

    Padding goes to the right and sequences are batched by length, so that the result does not depend on the order.
    The model's mode is put back afterwards. Not covered: gradients, images, sequences beyond the model's context.
    Raises ValueError where a prompt is empty, since its completion's first token then has no context.
    """
    for row, (prompt, _) in enumerate(sequences):
        if len(prompt) == 0:
            raise ValueError(f"sequence {row} has an empty prompt; start it with the BOS token")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    result = torch.zeros(len(sequences), dtype=torch.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [torch.tensor([*sequences[i][0], *sequences[i][1]]) for i in rows]
        scored = [torch.arange(len(x)) >= len(sequences[i][0]) for i, x in zip(rows, ids, strict=True)]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device)
        attention_mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True).to(device)
        mask = pad_sequence(scored, batch_first=True).to(device)[:, 1:]
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        token_logps = torch.zeros(mask.shape, device=device)
        token_logps[mask] = -nn.functional.cross_entropy(logits[mask].float(), input_ids[:, 1:][mask], reduction="none")
        result[rows] = completion_logps(token_logps).cpu()
    model.train(was_training)
    return result
