"""A fresh process that trains as a recipe says and writes down its peak memory: `python measuring.py JOB.json`.

What is resident after a first small run of the same method is taken off, so that libraries, and what they keep from
their first use, are not counted. The peak is the kernel's own (VmHWM, set back through /proc/self/clear_refs),
anonymous pages and mapped weights alike.
"""

import gc
import json
import logging
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = 400


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token, so that texts of an exact length are easy to write."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def save_model(folder: Path, family: str = "llama", **shape: int) -> Path:
    """A model with random weights and its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_pairs(file: Path, lengths: list[tuple[int, int, int]]) -> Path:
    """Pairs whose prompt, chosen and rejected answer have so many tokens, the answers with their end."""

    def words(start: int, count: int) -> str:
        return " ".join(f"w{(start * 7 + place) % WORDS}" for place in range(count))

    rows = [
        {
            "prompt": words(3 * i, prompt),
            "chosen": " " + words(3 * i + 1, chosen - 1),
            "rejected": " " + words(3 * i + 2, rejected - 1),
        }
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save_pipeline(folder: Path) -> Path:
    """A Stable Diffusion with random weights and a UNet of some twelve million numbers, for pictures of 128 pixels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from llmalign.diffusion.tiny import build_tiny

    pipe = build_tiny("sd")
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=pipe.unet.config.cross_attention_dim,
    )
    pipe.vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=128,
    )
    pipe.save_pretrained(folder)
    return folder


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_of(recipe: str, overrides: list[str], warm_up: list[str]) -> dict:
    """Peak bytes of `llmalign.train.run` over what is resident before it."""
    from llmalign.recipe import load_recipe
    from llmalign.train import run

    run(load_recipe(recipe, warm_up))
    gc.collect()
    before = {name: status(name) for name in ("VmRSS", "RssAnon", "RssFile")}
    Path("/proc/self/clear_refs").write_text("5")
    run(load_recipe(recipe, overrides))
    return {"peak": status("VmHWM") - before["VmRSS"], "before": before}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(peak_of(job["recipe"], job["overrides"], job["warm_up"])))
