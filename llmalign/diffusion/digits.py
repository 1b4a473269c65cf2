"""The pipeline that `embedded:digits` stands for: a small Stable Diffusion of scikit-learn's 8x8 digits.

It obeys its ten prompts, so that what preference optimisation gains and what it spoils can both be measured, in seconds
and with nothing downloaded.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor

from llmalign import assets
from llmalign.data.images import pixels
from llmalign.diffusion import base, tiny
from llmalign.diffusion.base import BaseSettings, train_pipeline
from llmalign.errors import UserError

SIZE = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"digit {word}" for word in WORDS)


def digit_images() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn: grey pictures (N, 3, 8, 8) in [-1, 1], and which digit each is, (N,) int64."""
    digits = _sklearn("datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)


def train_digits(
    folder: Path | str, seed: int = 0, settings: BaseSettings | None = None, *, progress: bool = True
) -> Path:
    """Train the digits pipeline as `train_pipeline` does, save it in `folder` and return that; it obeys PROMPTS."""
    images, labels = digit_images()
    captions = [PROMPTS[label] for label in labels.tolist()]
    return train_pipeline(images, captions, folder, settings, seed, progress=progress)


def ensure_digits(seed: int = 0) -> Path:
    """The folder of `embedded:digits`, trained on first use into the user's cache and found there afterwards.

    Several processes may ask for it at once, see `assets.ensure_folder`.
    """
    sources = [Path(__file__), Path(base.__file__), Path(tiny.__file__)]
    key = assets.content_key(sources, torch, transformers, diffusers)
    return assets.ensure_folder(
        f"digits-{seed}-{key}",
        lambda folder: train_digits(folder, seed),
        "the digits pipeline",
        "about a minute",
    )


class DigitClassifier:
    """Which digit a picture shows: logistic regression on the grey values of scikit-learn's digits."""

    def __init__(self) -> None:
        images, labels = digit_images()
        self._model = _sklearn("linear_model").LogisticRegression(max_iter=500)
        self._model.fit(_features(images), labels.numpy())

    def predict(self, images: Sequence[Image.Image]) -> list[int]:
        """The digit in each of N RGB pictures, which are brought to 8x8."""
        return self._model.predict(_features(torch.stack([pixels(image, SIZE) for image in images]))).tolist()

    def right(self, images: Sequence[Image.Image], labels: Sequence[int]) -> list[bool]:
        """Whether each of N pictures shows the digit that it should."""
        return [found == label for found, label in zip(self.predict(images), labels, strict=True)]

    def accuracy(self, images: Sequence[Image.Image], labels: Sequence[int]) -> float:
        """The share of N pictures that show the digit that they should."""
        right = self.right(images, labels)
        return sum(right) / len(right)


def _features(images: Tensor) -> Any:
    """Grey values of (N, 3, 8, 8) as an array (N, 64) in [0, 1]."""
    return (images.mean(1).flatten(1) / 2 + 0.5).numpy()


def _sklearn(module: str) -> Any:
    """A module of scikit-learn, which takes a second to import and only these pictures need."""
    try:
        return import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise UserError("The digits come from scikit-learn: pip install 'llmalign[diffusion]'.") from error
