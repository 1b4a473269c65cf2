"""What accelerate would do in silence when it offloads."""

from types import SimpleNamespace

import pytest
from transformers.training_args import OptimizerNames

from llmalign.errors import UserError
from llmalign.trainers.sharding import refuse_other_offloaded_optimizers


def arguments(optim, device=None, **settings):
    if device is not None:
        settings["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": device}}
    plugin = SimpleNamespace(deepspeed_config=settings) if settings else None
    return SimpleNamespace(optim=OptimizerNames(optim), deepspeed_plugin=plugin)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "lion_32bit"])
def test_only_adamw_is_offloaded(optim):
    with pytest.raises(UserError, match=f"optim: {optim} cannot be offloaded.*adamw_torch"):
        refuse_other_offloaded_optimizers(arguments(optim, "cpu"))


@pytest.mark.parametrize(
    "args",
    [
        arguments("adamw_torch", "cpu"),
        arguments("adamw_torch_fused", "cpu"),
        arguments("sgd"),
        arguments("sgd", "none"),
        arguments("sgd", "cpu", zero_force_ds_cpu_optimizer=False),
    ],
)
def test_all_else_is_let_through(args):
    refuse_other_offloaded_optimizers(args)
