"""`llmalign train --accelerate`: what is launched, what is refused, and the status and weights that come of it."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from llmalign import deepspeed_ops, launch
from llmalign.cli import main
from llmalign.deepspeed_ops import LONGEST, free_from_dead, path_with_ninja
from llmalign.errors import UserError
from llmalign.launched import COPIES, ENGINE, SHARDED, Promise, broken_world, broken_wrapper, promised
from tests.invariants.launching import NEEDS_DEEPSPEED, ROOT, environment

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SMOKE = str(ROOT / "trainers" / "rpo" / "smoke.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_what_is_shipped_and_the_recipe_keeps_its_part(path):
    load_config_from_file(str(path))  # which refuses keys that it does not know
    settings = yaml.safe_load(path.read_text())
    assert settings["mixed_precision"] == "no", "the dtype is the recipe's"
    inner = settings.get("deepspeed_config", {}) | settings.get("fsdp_config", {})
    assert not {key for key in inner if "clipping" in key or "accumulation" in key or "config_file" in key}
    known = vars(launch_command_parser().parse_args(["script"]))
    assert {key if key in known else f"fsdp_{key}" for key in inner} <= set(known)
    assert f"--accelerate {path.stem}" in path.read_text(), "the command that uses it"
    assert launch.find(path.stem).samefile(path)


def test_the_names_in_the_help_are_those_that_are_shipped(capsys):
    assert launch.shipped() == [path.stem for path in CONFIGS]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in launch.shipped())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accelerate", "zero33"], "the nearest is zero3"),
        (["--accelerate", "no/such.yaml"], "there is no such file"),
        (["--accelerate", "single", "--num_processes", "2"], "single.yaml is for one process"),
        (["--accelerate", "multi_node"], "--main_process_ip"),
        (["--accelerate", "multi_node", "--num_processes", "1"], "too few for 2 machines"),
        (["--accelerate", SMOKE], "no distributed_type"),
        (["--num_processes", "2"], "name one with --accelerate"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_a_sentence(words, said, capsys):
    assert main(["train", SMOKE, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_process_of_a_launcher_starts_no_other(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="one process of a launcher already"):
        launch.launch("ddp", ["train", SMOKE])


def test_without_deepspeed_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llmalign\[deepspeed\]'"):
        launch.check(launch.find("zero2"), {})


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: [")
    with pytest.raises(UserError, match="mine.yaml is not YAML"):
        launch.check(path, {})


def test_the_status_is_that_of_a_process_that_spoke_for_itself(caplog):
    assert launch._status({0: -signal.SIGTERM, 1: 2}) == 2, "the other one was ended by the launcher"
    assert launch._status({0: 130}) == 130
    assert launch._status({1: -signal.SIGKILL}) == 128 + 9
    assert "Process 1 was ended by SIGKILL" in caplog.text and "memory" in caplog.text


def simple(*words):
    """What the launcher of accelerate that starts one process puts into its environment."""
    arguments = launch_command_parser().parse_args([*words, "--num_machines", "1", "script.py"])
    filled = {
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": 1,
        "use_cpu": arguments.cpu,
    }
    return prepare_simple_launcher_cmd_env(argparse.Namespace(**(vars(arguments) | filled)))[1]


def test_one_process_where_several_were_asked_for_is_noticed(monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert promised(simple("--cpu", "--num_processes", "2")).processes is None
    assert promised(simple("--cpu", "--num_processes", "1")) == Promise(1, None)
    assert "started one" in broken_world(Promise(None, COPIES), 1)


def test_what_a_launcher_promises():
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    assert promised({}) == promised({"MASTER_ADDR": "a cluster's own"}) == Promise(1, None)
    assert promised(two) == Promise(2, COPIES)
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert promised(two | deepspeed) == Promise(2, ENGINE)
    assert promised(two | deepspeed | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == Promise(2, ENGINE, 3)
    assert promised(two | {"ACCELERATE_USE_FSDP": "true"}) == Promise(2, SHARDED)
    assert broken_world(Promise(2, COPIES), 2) is None
    assert "this one knows of 1" in broken_world(Promise(2, COPIES), 1)
    assert broken_wrapper(Promise(1, None), "LlamaForCausalLM") is None
    assert broken_wrapper(Promise(2, ENGINE, 3), ENGINE, 3) is None
    assert "runs stage 2" in broken_wrapper(Promise(2, ENGINE, 3), ENGINE, 2)
    assert "wrapped in DDP" in broken_wrapper(Promise(2, SHARDED), COPIES)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who holds a file open")
def test_a_lock_is_removed_when_nobody_holds_it(tmp_path):
    lock = tmp_path / "lock"
    assert not free_from_dead(lock)
    with open(lock, "w"):
        assert not free_from_dead(lock) and lock.exists()
    os.utime(lock, (time.time() - 2 * LONGEST,) * 2)
    assert free_from_dead(lock) and not lock.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who holds a file open")
def test_a_young_lock_may_be_another_machine_s_and_is_waited_for(tmp_path, monkeypatch):
    lock, waited = tmp_path / "lock", []
    lock.touch()

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            lock.unlink()  # compiled over there

    monkeypatch.setattr(deepspeed_ops.time, "sleep", sleep)
    assert not free_from_dead(lock) and len(waited) == 3


def test_this_python_s_own_ninja_is_found_first(monkeypatch):
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join(["/first", own]))
    assert path_with_ninja().split(os.pathsep) == [own, "/first"]


def run(*words, **options):
    return subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True, check=False, cwd=ROOT, **options
    )


def test_a_status_of_the_processes_is_passed_on_with_their_sentence_alone():
    done = run("-m", "llmalign.cli", "train", SMOKE, "--accelerate", "ddp", "--no_such_key", "1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("unknown key `no_such_key`") == 1
    assert "Traceback" not in done.stderr


def trained(folder):
    """The losses of a run and a digest of the weights it saved."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry], hashlib.sha256(
        (folder / "model.safetensors").read_bytes()
    ).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_the_command_and_accelerate_launch_are_the_same_run(name, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    done = run("-m", "llmalign.cli", "train", SMOKE, "--accelerate", name, "--output_dir", str(own))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    config = f"accelerate_configs/{name}.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    done = run(*words, "scripts/train.py", SMOKE, "--output_dir", str(other))
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained(own) == trained(other)
    assert len(trained(own)[0]) == 6


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_is_refused_where_it_starts_one_process(tmp_path):
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "scripts/train.py", SMOKE]
    done = run(*words, "--output_dir", str(tmp_path / "out"))
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def started(tmp_path):
    """A run of two processes that has saved its first checkpoint, and its folder."""
    out = tmp_path / "out"
    words = ["train", SMOKE, "--accelerate", "ddp", "--output_dir", str(out), "--max_steps", "5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmalign.cli", *words, "--save_steps", "2", "--save_total_limit", "1"],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.5)
    yield process, out
    process.kill()


@pytest.mark.slow
def test_sigterm_to_the_command_saves_on_all_processes_and_ends_well(started):
    process, out = started
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    assert "--resume auto" in said and "--accelerate ddp" in said
    (state,) = [json.loads(path.read_text()) for path in out.glob("checkpoint-*/trainer_state.json")]
    assert state["global_step"] < 5000


@pytest.mark.slow
def test_an_interrupt_of_the_command_ends_all_processes(started):
    process, _ = started
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "go on with --resume auto" in said
