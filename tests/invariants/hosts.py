"""Two hosts on one machine: network namespaces with an address each, joined by a pair of virtual interfaces."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.invariants import launching

PORT = 29500  # in a namespace every port is free
PATIENCE = 900.0  # seconds after which what is waited for never comes


def why_none() -> str | None:
    """What keeps this machine from holding two hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts on one machine need Linux, root and iproute2"
    name = f"llmalign-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@dataclass
class Host:
    """A network namespace with its address, its interface and the processes that were started in it."""

    namespace: str
    interface: str
    address: str
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
        """Run a command of this Python's modules on the host; its output is added to the log."""
        given = launching.environment() | {"GLOO_SOCKET_IFNAME": self.interface, **environment}
        inside = ["ip", "netns", "exec", self.namespace, sys.executable, *command]
        with log.open("ab") as file:
            process = subprocess.Popen(inside, stdout=file, stderr=file, cwd=launching.ROOT, env=given)
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Of every process on the host."""
        said = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(word) for word in said.stdout.split()]

    def die(self) -> None:
        """All processes of the host end at once, as when it loses power."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for process in self.started:
                process.poll()
            time.sleep(0.01)
        for process in self.started:
            process.wait(PATIENCE)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; afterwards neither they nor their processes are there."""
    mark = f"{os.getpid() % 4096:x}"
    hosts = tuple(
        Host(f"llmalign-{mark}-{number}", f"host{number}", f"10.{os.getpid() % 200 + 16}.0.{number + 1}")
        for number in range(2)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        first, second = (("netns", host.namespace) for host in hosts)
        _ip("link", "add", "host0", *first, "type", "veth", "peer", "name", "host1", *second)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        known = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for host in hosts:
            if re.search(rf"^{host.namespace}\b", known, re.MULTILINE):
                host.die()
                _ip("netns", "delete", host.namespace)


def until(moment: Callable[[], bool], logs: list[Path], *, running: list[subprocess.Popen] = []) -> None:  # noqa: B006
    """Wait for a moment; AssertionError with the end of the logs where it does not come, or where a process ended."""
    latest = time.monotonic() + PATIENCE
    while not moment():
        ended = [process.returncode for process in running if process.poll() is not None]
        said = "\n".join(log.read_text()[-2500:] for log in logs if log.is_file())
        assert not ended, f"ended with {ended} before the moment came:\n{said}"
        assert time.monotonic() < latest, f"the moment did not come:\n{said}"
        time.sleep(0.02)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
