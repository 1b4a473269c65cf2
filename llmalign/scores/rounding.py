"""How far apart two computations of the same scores may lie."""

import torch


def rounded_limit(limit: float, largest: float) -> float:
    """`limit`, or four units in the last place of the largest score where that is more; all in nats.

    `largest` is a sum over tokens without its sign, and such sums are kept in float32 whatever computed them: one of
    2,048 nats is rounded to 2.4e-4.
    """
    return max(limit, 4 * torch.finfo(torch.float32).eps * largest)
