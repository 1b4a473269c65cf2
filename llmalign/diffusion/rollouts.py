"""Sampling in latent space with every transition on record, and the log-probabilities of transitions that were taken.

A denoiser is any callable `denoiser(noisy (N, C, h, w), timesteps (N,), conditions) -> prediction (N, C, h, w)`;
`conditions` are tensors of N rows under the names that it knows. Dropout is the caller's to switch off: under it a step
has another log-probability each time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmalign.diffusion.noise import row_generator
from llmalign.diffusion.pipelines import Conditions
from llmalign.diffusion.transitions import Sampler, log_prob

Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True, eq=False)
class Rollout:
    """N trajectories of T steps, float32 on the CPU.

    ``latents`` (T+1, N, C, h, w): what the sampler started from, then what each step led to. ``log_probs`` (T, N):
    each step's log-probability under the denoiser that took it, NaN for steps without noise.
    """

    latents: Tensor
    log_probs: Tensor


def guided(denoiser: Denoise, unconditional: Conditions | None, guidance: float) -> Denoise:
    """The denoiser under classifier-free guidance, u + g (c - u) of its predictions without and with the caption.

    Policy and reference are to have the same. `unconditional` holds, under the names of the conditions, one row for all
    or one for each; both predictions come from one call with 2N rows. A `guidance` of 1 is the denoiser itself and
    needs none. ValueError where they are missing or have other names. Not covered: guidance that the network is told.
    """
    if guidance == 1:
        return denoiser
    if unconditional is None:
        raise ValueError(f"guidance {guidance} needs the conditions of a caption that is empty")
    empty = unconditional

    def denoise(noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        if empty.keys() != conditions.keys():
            raise ValueError(f"conditions are {sorted(conditions)}, those without caption {sorted(empty)}")
        both = {name: torch.cat([empty[name].expand_as(value), value]) for name, value in conditions.items()}
        prediction = denoiser(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
        # The difference of two close predictions is not left to half precision.
        without, captioned = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).chunk(2)
        return without + guidance * (captioned - without)

    return denoise


def row_noise(key: Sequence[int | str], row_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (N, *shape), each row from the generator of (*key, row id): float32 on the CPU."""
    return torch.stack([torch.randn(*shape, generator=row_generator(*key, row_id)) for row_id in row_ids])


@torch.no_grad()
def sample_transitions(
    denoiser: Denoise, sampler: Sampler, conditions: Conditions, *, initial: Tensor, noise: Callable[[int], Tensor]
) -> Rollout:
    """Sample N rows, without gradient, and keep every step.

    `initial` (N, C, h, w) is standard normal; computations run where it lies. `noise(i)` gives the standard normal
    noise (N, C, h, w) of step i and is asked for steps with noise alone. Both of `row_noise`, with the step in the
    key, leave a row the same in every batch and on every process. ValueError for noise of another shape: one draw for
    all rows would tie them to each other.
    """
    x = (sampler.initial_scale * initial).float()
    latents, log_probs = [x.cpu()], []
    for step in range(len(sampler)):
        mean, std = _transition(denoiser, sampler, step, x, conditions)
        if step in sampler.stochastic:
            drawn = noise(step)
            if drawn.shape != x.shape:
                raise ValueError(f"noise must have the latents' shape {tuple(x.shape)}, got {tuple(drawn.shape)}")
            x = (mean + std.reshape(-1, *[1] * (mean.ndim - 1)) * drawn.to(mean)).float()
            log_probs.append(log_prob(x, mean, std).float().cpu())
        else:
            x = mean.float()
            log_probs.append(torch.full((len(x),), torch.nan))
        latents.append(x.cpu())
    return Rollout(torch.stack(latents), torch.stack(log_probs))


@torch.no_grad()
def sample_latents(denoiser: Denoise, sampler: Sampler, conditions: Conditions, *, initial: Tensor) -> Tensor:
    """Where a sampler without noise leads from `initial`, (N, C, h, w), float32 on its device; without gradient.

    ValueError for a sampler with noise: build it with eta or noise_level 0.
    """
    if sampler.stochastic:
        raise ValueError("this sampler adds noise: build it with eta or noise_level 0, or take sample_transitions")
    x = (sampler.initial_scale * initial).float()
    for step in range(len(sampler)):
        x = _transition(denoiser, sampler, step, x, conditions)[0].float()
    return x


def transition_logps(
    denoiser: Denoise, sampler: Sampler, steps: Tensor, x: Tensor, following: Tensor, conditions: Conditions
) -> Tensor:
    """Log-probabilities (B,) of transitions from `x` to `following`, both (B, C, h, w), each at its own step, (B,).

    In nats per latent dimension, with gradients where they are enabled. ValueError for a step without noise.
    """
    mean, std = _transition(denoiser, sampler, steps, x, conditions)
    return log_prob(following, mean, std)


def _transition(
    denoiser: Denoise, sampler: Sampler, steps: int | Tensor, x: Tensor, conditions: Conditions
) -> tuple[Tensor, Tensor]:
    prediction = denoiser(sampler.model_input(steps, x), sampler.model_timesteps(steps, x), conditions)
    return sampler.mean_std(steps, prediction, x)
