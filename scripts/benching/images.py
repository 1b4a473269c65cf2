"""The image bench's cases, model and pairs, and what the processes of a case read from their folder."""

import io
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benching.image_cases import Job
from llmalign.diffusion.latents import encode
from llmalign.diffusion.pipelines import family_of
from llmalign.diffusion.tiny import build_tiny, word_tokenizer
from llmalign.diffusion.trainer import SIDES

WORDS = [f"word{number}" for number in range(64)]
TIME_WIDTH = 16
ENCODED_AT_ONCE = 4  # pictures


@dataclass(frozen=True)
class Size:
    """Measures of the networks. The defaults: UNet a fifth and VAE a sixth as wide as SDXL's, sides a quarter as long.

    As there, a picture's encoding takes six to seven tenths of the operations of the UNet's forward pass. With 4 pairs
    a step the kept activations take 4.5 times the memory of the UNet's weights, with SDXL and one pair 5 times.
    """

    unet: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (1, 1, 2)  # transformer blocks at each level
    heads: tuple[int, ...] = (2, 4, 8)
    layers: int = 2
    vae: tuple[int, ...] = (20, 40, 80, 80)
    text: tuple[int, int] = (64, 128)
    text_layers: tuple[int, int] = (2, 4)
    tokens: int = 77
    side: int = 256  # pixels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.side // 2 ** (len(self.vae) - 1)
        return 4, side, side


BENCH = Size()
QUICK = Size((8, 16, 16), (1, 1, 1), (1, 2, 2), 1, (8, 8), (16, 16), (1, 1), 8, 16)


def size_of(job: Job) -> Size:
    """The networks that a job is about."""
    return QUICK if job.quick else BENCH


def build_pipeline(size: Size) -> Any:
    """An SDXL of that size with random weights, each part from the tiny one's configuration."""
    torch.manual_seed(0)
    tiny = build_tiny("sdxl")
    parts: dict[str, Any] = {}
    for width, layers, ending, pad in zip(size.text, size.text_layers, ("", "_2"), ("<|endoftext|>", "!"), strict=True):
        tokenizer = word_tokenizer(WORDS, max_length=size.tokens, pad_token=pad)
        changes = {
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "projection_dim": width,
            "num_hidden_layers": layers,
            "max_position_embeddings": size.tokens,
        }
        old = tiny.components["text_encoder" + ending]
        parts["text_encoder" + ending] = type(old)(type(old.config)(**old.config.to_dict() | changes))
        parts["tokenizer" + ending] = tokenizer
    attended = len(size.unet) - 1
    unet = {
        "sample_size": size.latent_shape[1],
        "block_out_channels": size.unet,
        "layers_per_block": size.layers,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attended,
        "up_block_types": ("CrossAttnUpBlock2D",) * attended + ("UpBlock2D",),
        "transformer_layers_per_block": size.blocks,
        "attention_head_dim": size.heads,
        "cross_attention_dim": sum(size.text),
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + size.text[1],
    }
    vae = {
        "sample_size": size.side,
        "block_out_channels": size.vae,
        "layers_per_block": size.layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(size.vae),
        "up_block_types": ("UpDecoderBlock2D",) * len(size.vae),
    }
    parts["unet"] = UNet2DConditionModel.from_config(dict(tiny.unet.config) | unet)
    parts["vae"] = AutoencoderKL.from_config(dict(tiny.vae.config) | vae)
    return type(tiny)(**parts, scheduler=tiny.scheduler, add_watermarker=False)


def pair_rows(side: int, count: int) -> Dataset:
    """Pairs of pictures of noise with captions of random words."""
    draws = random.Random(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.frombytes("RGB", (side, side), draws.randbytes(3 * side**2)).save(buffer, "PNG")
        return buffer.getvalue()

    def row(number: int) -> dict[str, Any]:
        caption = " ".join(draws.choices(WORDS, k=6))
        return {"row_id": number, "caption": caption, "chosen": picture(), "rejected": picture(), "label": 1.0}

    return Dataset.from_list([row(number) for number in range(count)])


def prepare(job: Job) -> dict[str, float]:
    """Write the pipeline, the pairs, the trainer's cache, and what lies in the cache as tensors for the script.

    Returns the size of the networks, and the CPU seconds that encoding the pairs of one step took.
    """
    size, home = size_of(job), Path(job.folder)
    build_pipeline(size).save_pretrained(home / "pipe")
    pair_rows(size.side, job.steps * job.pairs).save_to_disk(home / "rows")
    pipe, rows = DiffusionPipeline.from_pretrained(home / "pipe"), load_from_disk(home / "rows")
    began = time.process_time()
    latents = encode(
        {"train": rows},
        pipe,
        family_of(pipe),
        images=SIDES,
        resolution=size.side,
        flips=False,
        folder=home / "cache",
        device=torch.device("cpu"),
        batch_size=ENCODED_AT_ONCE,
    )
    seconds = (time.process_time() - began) / job.steps
    ready = latents.sets["train"].with_format("torch")[:]
    channels, *sides = latents.latent_shape
    moments = {name: ready[name].reshape(-1, 2 * channels, *sides) for name in SIDES}
    torch.save(moments | latents.conditions(ready["caption_id"].tolist()), home / "encoded.pt")
    return measures(pipe, size) | {"encode_seconds": seconds}


@torch.no_grad()
def measures(pipe: Any, size: Size) -> dict[str, float]:
    """Millions of parameters, and gigaflops of one picture's or caption's forward pass, of UNet, VAE and encoders."""
    conditions = family_of(pipe).conditions(pipe, ["word0"])
    latents, step = torch.zeros(1, *size.latent_shape), torch.zeros(1, dtype=torch.long)
    calls = {
        "unet": lambda: family_of(pipe).predict(pipe.unet, latents, step, conditions),
        "vae": lambda: pipe.vae.encode(torch.zeros(1, 3, size.side, size.side)),
        "text": lambda: family_of(pipe).conditions(pipe, ["word0"]),
    }
    found = {"parameters": sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        found[f"{name}_gigaflops"] = counter.get_total_flops() / 1e9
    return found
