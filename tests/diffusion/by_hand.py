"""What a batch of pairs costs, computed from the pictures with plain diffusers and no code of the trainers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DDPMScheduler
from torch import Tensor

from llmalign.data.images import decode, pixels
from llmalign.diffusion.noise import Draws, draw

SIDES = ("chosen", "rejected")


@dataclass
class Settings:
    """What the config says of a batch; the defaults are the config's."""

    seed: int = 42
    shared_noise: bool = True
    sample_latents: bool = True
    caption_dropout: float = 0.0
    random_flip: str = "none"


def normal_quantile(share: float) -> float:
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def plain_prediction(pipe: Any, noisy: Tensor, index: Tensor, captions: list[str]) -> Tensor:
    """The network's own call, for SD 1.5, 2.1 and SD3."""
    if hasattr(pipe, "unet"):
        states, _ = pipe.encode_prompt(captions, "cpu", 1, False)
        return pipe.unet(noisy, index, encoder_hidden_states=states).sample
    states, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    told = pipe.scheduler.timesteps[index]
    return pipe.transformer(noisy, timestep=told, encoder_hidden_states=states, pooled_projections=pooled).sample


def noised(pipe: Any, clean: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and what is to be predicted, from the pipeline's scheduler as it was made."""
    if "beta_schedule" in pipe.scheduler.config:
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        of_noise = scheduler.config.prediction_type == "epsilon"
        target = noise if of_noise else scheduler.get_velocity(clean, noise, index)
        return scheduler.add_noise(clean, noise, index), target
    return pipe.scheduler.scale_noise(clean, pipe.scheduler.timesteps[index], noise), noise - clean


def index_of(pipe: Any, share: float) -> int:
    """The step of the schedule for a uniform number."""
    if "beta_schedule" in pipe.scheduler.config:
        return int(share * 1000)
    return int(1000 / (1 + math.exp(-normal_quantile(share))))


@torch.no_grad()
def latents_of(pipe: Any, data: bytes, noise: Tensor | None, mirrored: bool) -> Tensor:
    picture = pixels(decode(data), 8)[None]
    posterior = pipe.vae.encode(picture.flip(-1) if mirrored else picture).latent_dist
    raw = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    return (raw - (pipe.vae.config.get("shift_factor") or 0)) * pipe.vae.config.scaling_factor


@torch.no_grad()
def errors(pipes: list[Any], rows: Dataset, settings: Settings, epoch: int = 0) -> list[dict[str, list[float]]]:
    """Per pipeline (policy, reference, ...) and side the denoising errors of the rows, a row at a time."""
    draws = draw((settings.seed, "train", epoch), rows["row_id"], (4, 4, 4), shared=settings.shared_noise)
    found: list[dict[str, list[float]]] = [{side: [] for side in SIDES} for _ in pipes]
    for place, row in enumerate(rows):
        caption = "" if draws.drop[place] < settings.caption_dropout else row["caption"]
        index = torch.tensor([index_of(pipes[0], float(draws.time[place]))])
        for number, side in enumerate(SIDES):
            clean = latents_of(pipes[0], row[side], *_options(draws, place, number, settings))
            noisy, target = noised(pipes[0], clean, draws.noise[place, number][None], index)
            for pipe, into in zip(pipes, found, strict=True):
                prediction = plain_prediction(pipe, noisy, index, [caption])
                into[side].append(F.mse_loss(prediction, target).item())
    return found


def _options(draws: Draws, place: int, number: int, settings: Settings) -> tuple[Tensor | None, bool]:
    lots = draws.flip[place]
    mirrored = {"none": False, "image": bool(lots[number] < 0.5), "pair": bool(lots[0] < 0.5)}[settings.random_flip]
    return (draws.latent[place, number][None] if settings.sample_latents else None), mirrored


@torch.no_grad()
def grid_errors(pipes: list[Any], rows: Dataset, steps: int, seed: int = 42) -> list[dict[str, list[float]]]:
    """As `errors`, the means over the fixed grid of an evaluation: the middles of equal shares of the schedule."""
    found: list[dict[str, list[float]]] = [{side: [0.0] * len(rows) for side in SIDES} for _ in pipes]
    for step in range(steps):
        draws = draw((seed, "eval", step), rows["row_id"], (4, 4, 4))
        index = torch.tensor([index_of(pipes[0], (step + 0.5) / steps)])
        for place, row in enumerate(rows):
            for number, side in enumerate(SIDES):
                clean = latents_of(pipes[0], row[side], None, False)
                noisy, target = noised(pipes[0], clean, draws.noise[place, number][None], index)
                for pipe, into in zip(pipes, found, strict=True):
                    prediction = plain_prediction(pipe, noisy, index, [row["caption"]])
                    into[side][place] += F.mse_loss(prediction, target).item() / steps
    return found
