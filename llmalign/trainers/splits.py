"""Going on with other processes or micro-batches than a checkpoint was written with: when that changes nothing.

The rows of an optimizer step follow from the seed and their number, so another split of the same number keeps the order
of the data. What else a split may change is looked for here: rows that fill up an epoch's last batch, and draws.
"""

import hashlib
import json
import logging
from collections.abc import Sized
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from llmalign.errors import UserError
from llmalign.trainers.manifest import Manifest, read_manifest
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.trainers.rollouts import RolloutMixin
from llmalign.trainers.sharding import COPIES, engine_of
from llmalign.trainers.soundness import writers_of

logger = logging.getLogger(__name__)

#: what an engine leaves in a checkpoint
_MARKS = {"zero": "global_step*", "fsdp": "pytorch_model_fsdp*"}
_NAMES = {COPIES: "one process or DDP", "zero": "ZeRO", "fsdp": "FSDP"}


def check_split(trainer: Any, checkpoint: Path) -> None:
    """Raise UserError where a trainer splits its steps otherwise than a whole checkpoint's run, and that matters."""
    args, before = trainer.args, writers_of(checkpoint)
    manifest = read_manifest(checkpoint)
    _check_engine(engine_of(trainer), checkpoint, manifest)
    batch = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("train_batch_size")
    rows = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    written = None if manifest is None else manifest.rows_per_step
    same = before == args.world_size and batch in (None, trainer._train_batch_size)
    if args.ignore_data_skip or (same and written in (None, rows)):
        return
    if written not in (None, rows):
        raise UserError(
            f"{checkpoint} was written by a run of {written} rows a step on {before} process(es), and this one takes "
            f"{rows} on {args.world_size}, so that other rows would come together: choose per_device_train_batch_size "
            f"and gradient_accumulation_steps so that their product with the processes is {written}"
        )
    rounds = {trainer._train_batch_size * args.world_size, (batch or 0) * before}
    reason = _why_not(trainer, rounds, processes=before != args.world_size)
    said = f"{before} process(es) with {batch} rows at a time"
    own = f"this run has {args.world_size} with {trainer._train_batch_size}"
    if reason is not None:
        raise UserError(
            f"{checkpoint} was written by {said} and {own}, which would change its result, because {reason}: take "
            f"{before} process(es) and per_device_train_batch_size: {batch}"
        )
    if args.process_index == 0:
        drawn = ", and the random states, on which nothing in this training depends, are drawn anew"
        logger.warning(
            "%s was written by %s and %s: each step has the rows that it would have had%s.",
            checkpoint, said, own, drawn if before != args.world_size else "",
        )  # fmt: skip


def _check_engine(own: str, checkpoint: Path, manifest: Manifest | None) -> None:
    """Raise UserError where the optimizer's state is another engine's: it would be passed over, or not be found."""
    written = manifest.engine if manifest is not None else None
    kind = written or next((name for name, mark in _MARKS.items() if next(checkpoint.glob(mark), None)), COPIES)
    if own == kind or (written is None and own.startswith(kind)):  # an older version did not tell the stage
        return
    ways = {COPIES: "on one process or with --accelerate ddp", "zero": "with the --accelerate zero... that wrote it"}
    raise UserError(
        f"{checkpoint} holds the optimizer as {_NAMES.get(kind, kind)} keeps it, and this run is under "
        f"{_NAMES.get(own, own)}, which cannot read it: resume it {ways.get(kind, f'with --accelerate {kind}')}"
    )


def draw_anew(trainer: Any) -> None:
    """Seed this process by the run's seed, its step and its rank, where a checkpoint has no random state for it."""
    key = json.dumps([trainer.args.seed, trainer.state.global_step, trainer.args.process_index])
    set_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))


def _why_not(trainer: Any, rounds: set[int], *, processes: bool) -> str | None:
    """What another split would change; `rounds`: rows that all processes take at a time, both ways.

    `processes` tells whether their number is another one, and not the rows that each takes alone.
    """
    args, rows = trainer.args, trainer.train_dataset
    if isinstance(trainer, RolloutMixin):
        return "each process samples rollouts, by its batch and with random numbers of its own"
    if processes and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return "DeepSpeed and FSDP keep a part of the state with each process"
    if processes and not isinstance(rows, Sized):
        return "a stream is dealt out to the processes as it comes"
    if args.train_sampling_strategy == "group_by_length":
        return "train_sampling_strategy: group_by_length sorts by the batch of one process"
    sharing = args.accelerator_config
    if sharing.split_batches or not sharing.even_batches or not sharing.use_seedable_sampler:
        return "accelerator_config deals rows out in a way of its own"
    if args.dataloader_drop_last and len({len(rows) % each for each in rounds}) > 1:
        return "dataloader_drop_last would drop other rows"
    if not isinstance(trainer, PairTrainerMixin) and any(len(rows) % each for each in rounds):
        return (
            f"the {len(rows)} rows are no multiple of the {max(rounds)} that all processes take at a time, and an "
            "epoch's last batch is filled up by repeating rows"
        )
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha draws noise"
    drawing = dropout_of(trainer.model)
    return None if drawing is None else f"dropout ({drawing}) draws random numbers in each process"


def dropout_of(model: nn.Module) -> str | None:
    """The first module whose dropout is on in training, None where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                return name
            continue
        for key, value in vars(module).items():  # attention kernels take it as a number
            if "drop" in key and isinstance(value, float) and value > 0:
                return f"{name}.{key}"
    return None
