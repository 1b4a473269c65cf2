"""Weights that are spread over two processes are read and written whole; what encodes is loaded whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from llmalign.diffusion.sharding import loading_whole, whole, whole_shape, whole_state, write, write_state
from tests.invariants.launching import WITH_DEEPSPEED
from tests.invariants.test_hosts import both_ranks


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    layers.register_buffer("count", torch.tensor([float(seed)]))
    return layers


def read_and_write(folder: Path, rank: int) -> None:
    plain, other = network(1), network(2)
    spread = network(1)
    fully_shard(spread, mesh=init_device_mesh("cpu", (2,)))
    weight = spread[0].weight
    assert isinstance(weight, DTensor) and weight.to_local().shape[0] < 5, "the weights are not sharded"
    assert whole_shape(weight) == (5, 3)
    torch.testing.assert_close(whole(weight), plain[0].weight.detach(), rtol=0, atol=0)
    state = whole_state(spread, keep=rank == 0)
    assert set(state) == (set(plain.state_dict()) if rank == 0 else set())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
    write_state(spread, other.state_dict())
    assert all(torch.equal(value, whole(spread.state_dict()[name])) for name, value in other.state_dict().items())
    write(weight, plain[0].weight.detach().double())
    torch.testing.assert_close(whole(weight), plain[0].weight.detach(), rtol=0, atol=0)
    assert isinstance(spread[0].weight, DTensor) and spread[0].weight.requires_grad


def test_sharded_weights_are_read_and_written_whole(tmp_path: Path) -> None:
    both_ranks(tmp_path, read_and_write)


def test_whole_weights_are_as_they_are() -> None:
    layers, other = network(1), network(2)
    assert whole(layers[0].weight).data_ptr() == layers[0].weight.data_ptr()
    write_state(layers, other.state_dict())
    assert all(torch.equal(value, layers.state_dict()[name]) for name, value in other.state_dict().items())
    with loading_whole():
        assert not is_deepspeed_zero3_enabled()


@WITH_DEEPSPEED
def test_models_are_loaded_whole_inside_alone() -> None:
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    kept = HfDeepSpeedConfig(settings)
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(OSError, match="no such pipeline"), loading_whole():
        assert not is_deepspeed_zero3_enabled()
        raise OSError("no such pipeline")
    assert is_deepspeed_zero3_enabled()
    del kept
    assert not is_deepspeed_zero3_enabled()
