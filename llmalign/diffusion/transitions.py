"""Samplers as sequences of Gaussian transitions, and the log-probability of a transition that was taken.

Every sampler here is linear in the latents and in the network's raw prediction f, so that a step is four numbers:

    x_{i+1} ~ N(on_sample_i x_i + on_prediction_i f(input_scale_i x_i, timesteps_i), std_i^2 I),   i = 0 .. T-1.

Step 0 starts from noise. The coefficients are worked out in float64 and applied in float32, or in float64 where the
latents or the prediction have it. Not covered: samplers of higher order, clamped or thresholded predictions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from llmalign.diffusion.process import PREDICTIONS
from llmalign.errors import UserError


@dataclass(frozen=True, eq=False)
class Sampler:
    """T transitions; every tensor has shape (T,) and lies on the CPU, see the module for what it means.

    ``timesteps`` is what the network is told, in the scheduler's dtype; the rest is float64. Sampling starts from
    ``initial_scale`` times standard normal noise. ``steps`` below is one number or int64 (B,), one for each row.
    """

    timesteps: Tensor
    on_sample: Tensor
    on_prediction: Tensor
    std: Tensor
    input_scale: Tensor
    initial_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> list[int]:
        """The steps that add noise, in order: those that have a log-probability and can be trained on."""
        return self.std.nonzero().flatten().tolist()

    def model_timesteps(self, steps: int | Tensor, x: Tensor) -> Tensor:
        """What the network is told of each row of latents, (B,) on their device."""
        return self.timesteps[self._rows(steps, x)].to(x.device)

    def model_input(self, steps: int | Tensor, x: Tensor) -> Tensor:
        """The latents (B, ...) as the network takes them: `scale_model_input` of diffusers."""
        return x * self._column(self.input_scale, steps, x, x.dtype)

    def mean_std(self, steps: int | Tensor, prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (B,) of the next latents; prediction and latents are (B, ...).

        ValueError for unequal shapes and for steps outside of 0 .. T-1.
        """
        if prediction.shape != x.shape:
            raise ValueError(f"the prediction must have the latents' shape {tuple(x.shape)}: {tuple(prediction.shape)}")
        wide = _wide(x, prediction)
        on_sample = self._column(self.on_sample, steps, x, wide)
        on_prediction = self._column(self.on_prediction, steps, x, wide)
        std = self._column(self.std, steps, x, wide)
        return on_sample * x.to(wide) + on_prediction * prediction.to(wide), std.flatten()

    def _rows(self, steps: int | Tensor, x: Tensor) -> Tensor:
        rows = torch.as_tensor(steps, dtype=torch.int64).cpu()
        if rows.ndim > 0 and rows.shape != x.shape[:1]:
            raise ValueError(f"steps must be one number or of shape ({len(x)},), got {tuple(rows.shape)}")
        if bool(((rows < 0) | (rows >= len(self))).any()):
            raise ValueError(f"steps must lie in 0 .. {len(self) - 1}, got {rows.tolist()}")
        return rows.expand(len(x))

    def _column(self, table: Tensor, steps: int | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        values = table[self._rows(steps, x)].to(dtype).to(x.device)
        return values.reshape(-1, *[1] * (x.ndim - 1))


def log_prob(following: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(following; mean, std^2 I) in nats per latent dimension, (B,): the MEAN over all dimensions but the first.

    `following` and `mean` are (B, ...), `std` (B,). The mean and not the sum, as in the code of DDPO, D3PO, PSO and
    Flow-GRPO: a sum over latents leaves no ratio that is finite. ValueError for unequal shapes and for a `std` that is
    not above 0.
    """
    if following.shape != mean.shape or std.shape != mean.shape[:1]:
        shapes = ", ".join(str(tuple(value.shape)) for value in (following, mean, std))
        raise ValueError(f"following and mean must have one shape (B, ...) and std (B,), got {shapes}")
    if not bool((std > 0).all()):
        row = int((~(std > 0)).nonzero()[0])
        raise ValueError(f"row {row} has a step of std {std[row].item()}: without noise a step has no log-probability")
    wide = _wide(following, mean)
    deviation = (following.to(wide) - mean.to(wide)).flatten(1) / std[:, None]
    return -0.5 * deviation.square().mean(dim=1) - std.log() - 0.5 * math.log(2 * math.pi)


def ddim(config: Mapping[str, Any], steps: int, *, eta: float = 1.0) -> Sampler:
    """DDIM with the timesteps that `DDIMScheduler` has under a scheduler's `config`; `eta` in [0, 1], 0: no noise.

    The last step goes to the schedule's first timestep, or, under `set_alpha_to_one`, to the clean image without
    noise. UserError for a config that it cannot follow, among them one that ends at timestep 0 where eta > 0.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must lie between 0 (no noise) and 1 (as much as DDPM), got {eta!r}")
    scheduler = _ddim_scheduler(config, steps)
    if eta > 0 and int(scheduler.timesteps[-1]) == 0:
        raise UserError(
            "DDIM would end at timestep 0, where a step has standard deviation 0 and no log-probability: "
            "give the scheduler steps_offset=1 with timestep_spacing 'leading', or timestep_spacing 'trailing'"
        )
    before = scheduler.timesteps - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod
    following = torch.where(before >= 0, alphas[before.clamp(min=0)], scheduler.final_alpha_cumprod)
    coefficients = ddim_coefficients(alphas[scheduler.timesteps], following, scheduler.config.prediction_type, eta)
    return Sampler(scheduler.timesteps, *coefficients, torch.ones(steps, dtype=torch.float64))


def ddim_coefficients(
    alphas: Tensor, following: Tensor, prediction_type: str, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of DDIM steps from abar_t to abar_p, both (T,): https://arxiv.org/abs/2010.02502.

    As all coefficients below: `on_sample`, `on_prediction` and `std` of a sampler, float64 (T,).
    """
    now, then = alphas.double(), following.double()
    clean, noise = _estimates(now, prediction_type)
    std = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()  # Eq. 16
    mean = then.sqrt() * clean + (1 - then - std.square()).clamp(min=0).sqrt() * noise  # Eq. 12
    return mean[0], mean[1], std


def consistency(config: Mapping[str, Any], steps: int, *, timestep_spacing: str = "trailing") -> Sampler:
    """Few-step sampling of a distilled model, as DMD2: the clean image is predicted, then noised for the next timestep.

    The last step adds nothing. The timesteps are those of `DDIMScheduler`, trailing whatever the config says (999, 749,
    499, 249, as DMD2), for it mostly is the undistilled model's. UserError for a config that it cannot follow. Not
    covered: the boundary terms of latent consistency models, 2.5e-9 of the latents at timestep 999 and 4e-6 at 25.
    """
    scheduler = _ddim_scheduler(config, steps, timestep_spacing=timestep_spacing)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    coefficients = consistency_coefficients(alphas, scheduler.config.prediction_type)
    return Sampler(scheduler.timesteps, *coefficients, torch.ones(steps, dtype=torch.float64))


def consistency_coefficients(alphas: Tensor, prediction_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of N(sqrt(abar_p) x0_hat, 1 - abar_p), p the next timestep; `alphas` (T,), at the last step 1."""
    clean, _ = _estimates(alphas.double(), prediction_type)
    then = torch.cat([alphas[1:].double(), torch.ones(1, dtype=torch.float64)])
    mean = then.sqrt() * clean
    return mean[0], mean[1], (1 - then).sqrt()


def euler_ancestral(config: Mapping[str, Any], steps: int) -> Sampler:
    """`EulerAncestralDiscreteScheduler` under a scheduler's `config`, as SDXL-Turbo has it; the last step adds nothing.

    Latents are x_0 + sigma eps. UserError for a config that it cannot follow.
    """
    scheduler = _built(EulerAncestralDiscreteScheduler, config, "beta_schedule", steps)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    coefficients = euler_ancestral_coefficients(sigmas, scheduler.config.prediction_type)
    input_scale = (sigmas[:-1].square() + 1).rsqrt()
    return Sampler(scheduler.timesteps, *coefficients, input_scale, float(scheduler.init_noise_sigma))


def euler_ancestral_coefficients(sigmas: Tensor, prediction_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of Euler steps down the `sigmas` (T+1,), below the next one and up to it again with fresh noise."""
    now, then = sigmas[:-1].double(), sigmas[1:].double()
    up = (then.square() * (now.square() - then.square()) / now.square()).sqrt()
    down = (then.square() - up.square()).clamp(min=0).sqrt()
    alphas = 1 / (1 + now.square())  # of the same latents times sqrt(abar), where they are noised without growing
    _, noise = _estimates(alphas, prediction_type)
    step = down - now
    return 1 + step * alphas.sqrt() * noise[0], step * noise[1], up


def flow_sde(
    config: Mapping[str, Any],
    steps: int,
    *,
    noise_level: float = 0.7,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Sampler:
    """Flow matching with noise, as Flow-GRPO samples SD3 and Flux: https://arxiv.org/abs/2505.05470; 0: no noise.

    The timesteps are those of `FlowMatchEulerDiscreteScheduler` under a scheduler's `config`, `sigmas` and `mu` what
    the pipeline hands to its `set_timesteps` (Flux: linspace(1, 1/T, T), and `calculate_shift` of the image's tokens).
    Every step adds noise, the last one too, as in the authors' code. UserError for a config that it cannot follow.
    """
    scheduler = _built(FlowMatchEulerDiscreteScheduler, config, "shift", steps)
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise UserError(f"noise_level must be a finite number of at least 0, got {noise_level!r}")
    if scheduler.config.stochastic_sampling or scheduler.config.invert_sigmas:
        raise UserError("a scheduler with stochastic_sampling or invert_sigmas cannot be followed: switch them off")
    if scheduler.config.use_dynamic_shifting and mu is None:
        raise UserError("the scheduler shifts by the size of the image (use_dynamic_shifting): it needs mu")
    scheduler.set_timesteps(steps, sigmas=None if sigmas is None else list(sigmas), mu=mu)
    coefficients = flow_sde_coefficients(scheduler.sigmas, noise_level)
    return Sampler(scheduler.timesteps, *coefficients, torch.ones(steps, dtype=torch.float64))


def flow_sde_coefficients(sigmas: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of steps down the `sigmas` s (T+1,) under the diffusion noise_level sqrt(s / (1 - s))."""
    now, then = sigmas[:-1].double(), sigmas[1:].double()
    step = then - now
    # At s = 1 the diffusion would be infinite: there, as in the authors' code, it is that of the next s.
    bounded = torch.where(torch.isclose(now, torch.ones_like(now)), sigmas[1].double(), now)
    squared = noise_level**2 * now / (1 - bounded)
    on_sample = 1 + squared / (2 * now) * step
    on_prediction = (1 + squared * (1 - now) / (2 * now)) * step
    return on_sample, on_prediction, (squared * -step).sqrt()


def _wide(one: Tensor, other: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)


def _estimates(alphas: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise as linear forms of noisy latents (row 0) and prediction (row 1): (2, T) each."""
    if prediction_type not in PREDICTIONS:
        raise UserError(f"the scheduler's prediction_type is {prediction_type!r}; known are {', '.join(PREDICTIONS)}")
    one, none = torch.ones_like(alphas), torch.zeros_like(alphas)
    signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
    if prediction_type == "v_prediction":
        return torch.stack([signal, -spread]), torch.stack([spread, signal])
    if not bool((alphas > 0).all()):
        raise UserError(
            "the schedule ends without signal (rescale_betas_zero_snr), where predicted noise says nothing of the "
            "image: take a model with prediction_type v_prediction, or switch the rescaling off"
        )
    return torch.stack([one / signal, -spread / signal]), torch.stack([none, one])


def _built(kind: Any, config: Mapping[str, Any], key: str, steps: int, **changes: Any) -> Any:
    """A scheduler of diffusers; UserError for a config of another kind of model and for steps that it does not have."""
    if key not in config:
        raise UserError(f"the scheduler's config has no {key!r}: this sampler is for another kind of model")
    scheduler = kind.from_config(config, **changes)
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"a sampler takes 1 to {most} steps, got {steps}")
    return scheduler


def _ddim_scheduler(config: Mapping[str, Any], steps: int, **changes: Any) -> Any:
    # Passed on by hand: `from_config` drops what is another scheduler's default, and DDIM's own default is to clamp.
    changes["clip_sample"] = config.get("clip_sample", False)
    scheduler = _built(DDIMScheduler, config, "beta_schedule", steps, **changes)
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise UserError("clip_sample and thresholding clamp pixels, not latents: set both to False in the scheduler")
    scheduler.set_timesteps(steps)
    return scheduler
