"""Captions, rewards of pictures, trainers that draw their own pictures, and what they draw by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from llmalign.diffusion.online import D3POConfig, D3POTrainer, PSOConfig, PSOTrainer
from llmalign.rewards.images import ImageReward
from tests.diffusion.training import lora
from tests.diffusion.vectors import ALPHAS

CAPTIONS = ("digit one", "a red picture", "digit seven")
SHAPE = (4, 4, 4)


def captions(count: int = 3, first: int = 0) -> Dataset:
    return Dataset.from_list([{"row_id": first + i, "caption": CAPTIONS[i % 3]} for i in range(count)])


def bright(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def dark(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    return [-value for value in bright(prompts, images)]


def red(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def blank(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    return [0.0 for _ in images]


def online(
    pipe: Any,
    folder: Path,
    *,
    rewards: tuple[Callable, ...] = (bright,),
    rows: Any = None,
    evaluation: Any = None,
    peft: Any = True,
    pso: bool = False,
    **changes: Any,
) -> D3POTrainer:
    """Two rounds of four pairs of four steps, an optimizer step each; the first factor of LoRA is always the same."""
    given = {
        "output_dir": str(folder / "out"),
        "image_cache_dir": str(folder / "cache"),
        "reward_funcs": [reward.__name__ for reward in rewards],
        "rounds": 2,
        "pairs_per_round": 4,
        "sampling_steps": 4,
        "guidance_scale": 1.0 if pso else 3.0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 12 if pso else 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    trainer, config = (PSOTrainer, PSOConfig) if pso else (D3POTrainer, D3POConfig)
    torch.manual_seed(0)
    return trainer(
        pipe,
        config(**given),
        captions() if rows is None else rows,
        evaluation,
        peft_config=lora(pipe) if peft is True else peft or None,
        reward_functions=[ImageReward(reward) for reward in rewards],
    )


def policy_of(built: Any, pipe: Any, folder: Path) -> Any:
    """An ordinary pipeline with the adapter of a trainer."""
    built.model.save_adapter(built.pipeline_class, folder)
    pipe.load_lora_weights(folder)
    return pipe


def guided_noise(pipe: Any, noisy: Tensor, timestep: int, caption: str, guidance: float) -> Tensor:
    """Predicted noise (1, C, h, w) of the network, called twice, with and without the caption."""
    with torch.no_grad():
        states, empty = pipe.encode_prompt([caption], "cpu", 1, True)
    told = torch.tensor([timestep])
    captioned = pipe.unet(noisy, told, encoder_hidden_states=states).sample
    without = pipe.unet(noisy, told, encoder_hidden_states=empty).sample
    return without + guidance * (captioned - without)


def ddim_mean_std(pipe: Any, noisy: Tensor, step: int, caption: str, guidance: float) -> tuple[Tensor, float]:
    """Of step 0 .. 3 of a DDIM sampler of four steps with eta 1, in float64, as written in the paper of DDIM."""
    now = [751, 501, 251, 1][step]
    alpha, before = ALPHAS[now], ALPHAS[max(now - 250, 0)]
    noise = guided_noise(pipe, noisy, now, caption, guidance).double()
    clean = (noisy.double() - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    std = ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
    return before.sqrt() * clean + (1 - before - std**2).sqrt() * noise, std.item()


def ddim_logp(pipe: Any, noisy: Tensor, following: Tensor, step: int, caption: str, guidance: float) -> Tensor:
    """Log-probability of one transition (1, C, h, w), the mean over the latent's numbers."""
    mean, std = ddim_mean_std(pipe, noisy, step, caption, guidance)
    return torch.distributions.Normal(mean, std).log_prob(following.double()).mean()
