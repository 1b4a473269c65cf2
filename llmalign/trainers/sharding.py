"""What accelerate does in silence when it shards: another wrapper on the CPU, another optimizer when it offloads."""

from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers.training_args import OptimizerNames

from llmalign.errors import UserError

COPIES = "copies"  # one process, or DDP
#: what DeepSpeed's Adam for the CPU computes too
ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


def let_the_cpu_shard() -> None:
    """Let accelerate wrap a model in FSDP2 on CPUs, where it would take DDP instead and say nothing.

    `fully_shard` works over gloo; only accelerate's list of devices that may shard leaves the CPU out. Called when the
    processes know each other and before an accelerator is made. FSDP's first version is left to be refused.
    """
    wanted = parse_flag_from_env("ACCELERATE_USE_FSDP") and FullyShardedDataParallelPlugin().fsdp_version == 2
    if not wanted or AcceleratorState._shared_state:
        return
    state = PartialState()
    if state.device.type == "cpu" and state.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
        state.distributed_type = DistributedType.MULTI_GPU  # becomes FSDP as soon as the accelerator is made


def engine_of(trainer: Any) -> str:
    """What steps the weights, by which a checkpoint keeps its optimizer: `zero1` and so on, `fsdp2`, else `copies`."""
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        return f"zero{plugin.zero_stage}{'_offload' * (_offloads(plugin) != 'none')}"
    if trainer.is_fsdp_enabled:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    return COPIES


def _offloads(plugin: Any) -> str:
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    return str(settings.get("offload_optimizer", {}).get("device", "none"))


def refuse_other_offloaded_optimizers(args: Any) -> None:
    """Raise UserError where the optimizer is offloaded and is not AdamW: accelerate would train with Adam instead."""
    plugin = args.deepspeed_plugin
    if plugin is None or _offloads(plugin) == "none":
        return
    if plugin.deepspeed_config.get("zero_force_ds_cpu_optimizer", True) and args.optim not in ADAMW:
        name = OptimizerNames(args.optim).value
        raise UserError(
            f"optim: {name} cannot be offloaded, as DeepSpeed's Adam takes its place: set optim: adamw_torch, or "
            "train without offload (--accelerate zero2)"
        )
