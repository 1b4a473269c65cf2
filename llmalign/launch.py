"""`llmalign train RECIPE --accelerate NAME`: the same command in each of the processes that accelerate starts.

What `accelerate launch --config_file accelerate_configs/NAME.yaml scripts/train.py RECIPE` does, with what a machine
without a GPU needs set, the status of the processes passed on, and SIGTERM handed to them and not to the launcher.
"""

import contextlib
import difflib
import importlib.util
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from llmalign import assets
from llmalign.deepspeed_ops import build, path_with_ninja
from llmalign.errors import UserError
from llmalign.sigterm import COMMAND

logger = logging.getLogger(__name__)

FOLDER = "accelerate_configs"
USAGE_ERROR = 2  # of a process that leaves its sentence to the launcher
#: the launcher must not end the processes while they save; they get SIGTERM from here
SIGNALS_OF_THE_LAUNCHER = "SIGINT,SIGHUP,SIGQUIT"


def launch(name: str, command: Sequence[str], **options: Any) -> int:
    """Run `llmalign COMMAND` as the processes of a configuration and return their status.

    `name` is a shipped configuration or a path; `options` are those of `accelerate launch` with the same names, None
    where the configuration decides. Raises UserError for what cannot be launched.
    """
    if "RANK" in os.environ:
        raise UserError(
            "RANK is set, so this is one process of a launcher already: give --accelerate to a plain llmalign train, "
            "or leave it out here"
        )
    path = find(name)
    options = {key: value for key, value in options.items() if value is not None}
    settings = check(path, options)
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    arguments = ["--config_file", str(path), *given]
    own = {COMMAND: shlex.join(["llmalign", *command, "--accelerate", name, *given])}
    if settings["num_machines"] == 1 and "main_process_port" not in settings:
        arguments += ["--main_process_port", "0"]  # a free one, as several runs may share this machine
    with _environment(environment(settings) | own):
        if settings["distributed_type"] == "DEEPSPEED":
            offload = (settings.get("deepspeed_config") or {}).get("offload_optimizer_device") == "cpu"
            build(on_cpu=not torch.cuda.is_available(), offload=offload)
        return _run([*arguments, "--module", "llmalign.cli", *command])


def shipped() -> list[str]:
    """Names of the configurations that come with llmalign."""
    return sorted(path.stem for path in assets.path(FOLDER).glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of a shipped one. Raises UserError with the nearest name."""
    if Path(name).is_file():
        return Path(name).resolve()
    known = shipped()
    if name in known:
        return assets.path(f"{FOLDER}/{name}.yaml")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    raise UserError(
        f"--accelerate {name}: there is no such file and no such configuration; the nearest is {nearest}, and all are "
        f"{', '.join(known)}"
    )


def check(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a configuration with these options says. Raises UserError where it cannot be launched as it says."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UserError(f"{path} has no distributed_type, so it is no configuration of accelerate launch")
    settings = {"num_machines": 1, "num_processes": 1} | settings | options
    kind, processes, machines = (settings[key] for key in ("distributed_type", "num_processes", "num_machines"))
    if processes < machines:
        raise UserError(f"{path.name}: {processes} processes are too few for {machines} machines: see --num_processes")
    if kind in ("NO", False) and processes > 1:
        raise UserError(f"{path.name} is for one process, and {processes} are asked for: take --accelerate ddp, say")
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{path.name} needs DeepSpeed, which is not installed: pip install 'llmalign[deepspeed]'")
    if machines > 1 and not settings.get("main_process_ip"):
        raise UserError(
            f"{path.name} is for {machines} machines: say where the first one is with --main_process_ip, and which one "
            "this is with --machine_rank"
        )
    return settings


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """What the launched processes need set on this machine; what makes them train on the CPU is said in the log."""
    sharded_by_deepspeed = settings["distributed_type"] == "DEEPSPEED"
    needed = {"PATH": path_with_ninja()} if sharded_by_deepspeed else {}
    if torch.cuda.is_available():
        return needed
    name, value = ("DS_ACCELERATOR", "cpu") if sharded_by_deepspeed else ("ACCELERATE_USE_CPU", "true")
    logger.info("No GPU here, so %s=%s is set and the processes train on the CPU.", name, value)
    return needed | {name: value}


@contextlib.contextmanager
def _environment(needed: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(needed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(arguments: list[str]) -> int:
    """accelerate's launcher in this process; what it raises where a process failed becomes that process's status."""
    # Imported here: what is refused above is refused at once.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    parsed = launch_command_parser().parse_args(arguments)
    parsed.signals_to_handle = SIGNALS_OF_THE_LAUNCHER
    handed: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        handed.append(number)
        _hand_on(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if handed and set(codes.values()) == {-signal.SIGTERM}:  # which ends them until they look out for it
            logger.warning("Ended by SIGTERM before the processes were ready; nothing new was there to save.")
            return 0
        left: list[Any] = [failure.message for failure in error.failures.values() if failure.exitcode == USAGE_ERROR]
        for sentence in sorted({message["message"] for message in left if isinstance(message, dict)}):
            print(sentence, file=sys.stderr)
        return _status(codes)
    except subprocess.CalledProcessError as error:  # of the launcher of one process
        return _status({0: error.returncode})
    except SignalException as error:
        return 128 + error.sigval
    except (ValueError, ConnectionError) as error:
        raise UserError(f"accelerate cannot launch this: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _hand_on(number: int) -> None:
    """Give a signal to the launched processes, which save and end by themselves; the launcher then ends in order."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _status(codes: dict[int, int]) -> int:
    """The status of a run of which some processes failed: a process's own, else that of the signal that ended one."""
    own = [code for code in codes.values() if code > 0]
    if own:
        return own[0]
    rank, code = next(iter(codes.items()))
    name = signal.Signals(-code).name
    hint = ", which the system sends when memory runs out" if -code == signal.SIGKILL else ""
    logger.error("Process %d was ended by %s%s; go on with --resume auto.", rank, name, hint)
    return 128 - code
