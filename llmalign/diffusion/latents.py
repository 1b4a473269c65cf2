"""Pictures and captions as the network takes them, encoded once and kept on disk, so that the encoders can be dropped.

A picture becomes the mean and the deviation of its latents (a sample of them is drawn anew in every epoch), with flips
also those of its mirror image; a caption becomes its conditions, once however many rows share it. The files are Arrow,
read from the disk as they are needed, and named after what they depend on: the weights of the encoders, the rows, the
resolution. They are written in parts, each whole or not there, so that an interrupted run goes on with the next part.
Not covered: random crops, which would need the encoder in every step.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmalign.data.checks import Fault
from llmalign.data.images import decode, pixels
from llmalign.data.weights import weights_digest
from llmalign.diffusion.pipelines import Conditions, Family
from llmalign.errors import UserError
from llmalign.processes import fail_together, from_all_processes

logger = logging.getLogger(__name__)

PART_ROWS = 256  # small, so that processes have parts of their own and an interruption loses little
CAPTIONS_AT_ONCE = 32
FLIPPED = "_flipped"
KEPT = ("row_id", "label", "flipped")  # columns of the rows that training reads beside pictures and captions
FORMAT = 1


@dataclass(frozen=True)
class LatentRows:
    """Rows ready for training: `captions` holds the conditions of `texts`, 0 is the empty one; shapes have no rows."""

    sets: dict[str, Dataset]
    captions: Dataset
    texts: list[str]
    latent_shape: tuple[int, ...]  # (C, h, w)
    condition_shapes: dict[str, tuple[int, ...]]

    def empty(self) -> Conditions:
        """The conditions of the empty caption, one row."""
        return self.conditions([0])

    def conditions(self, caption_ids: Sequence[int]) -> Conditions:
        """Conditions of captions, a row each, float32."""
        rows = self.captions[list(caption_ids)]
        return {
            name: torch.from_numpy(np.asarray(rows[name], dtype=np.float32)).reshape(-1, *shape)
            for name, shape in self.condition_shapes.items()
        }


def encode(
    sets: dict[str, Dataset],
    pipe: Any,
    family: Family,
    *,
    images: Sequence[str],
    resolution: int,
    flips: bool,
    folder: Path,
    device: torch.device,
    batch_size: int,
) -> LatentRows:
    """Encode the pictures in the columns `images` (none: captions alone) and the captions of every set of rows.

    Processes of one run share the parts out and wait for each other. Raises UserError, naming the row, for a picture
    that cannot be read, and where the folder cannot be written.
    """
    unique = sorted({caption for rows in sets.values() for caption in rows.unique("caption")} - {""})
    place = {caption: number for number, caption in enumerate(["", *unique])}
    captions, shapes = _encode_captions(list(place), pipe, family, folder, device)
    shape: tuple[int, ...] = ()
    ready = {}
    if images:
        vae = pipe.vae.to(device).eval().requires_grad_(False)
        shape = _moments(vae, torch.zeros(1, 3, resolution, resolution, device=device)).shape[1:]
        shape = (shape[0] // 2, *shape[1:])
        key = {"vae": weights_digest(vae), "resolution": resolution, "flips": flips, "images": list(images)}
    for name, rows in sets.items():
        if images:
            coder = _Coder(vae, tuple(images), resolution, flips, device)
            features = _row_features(rows, coder.columns, 2 * int(np.prod(shape)))
            coded = _in_parts(rows, coder, features, folder, key, batch_size, f"Encoding the images of {name}")
            # Read as lists of numbers, the latents of a pair of 1024 pixels take ten times as long.
            coded = coded.with_format("numpy", columns=coder.columns, output_all_columns=True)
        else:
            coded = rows.remove_columns("caption")
        # Not in the files: an id counts the captions of all sets, and the files of one outlive a change of another.
        ready[name] = coded.add_column("caption_id", [place[caption] for caption in rows["caption"]])
    return LatentRows(ready, captions, list(place), shape, shapes)


def moments_to_latents(moments: Tensor, noise: Tensor | None, family: Family) -> Tensor:
    """Latents as the network takes them from mean and deviation (N, 2C, h, w): a sample, or the mean without noise."""
    mean, deviation = moments.chunk(2, dim=1)
    return family.scaled(mean if noise is None else mean + deviation * noise)


class LatentCollator:
    """Makes a batch of encoded rows: `row_id` (B,), the moments (B, 2C, h, w) of each image, `conditions` by name."""

    def __init__(self, latents: LatentRows, images: Sequence[str]) -> None:
        self._latents = latents
        self._images = tuple(images)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"row_id": torch.tensor([int(row["row_id"]) for row in rows])}
        channels, *size = self._latents.latent_shape or (0,)
        for name in (column for image in self._images for column in (image, image + FLIPPED)):
            if name in rows[0]:
                stacked = np.stack([np.asarray(row[name], dtype=np.float32) for row in rows])
                batch[name] = torch.from_numpy(stacked).reshape(len(rows), 2 * channels, *size)
        for name in KEPT[1:]:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        ids = [int(row["caption_id"]) for row in rows]
        batch |= {"caption_id": torch.tensor(ids), "conditions": self._latents.conditions(ids)}
        return batch


class _Coder:
    """Turns a batch of rows into moments; called by `Dataset.map`."""

    def __init__(self, vae: Any, images: tuple[str, ...], resolution: int, flips: bool, device: Any) -> None:
        self._vae, self._resolution, self._device = vae, resolution, device
        self._images, self._flips = images, flips
        self.columns = [*images, *(image + FLIPPED for image in images if flips)]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        coded: dict[str, list[Any]] = {}
        for image in self._images:
            stack = torch.stack(
                [self._pixels(row_id, image, data) for row_id, data in zip(batch["row_id"], batch[image], strict=True)]
            )
            coded[image] = self._code(stack)
            if self._flips:
                coded[image + FLIPPED] = self._code(stack.flip(-1))
        return coded

    def _code(self, stack: Tensor) -> list[Any]:
        return list(_moments(self._vae, stack.to(self._device)).flatten(1).cpu().numpy())

    def _pixels(self, row_id: int, image: str, data: bytes) -> Tensor:
        try:
            return pixels(decode(data), self._resolution)
        except Fault as fault:
            raise UserError(
                f"the image {image!r} of the row with row_id {row_id} {fault}; take the row out of the data"
            ) from None


@torch.no_grad()
def _moments(vae: Any, stack: Tensor) -> Tensor:
    posterior = vae.encode(stack.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def _row_features(rows: Dataset, columns: Sequence[str], length: int) -> Features:
    kept = {name: rows.features[name] for name in KEPT if name in rows.features}
    return Features({**kept, **{name: List(Value("float32"), length) for name in columns}})


def _encode_captions(
    captions: list[str], pipe: Any, family: Family, folder: Path, device: torch.device
) -> tuple[Dataset, dict[str, tuple[int, ...]]]:
    encoders = [part for name in family.captioned_by if isinstance(part := pipe.components[name], torch.nn.Module)]
    for encoder in encoders:
        encoder.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        first = family.conditions(pipe, captions[:1])
    shapes = {name: tuple(value.shape[1:]) for name, value in first.items()}
    # Half precision is kept as float16, since T5's are most of the disk: bfloat16 loses what is below 3e-8.
    kinds = {name: "float32" if value.dtype == torch.float32 else "float16" for name, value in first.items()}
    features = Features({name: List(Value(kinds[name]), int(np.prod(shape))) for name, shape in shapes.items()})

    @torch.no_grad()
    def code(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        conditions = family.conditions(pipe, batch["caption"])
        return {
            name: list(value.float().flatten(1).cpu().numpy().astype(kinds[name])) for name, value in conditions.items()
        }

    rows = Dataset.from_dict({"caption": captions})
    tokenizers = [
        part for name in family.captioned_by if isinstance(part := pipe.components[name], PreTrainedTokenizerBase)
    ]
    key = {
        "tokenizers": [[sorted(part.get_vocab().items()), part.model_max_length] for part in tokenizers],
        "encoders": [weights_digest(encoder) for encoder in encoders],
        "family": type(family).__name__,
        "kinds": kinds,
    }
    coded = _in_parts(rows, code, features, folder, key, CAPTIONS_AT_ONCE, "Encoding captions")
    return coded.with_format("numpy"), shapes


def _in_parts(
    rows: Dataset,
    code: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    features: Features,
    folder: Path,
    key: dict[str, Any],
    batch_size: int,
    said: str,
) -> Dataset:
    """`Dataset.map` in parts with files of known names, which the processes share out.

    Hosts may keep folders of their own: the processes of each then share out what theirs lacks.
    """
    state = PartialState()
    described = json.dumps({"format": FORMAT, "rows": rows._fingerprint, **key}, sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:32]
    starts = range(0, len(rows), PART_ROWS)

    def file(number: int) -> Path:
        return folder / f"{digest}-{number:05d}.arrow"

    def part(number: int) -> Dataset:
        some = rows.select(range(starts[number], min(starts[number] + PART_ROWS, len(rows))))
        return some.map(
            code,
            batched=True,
            batch_size=batch_size,
            remove_columns=[name for name in rows.column_names if name not in features],
            features=features,
            cache_file_name=str(file(number)),
            new_fingerprint=f"{digest}-{number:05d}",
            desc=said,
        )

    def make(numbers: Sequence[int]) -> None:
        fault = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                part(number)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = (
                f"{folder} cannot be written ({error.strerror or error}); set image_cache_dir to a folder that can be"
            )
        fail_together(fault)

    make(range(state.process_index, len(starts), state.num_processes))
    lacking = [number for number in range(len(starts)) if not file(number).is_file()]
    if any(from_all_processes(bool(lacking))):
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        make(lacking[state.local_process_index :: here])
    return datasets.concatenate_datasets([part(number) for number in range(len(starts))])
