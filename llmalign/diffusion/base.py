"""A small Stable Diffusion trained from nothing on captioned pictures: first its autoencoder, then its UNet.

Made for pictures of 8 to 64 pixels a side and captions of a few words, in minutes on one core: a base to try and to
test preference optimisation on. Not covered: GPUs, pictures that do not fit in memory, resuming.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import CLIPTextModel, CLIPTokenizer

from llmalign.diffusion.tiny import DDIM, LATENT_CHANNELS, clip_text_config, word_tokenizer
from llmalign.errors import UserError

GROUPS = 8
ENCODED_AT_ONCE = 256
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class BaseSettings:
    """How large the networks are and how long they learn; the defaults suit pictures of 8x8 and ten captions.

    `vae_channels` and `unet_channels`: width of each level, multiples of 8; every level after the first halves the
    sides. `max_length`: tokens of a caption with its begin and end. `caption_drop`: share of rows that learn without
    their caption, which guidance needs.
    """

    vae_channels: tuple[int, ...] = (16, 32)
    unet_channels: tuple[int, ...] = (32, 64)
    text_width: int = 32
    max_length: int = 8
    vae_steps: int = 300
    unet_steps: int = 600
    batch_size: int = 32
    vae_rate: float = 3e-3
    unet_rate: float = 4e-3
    caption_drop: float = 0.1


def train_pipeline(
    images: Tensor,
    captions: Sequence[str],
    folder: Path | str,
    settings: BaseSettings | None = None,
    seed: int = 0,
    *,
    progress: bool = True,
) -> Path:
    """Train a StableDiffusionPipeline (epsilon, DDIM) on N captioned pictures, save it in `folder` and return that.

    images: (N, 3, S, S) in [-1, 1]; captions: N, every word of which becomes a token. Works on one thread, where the
    same seed gives the same weights on the same kind of processor; the caller's random state stays as it was. Raises
    UserError where pictures, captions and settings do not fit one another.
    """
    settings = settings or BaseSettings()
    _check(images, captions, settings)
    with _reproducible(seed):
        tokenizer = word_tokenizer(captions, max_length=settings.max_length)
        text_encoder = build_text_encoder(tokenizer, settings)
        vae = train_vae(images, settings, progress)
        latents = encode_images(vae, images)
        embeddings, caption_ids = encode_captions(tokenizer, text_encoder, captions)
        scheduler = DDIMScheduler(**DDIM, prediction_type="epsilon")
        unet = train_unet(latents, embeddings, caption_ids, scheduler, settings, progress)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def _check(images: Tensor, captions: Sequence[str], settings: BaseSettings) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"Pictures come as (N, 3, S, S), not as {tuple(images.shape)}.")
    if not len(images) == len(captions) > 0:
        raise UserError(f"There are {len(images)} pictures and {len(captions)} captions: each picture needs one.")
    if not (images.min() >= -1 and images.max() <= 1):
        low, high = images.min().item(), images.max().item()
        raise UserError(f"Values of pictures lie in [-1, 1], and these in [{low:g}, {high:g}].")
    for name, channels in (("vae_channels", settings.vae_channels), ("unet_channels", settings.unet_channels)):
        for width in channels:
            if width % GROUPS:
                raise UserError(f"{width} in {name} is no multiple of {GROUPS}, as the normalisation needs it.")
    halvings = len(settings.vae_channels) + len(settings.unet_channels) - 2
    if images.shape[-1] % 2**halvings:
        raise UserError(
            f"Pictures of {images.shape[-1]} pixels cannot be halved {halvings} times: "
            "take fewer vae_channels or unet_channels, or another size."
        )


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread, and random numbers from `seed`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def build_text_encoder(tokenizer: CLIPTokenizer, settings: BaseSettings) -> CLIPTextModel:
    """A random text encoder that stays as it is.

    Its token embeddings have unit variance instead of CLIP's .02 squared: else nearly all that it says of a caption is
    common to all captions, and the UNet learns late to tell them apart.
    """
    encoder = CLIPTextModel(clip_text_config(tokenizer, width=settings.text_width)).eval().requires_grad_(False)
    nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def train_vae(images: Tensor, settings: BaseSettings, progress: bool = True) -> AutoencoderKL:
    """An autoencoder of the pictures: mean squared error plus KL_WEIGHT times the KL divergence, each by its values."""
    levels = len(settings.vae_channels)
    vae = AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=settings.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=GROUPS,
        sample_size=images.shape[-1],
    )

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (settings.batch_size,))]
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        return mse_loss(vae.decode(latents).sample, batch) + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()

    bar = tqdm(range(settings.vae_steps), desc="Autoencoder", unit="step", disable=not progress)
    _fit(vae, loss, bar, settings.vae_rate)
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (N, 4, h, w), brought to unit variance by the scaling factor that goes into the autoencoder's config."""
    latents = torch.cat([vae.encode(some).latent_dist.mean for some in images.split(ENCODED_AT_ONCE)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Embeddings (1 + M, length, width) of the empty caption and M distinct ones, and the place of each caption."""
    distinct = list(dict.fromkeys(["", *captions]))
    places = {caption: place for place, caption in enumerate(distinct)}
    ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeddings = torch.cat([text_encoder(some).last_hidden_state for some in ids.split(ENCODED_AT_ONCE)])
    return embeddings, torch.tensor([places[caption] for caption in captions])


def train_unet(
    latents: Tensor,
    embeddings: Tensor,
    caption_ids: Tensor,
    scheduler: DDIMScheduler,
    settings: BaseSettings,
    progress: bool = True,
) -> UNet2DConditionModel:
    """A UNet that predicts the noise in latents (N, C, h, w), with cross-attention at every level but the first."""
    inner = len(settings.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        layers_per_block=1,
        block_out_channels=settings.unet_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * inner,
        up_block_types=("CrossAttnUpBlock2D",) * inner + ("UpBlock2D",),
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,
        norm_num_groups=GROUPS,
    )
    noised = scheduler.config.num_train_timesteps

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (settings.batch_size,))
        kept = torch.rand(settings.batch_size) >= settings.caption_drop
        clean, noise = latents[rows], torch.randn_like(latents[rows])
        timesteps = torch.randint(noised, (settings.batch_size,))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return mse_loss(unet(noisy, timesteps, embeddings[caption_ids[rows] * kept]).sample, noise)

    bar = tqdm(range(settings.unet_steps), desc="UNet", unit="step", disable=not progress)
    _fit(unet, loss, bar, settings.unet_rate)
    return unet


def _fit(network: nn.Module, loss_of_batch: Callable[[], Tensor], steps: tqdm, rate: float) -> None:
    """AdamW with a warm-up and a cosine decay; leaves the network frozen, in evaluation mode."""
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps), pct_start=0.1)
    for _ in steps:
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    network.eval().requires_grad_(False)
