"""Rewards of images under their prompts: brightness, the size of a JPEG, CLIP-style scorers, and functions in Python.

name                                   reward of one image
brightness                             mean of all its RGB values, in [0, 1]
compressibility                        minus the kB (1000 bytes) of its JPEG at quality 95, as in DDPO and D3PO
incompressibility                      plus the same
clip:MODEL                             see `ClipScorer`; a folder or a Hub name, such as clip:yuvalkirstain/PickScore_v1
clip:MODEL,PROCESSOR                   the same where tokenizer and image processor lie elsewhere
package.module:function, file.py:f     f(prompts, images, **columns) -> list[float | None], found by `load_function`
"""

import asyncio
import difflib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor

from llmalign.errors import UserError
from llmalign.pickles import weight_options
from llmalign.rewards.classifiers import require_folder
from llmalign.rewards.functions import NOT_A_REWARD, AsyncGuarded, RewardFunction, guard, load_function

logger = logging.getLogger(__name__)

CLIP_PREFIX = "clip:"
JPEG_QUALITY = 95
IMAGES_PER_BATCH = 32


class ImageReward:
    """A reward function of images under the guard of text rewards: a row that fails costs itself alone.

    `guarded` is that guard, whose `failed`, `count` and `messages` say what failed and why. Raises UserError where the
    function does. Not covered: functions that need several images of one row, and latents.
    """

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        self.guarded = guard(function, name)
        self.__name__ = self.guarded.__name__

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> Tensor:
        """Rewards (N,) float32 on the CPU of N images, NaN where there is none; `columns` go to the function.

        Raises UserError for prompts and images of unequal number.
        """
        if len(prompts) != len(images):
            raise UserError(f"every image needs its prompt; got {len(prompts)} prompts and {len(images)} images")
        if not len(prompts):
            return torch.zeros(0)
        found: Any = self.guarded(prompts=list(prompts), images=list(images), **columns)
        if isinstance(self.guarded, AsyncGuarded):
            found = asyncio.run(found)
        return torch.tensor([NOT_A_REWARD if reward is None else reward for reward in found], dtype=torch.float32)


def brightness(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """Mean of all RGB values of each image, in [0, 1]; the three colours weigh the same."""
    return [float(np.asarray(image.convert("RGB")).mean()) / 255 for image in images]


def incompressibility(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """Size of each image as a JPEG of quality 95, in kB of 1000 bytes (DDPO, arXiv 2305.13301)."""
    return [_jpeg_bytes(image) / 1000 for image in images]


def compressibility(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """Minus the `incompressibility`."""
    return [-kilobytes for kilobytes in incompressibility(prompts, images)]


BUILT_IN = {function.__name__: function for function in (brightness, compressibility, incompressibility)}


class ClipScorer:
    """Rewards of a CLIP model: the cosine of text and image embedding times the model's own logit scale.

    The scale is 100 in OpenAI's and LAION's models, and such that a PickScore model gives its PickScore. Text beyond
    the model's length (77 tokens) is cut and counted in `truncated`. Images are prepared with PIL, so that the numbers
    do not depend on whether torchvision is installed. Not covered: gradients; scorers of other architectures (SigLIP,
    BLIP), which `load` refuses.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = processor.tokenizer
        self.image_processor: Any = processor.image_processor
        self.max_length = model.config.text_config.max_position_embeddings
        self.truncated = 0

    @classmethod
    def load(cls, path: str, *, processor: str | None = None, device: torch.device | str = "cpu") -> "ClipScorer":
        """The scorer of a folder or a Hub name, in float32: bfloat16 has steps of .125 at a reward of 20.

        `processor` names where tokenizer and image processor lie, if not beside the model. Weights are read from
        safetensors alone. Raises UserError where there is nothing to load, weights are missing, or it is no CLIP model.
        """
        for place in (path, processor or path):
            require_folder(place, "save a CLIPModel with its processor there, or check the path")
        try:
            model, found = AutoModel.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, **weight_options()
            )
            own = AutoProcessor.from_pretrained(processor or path, backend="pil")
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"no CLIP scorer could be loaded from {path!r} ({reason}); it needs a CLIPModel in safetensors with "
                "its processor beside it: check the name, or name the processor as clip:MODEL,PROCESSOR"
            ) from error
        if not (isinstance(model, CLIPModel) and isinstance(own, CLIPProcessor)):
            kinds = f"{type(model).__name__} with {type(own).__name__}"
            raise UserError(f"{path!r} is {kinds}, and clip: takes a CLIPModel with a CLIPProcessor")
        if found["missing_keys"]:
            raise UserError(
                f"{path!r} lacks {min(found['missing_keys'])}, which would be drawn at random; save it whole"
            )
        return cls(model.to(device), own)

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
        """Rewards of N images; all further columns are ignored."""
        self._count_long(prompts)
        starts = range(0, len(prompts), IMAGES_PER_BATCH)
        batches = [slice(start, start + IMAGES_PER_BATCH) for start in starts]
        return torch.cat([self._batch(prompts[batch], images[batch]) for batch in batches]).tolist()

    @torch.no_grad()
    def _batch(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        device = self.model.device
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        text = self.tokenizer(list(prompts), **options).to(device)
        pixels = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt").to(device)
        cosines = cosine_similarity(
            self.model.get_text_features(**text).pooler_output, self.model.get_image_features(**pixels).pooler_output
        )
        return (cosines * self.model.logit_scale.exp()).cpu()

    def _count_long(self, prompts: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        long = sum(length > self.max_length for length in lengths)
        if long and not self.truncated:
            logger.warning(
                "%d of %d prompts exceed the scorer's %d tokens and lose their end; later ones are counted and not "
                "logged.",
                long, len(lengths), self.max_length,
            )  # fmt: skip
        self.truncated += long


def load_image_reward(name: str, *, folder: Path | None = None, device: torch.device | str = "cpu") -> ImageReward:
    """The image reward that `name` stands for, as in this module's table.

    A function's file is looked for in `folder`, then in the working directory; `device` is a scorer's. Raises UserError
    for an unknown name (naming the nearest), and as `load_function` and `ClipScorer.load` do.
    """
    if name in BUILT_IN:
        return ImageReward(BUILT_IN[name])
    if name.startswith(CLIP_PREFIX):
        path, _, processor = name.removeprefix(CLIP_PREFIX).partition(",")
        if not path:
            raise UserError(f"{name!r} names no model: write clip:FOLDER or clip:HUB_NAME.")
        return ImageReward(ClipScorer.load(path, processor=processor or None, device=device), name)
    if ":" not in name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(
            f"there is no image reward {name!r}{hint}; known are: {', '.join(BUILT_IN)}, clip:MODEL, "
            "package.module:function and path/to/file.py:function."
        )
    return ImageReward(load_function(name, folder=folder), name)


def _jpeg_bytes(image: Image.Image) -> int:
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, format="JPEG", quality=JPEG_QUALITY)
    return encoded.tell()
