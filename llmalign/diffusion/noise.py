"""What a row meets by chance (time, noise, flips, a dropped caption), drawn from a generator of its own.

The generator's seed is a digest of (seed, epoch, row id), so that neither the batch, nor its place in it, nor the
number of processes, nor where a run was resumed changes what a row meets. It runs on the CPU, so that every device sees
the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def row_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose seed is a digest of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Draws:
    """What B rows met, float32 on the CPU.

    ``time``, ``drop``: uniform in [0, 1), (B,). ``flip``: the same for each of S images, (B, S). ``noise`` and
    ``latent``: standard normal, (B, S, C, h, w); ``noise`` repeats one draw S times where it is shared.
    """

    time: Tensor
    drop: Tensor
    flip: Tensor
    noise: Tensor
    latent: Tensor


def draw(
    key: Sequence[int | str], row_ids: Sequence[int], shape: Sequence[int], *, sides: int = 2, shared: bool = True
) -> Draws:
    """Draws for rows of `sides` images with latents of `shape` (C, h, w); `key` is what else they depend on."""
    uniforms, noises, latents = [], [], []
    for row_id in row_ids:
        generator = row_generator(*key, row_id)
        uniforms.append(torch.rand(2 + sides, generator=generator))
        noise = torch.randn(1 if shared else sides, *shape, generator=generator)
        noises.append(noise.expand(sides, *shape))
        latents.append(torch.randn(sides, *shape, generator=generator))
    uniform = torch.stack(uniforms)
    return Draws(uniform[:, 0], uniform[:, 1], uniform[:, 2:], torch.stack(noises), torch.stack(latents))
