"""What a launcher promised is what the run has: as many processes, and the wrapper that shards or copies the model.

Two launches are known to give less and say nothing: `accelerate launch --cpu --num_processes 2` starts one process, and
accelerate turns FSDP on a CPU into plain data parallelism.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import str_to_bool
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from llmalign.errors import UserError

SHARDED, ENGINE, COPIES = "FSDP", "DeepSpeed", "DDP"


@dataclass(frozen=True)
class Promise:
    """How many processes a launcher promised (None: more than one, it does not say how many), and which wrapper."""

    processes: int | None
    wrapper: str | None
    stage: int | None = None  # of ZeRO


def promised(environment: Mapping[str, str]) -> Promise:
    """What the variables say that torchrun and accelerate's launchers set for the processes they start."""
    if "WORLD_SIZE" in environment:
        processes: int | None = int(environment["WORLD_SIZE"])
    else:  # accelerate names an address where several processes meet, though it starts one
        alone = "ACCELERATE_MIXED_PRECISION" not in environment or "MASTER_ADDR" not in environment
        processes = 1 if alone else None
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return Promise(processes, ENGINE, int(stage) if stage else None)
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        return Promise(processes, SHARDED)
    return Promise(processes, COPIES if processes != 1 else None)


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return bool(str_to_bool(environment.get(name, "false")))


def broken_world(promise: Promise, processes: int) -> str | None:
    """What is wrong with the number of processes of a run, in a sentence; None where it is as promised."""
    if promise.processes is None:
        return (
            "accelerate launch was asked for several processes and started one, as it does with --cpu: take llmalign "
            "train --accelerate ddp, or torchrun (where one is meant, unset MASTER_ADDR)"
        )
    if processes != promise.processes:
        return (
            f"the launcher started {promise.processes} processes and this one knows of {processes}: they would train "
            "apart from each other; start them with llmalign train --accelerate, accelerate launch or torchrun"
        )
    return None


def broken_wrapper(promise: Promise, wrapper: str, stage: int | None = None) -> str | None:
    """What is wrong with how the model was wrapped, in a sentence; None where it is as promised."""
    if promise.wrapper is not None and wrapper != promise.wrapper:
        return (
            f"the launcher's configuration asks for {promise.wrapper} and the model is wrapped in {wrapper}, so it is "
            "not trained as the configuration says; see accelerate_configs/README.md for what runs where"
        )
    if promise.stage is not None and stage != promise.stage:
        return f"the launcher's configuration asks for ZeRO stage {promise.stage}, and DeepSpeed runs stage {stage}"
    return None


def check_world(config: Any) -> None:
    """Raise UserError where the config's processes are not as many as the launcher promised."""
    fault = broken_world(promised(os.environ), config.world_size)
    if fault is not None:
        raise UserError(fault)


def watch_wrapper(trainer: Any) -> None:
    """Let the run stop with a UserError before its first step where the model is not wrapped as promised."""
    trainer.add_callback(WrapperCallback(trainer))


class WrapperCallback(TrainerCallback):
    """Compares the wrapper with the promise when training begins: it does not exist before."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        promise = promised(os.environ)
        wrapped = self.trainer.model_wrapped
        name, stage = type(wrapped).__name__, None
        if isinstance(wrapped, DistributedDataParallel):
            name = COPIES
        elif isinstance(wrapped, (FSDPModule, FullyShardedDataParallel)):
            name = SHARDED
        elif promise.wrapper == ENGINE:
            from deepspeed import DeepSpeedEngine

            if isinstance(wrapped, DeepSpeedEngine):
                name, stage = ENGINE, wrapped.zero_optimization_stage()
        fault = broken_wrapper(promise, name, stage)
        if fault is not None:
            raise UserError(fault)
