"""Two hosts train as one process does, each with caches of its own; one that dies is started again and all goes on."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from accelerate import PartialState
from safetensors.torch import load_file

from llmalign.diffusion.latents import encode
from llmalign.diffusion.pipelines import family_of
from llmalign.diffusion.tiny import build_tiny
from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.processes import from_all_processes, lowest_of_all, require_same, require_shared
from tests.diffusion.training import pairs
from tests.invariants.hosts import PATIENCE, PORT, Host, two_hosts, until, why_none
from tests.invariants.launching import NEEDS_DEEPSPEED, build_ops
from tests.invariants.test_image_ranks import start as forked

RECIPE = "trainers/rpo/smoke.yaml"
STEPS = 8
SAVED = ("--max_steps", str(STEPS), "--save_steps", "2", "--use_cpu", "true")


@functools.cache
def no_hosts() -> str | None:
    return why_none()


@pytest.fixture
def hosts():
    if (why := no_hosts()) is not None:
        pytest.skip(why)
    with two_hosts() as both:
        yield both


def command(hosts: tuple[Host, Host], number: int, out: Path, *options: str) -> list[str]:
    """What an operator runs on a host; the hosts' own name is the machine's, so their addresses are said."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"{hosts[0].address}:{PORT}"]
    here = ["--local_addr", hosts[number].address, "--rdzv_conf", f"is_host={int(number == 0)}"]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting, *here, *options]
    return [*launcher, "scripts/train.py", RECIPE, *training(out, world=2), "--resume", "auto"]


def training(out: Path, world: int) -> list[str]:
    return [*SAVED, "--per_device_train_batch_size", str(8 // world), "--output_dir", str(out)]


def launch(both: tuple[Host, Host], folder: Path, *options: str) -> list[subprocess.Popen]:
    """Start the run on both hosts, each with a cache of its own that is empty at first; the output folder is shared."""
    return [start(both, number, folder, *options) for number in range(2)]


def start(both: tuple[Host, Host], number: int, folder: Path, *options: str) -> subprocess.Popen:
    own = {
        "LLMALIGN_CACHE": str(folder / f"cache-{number}"), "HF_DATASETS_CACHE": str(folder / f"datasets-{number}"),
        # else an agent that is started again finds no address of the new round
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    return both[number].start(command(both, number, folder / "run", *options), folder / f"log-{number}", own)


def logs(folder: Path) -> list[Path]:
    return [folder / f"log-{number}" for number in range(2)]


def finished(processes: list[subprocess.Popen], folder: Path) -> None:
    for process in processes:
        process.wait(PATIENCE)
    said = "\n".join(log.read_text()[-3000:] for log in logs(folder))
    assert [process.returncode for process in processes] == [0, 0], said


def losses(out: Path) -> list[tuple[float, float]]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two hosts that nothing happens to."""
    if (why := no_hosts()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("undisturbed")
    with two_hosts() as both:
        finished(launch(both, folder), folder)
    return folder


@pytest.mark.slow
def test_two_hosts_equal_one_process(undisturbed: Path, tmp_path: Path) -> None:
    alone = tmp_path / "one"
    done = subprocess.run(
        [sys.executable, "scripts/train.py", RECIPE, *training(alone, world=1)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(alone), losses(undisturbed / "run")
    assert len(one) == len(two) == STEPS
    for (loss, norm), (own_loss, own_norm) in zip(one, two, strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
        assert own_norm == pytest.approx(norm, rel=1e-4, abs=1e-4)
    expected, found = (load_file(folder / "model.safetensors") for folder in (alone, undisturbed / "run"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    measured = json.loads((undisturbed / "run" / "metrics.json").read_text())
    assert measured["processes"] == 2
    for number in range(2):  # neither looked at the other's
        assert [path.name for path in (undisturbed / f"cache-{number}").glob("tiny-*")] == [ensure_tiny().name]


def same_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    for name in ("model.safetensors", f"checkpoint-{STEPS}/optimizer.pt"):
        assert (folder / "run" / name).read_bytes() == (undisturbed / "run" / name).read_bytes(), name
    assert losses(folder / "run") == losses(undisturbed / "run")
    assert "Resuming from" in logs(folder)[0].read_text()


def kill_after_a_checkpoint(host: Host, folder: Path, processes: list[subprocess.Popen]) -> None:
    until((folder / "run" / "checkpoint-4").is_dir, logs(folder), running=processes)
    host.die()
    assert not (folder / "run" / "metrics.json").exists(), "the run was over before the host died"


@pytest.mark.slow
def test_a_host_that_dies_is_started_again_and_the_other_one_waits_for_it(
    hosts: tuple[Host, Host], undisturbed: Path, tmp_path: Path
) -> None:
    share_caches(undisturbed, tmp_path)
    processes = launch(hosts, tmp_path, "--max_restarts", "3")
    kill_after_a_checkpoint(hosts[1], tmp_path, processes)
    processes[1] = start(hosts, 1, tmp_path, "--max_restarts", "3")
    finished(processes, tmp_path)
    same_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_when_the_host_of_the_rendezvous_dies_the_other_ends_and_both_are_started_again(
    hosts: tuple[Host, Host], undisturbed: Path, tmp_path: Path
) -> None:
    share_caches(undisturbed, tmp_path)
    processes = launch(hosts, tmp_path, "--max_restarts", "3")
    kill_after_a_checkpoint(hosts[0], tmp_path, processes)
    assert processes[1].wait(PATIENCE) != 0, "it cannot go on without the host where all meet"
    finished(launch(hosts, tmp_path, "--max_restarts", "3"), tmp_path)
    same_as_undisturbed(tmp_path, undisturbed)


def share_caches(undisturbed: Path, folder: Path) -> None:
    """What another test has built on each host is there already."""
    for number in range(2):
        shutil.copytree(undisturbed / f"cache-{number}", folder / f"cache-{number}")


@pytest.mark.parametrize("config", [pytest.param("multi_node", marks=NEEDS_DEEPSPEED)])
def test_accelerate_launches_the_shipped_configuration_on_both(
    config: str, hosts: tuple[Host, Host], undisturbed: Path, tmp_path: Path
) -> None:
    build_ops()
    share_caches(undisturbed, tmp_path)
    processes = []
    for number, host in enumerate(hosts):
        meeting = ["--num_processes", "2", "--machine_rank", str(number), "--main_process_ip", hosts[0].address]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", *meeting]
        given = ["scripts/train.py", RECIPE, *training(tmp_path / "run", world=2)]
        own = {"LLMALIGN_CACHE": str(tmp_path / f"cache-{number}")}
        processes.append(host.start([*launcher, *given], tmp_path / f"log-{number}", own))
    finished(processes, tmp_path)
    for (loss, _), (own, _) in zip(losses(undisturbed / "run"), losses(tmp_path / "run"), strict=True):
        assert own == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert (tmp_path / "run" / f"checkpoint-{STEPS}" / f"global_step{STEPS}").is_dir(), "DeepSpeed did not run"


# What two hosts need beside a network, on two processes of this one


def both_ranks(tmp_path: Path, work: Callable[..., None]) -> None:
    """Let two processes that know each other do some work with a folder each, without the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        given = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        (tmp_path / f"host-{rank}").mkdir()
        children.append(forked(tmp_path / f"log-{rank}", given, in_group, work, tmp_path / f"host-{rank}"))
    for rank, child in enumerate(children):
        child.join(PATIENCE)
        assert child.exitcode == 0, (tmp_path / f"log-{rank}").read_text()[-3000:]


def in_group(work: Callable[..., None], folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    work(folder, torch.distributed.get_rank())
    torch.distributed.destroy_process_group()


def fill_gaps(folder: Path, rank: int) -> None:
    nan = np.nan
    own = np.array([[1.5, nan, -3.0, nan, -2.0], [nan, -2.5, -3.5, nan, -2.0]][rank], dtype=np.float32)
    found = lowest_of_all(own, torch.device("cpu"))
    np.testing.assert_array_equal(found, np.array([1.5, -2.5, -3.5, nan, -2.0], dtype=np.float32))


def see_each_other(folder: Path, rank: int) -> None:
    shared = folder.parent / "shared" / "deeper"
    require_shared(shared)
    assert not shared.parent.exists(), "a refused run leaves nothing behind"
    torch.distributed.barrier()
    shared.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    require_shared(shared)
    torch.distributed.barrier()
    assert list(shared.iterdir()) == []


def live_apart(folder: Path, rank: int) -> None:
    os.chdir(folder)  # the same relative path is another place on each
    with pytest.raises(UserError, match=r"process 1: .*run.*; give an output_dir that all hosts share"):
        require_shared(Path("run"))
    assert list(folder.iterdir()) == []


def read_the_same(folder: Path, rank: int) -> None:
    require_same("rows", "training rows")
    with pytest.raises(UserError, match="^process 1 has other training rows than process 0: give every host"):
        require_same(f"rows of {rank}", "training rows")


def encode_pictures(folder: Path, rank: int) -> None:
    """Each host with a folder of its own has all rows in the end, the same as another; then one cannot write."""
    state = PartialState(cpu=True)
    assert (state.num_processes, state.process_index, state.local_process_index) == (2, rank, 0)
    pipe, own = build_tiny("sd"), folder / "images"
    options = {
        "images": ("chosen",), "resolution": 8, "flips": False, "device": torch.device("cpu"), "batch_size": 3,
    }  # fmt: skip
    coded = encode({"train": pairs(8)}, pipe, family_of(pipe), folder=own, **options)
    assert len(list(own.glob("*.arrow"))) == 5, "four captions and eight rows, in parts of three"
    digests = [sha256(np.stack(coded.sets["train"]["chosen"][:]).tobytes()).hexdigest()]
    assert from_all_processes(digests) == [digests, digests]
    (folder / "file").touch()
    with pytest.raises(UserError, match="process 1: .*file cannot be written.*set image_cache_dir"):
        encode({"train": pairs(8)}, pipe, family_of(pipe), folder=own if rank == 0 else folder / "file", **options)


@pytest.mark.parametrize(
    "work", [fill_gaps, see_each_other, live_apart, read_the_same, encode_pictures], ids=lambda work: work.__name__
)
def test_hosts_share_what_they_must(work: Callable[..., None], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmalign.processes.SHOWN_WITHIN", 0.5)
    monkeypatch.setattr("llmalign.diffusion.latents.PART_ROWS", 3)
    both_ranks(tmp_path, work)


def test_one_process_needs_nobody(tmp_path: Path) -> None:
    values = np.array([1.0, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(lowest_of_all(values, torch.device("cpu")), values)
    require_shared(tmp_path / "run")
    assert not (tmp_path / "run").exists()
