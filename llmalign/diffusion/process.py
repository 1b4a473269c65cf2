"""How clean latents become noisy, and what a network predicts of it: epsilon, v-prediction, flow matching.

`index` (N,) counts the steps of the training schedule, 0 the first entry of the scheduler's own tables. All tensors of
latents have shape (N, ...); computations run in the dtype of the latents that are given.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from llmalign.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")


class Process(Protocol):
    """What training needs to know of a noising process."""

    def draw(self, uniform: Tensor) -> Tensor:
        """Indices (N,) from uniform numbers (N,) in [0, 1)."""
        ...

    def model_timesteps(self, index: Tensor) -> Tensor:
        """What the network is told, (N,)."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The noisy latents."""
        ...

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """What the network should predict."""
        ...

    def clean(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""
        ...

    def noise(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """The noise that a prediction stands for."""
        ...

    def noise_weight(self, index: Tensor) -> Tensor:
        """Squared error of the noise over squared error of the target, (N,)."""
        ...

    def __len__(self) -> int:
        """Steps of the training schedule."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; `alphas_cumprod` (T,) holds abar.

    The target is eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, whose squared error is that of eps over abar_t.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniform over the schedule."""
        return (uniform.double() * len(self)).long()

    def model_timesteps(self, index: Tensor) -> Tensor:
        """The index itself."""
        return index

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """See the class."""
        signal, spread = self._scales(index, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """See the class."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(index, clean)
        return signal * noise - spread * clean

    def clean(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """x_0 from eps or v."""
        signal, spread = self._scales(index, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - spread * prediction) / signal
        return signal * noisy - spread * prediction

    def noise(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """eps from eps or v."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, spread = self._scales(index, noisy)
        return signal * prediction + spread * noisy

    def noise_weight(self, index: Tensor) -> Tensor:
        """1, or abar_t for v."""
        if self.prediction_type == "epsilon":
            return torch.ones_like(index, dtype=self.alphas_cumprod.dtype)
        return self.alphas_cumprod.to(index.device)[index]

    def _scales(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(like.device)[index].to(like.dtype)
        alphas = alphas.reshape(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()


@dataclass(frozen=True)
class Flow:
    """x_s = (1 - s) x_0 + s eps, target eps - x_0; `sigmas` and `timesteps` (T,) are the scheduler's, from s = 1 down.

    The index of a row is floor(T sigmoid(n)), n standard normal, as for SD3 (`logit_normal`), or uniform.
    """

    sigmas: Tensor
    timesteps: Tensor
    logit_normal: bool = True

    def __len__(self) -> int:
        return len(self.sigmas)

    def draw(self, uniform: Tensor) -> Tensor:
        """See the class."""
        share = uniform.double()
        if self.logit_normal:
            share = torch.sigmoid(torch.special.ndtri(share))  # ndtri turns uniform numbers into normal ones
        return (share * len(self)).long().clamp(max=len(self) - 1)

    def model_timesteps(self, index: Tensor) -> Tensor:
        """1000 s, as the scheduler has it."""
        return self.timesteps.to(index.device)[index]

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """See the class."""
        sigma = self._sigma(index, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """See the class."""
        return noise - clean

    def clean(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """x_0 = x_s - s v."""
        return noisy - self._sigma(index, noisy) * prediction

    def noise(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """eps = x_s + (1 - s) v."""
        return noisy + (1 - self._sigma(index, noisy)) * prediction

    def noise_weight(self, index: Tensor) -> Tensor:
        """(1 - s)^2."""
        return (1 - self.sigmas.to(index.device)[index]).square()

    def _sigma(self, index: Tensor, like: Tensor) -> Tensor:
        sigma = self.sigmas.to(like.device)[index].to(like.dtype)
        return sigma.reshape(-1, *[1] * (like.ndim - 1))


def process_of(scheduler: Any) -> Diffusion | Flow:
    """The process that a pipeline's scheduler samples from. Raises UserError for one that is not known here."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        fresh = FlowMatchEulerDiscreteScheduler.from_config(
            config
        )  # as constructed: the pipeline's may be set to few steps
        return Flow(fresh.sigmas[: len(fresh.timesteps)].cpu(), fresh.timesteps.cpu())
    if "beta_schedule" not in config:
        raise UserError(
            f"{type(scheduler).__name__} is no scheduler that can be trained with: give the pipeline a DDIM, DDPM, "
            "Euler or flow-matching Euler scheduler"
        )
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise UserError(
            f"the scheduler's prediction_type is {config['prediction_type']!r}; known are {', '.join(PREDICTIONS)} and "
            "flow matching"
        )
    alphas = DDPMScheduler.from_config(config).alphas_cumprod
    return Diffusion(alphas, config.get("prediction_type", "epsilon"))
