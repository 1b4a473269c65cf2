"""Code that attacks the machine instead of solving the problem: each attempt says what it achieved, and gets nothing.

Every attack is a function `attack(...)` that returns True when it has succeeded; the tests ask for that.
"""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from llmalign.rewards.code import run_tests
from tests.rewards.sandbox.attempts import attempt


def test_fork_bomb(backend: str) -> None:
    program = """
import os
def attack():
    for _ in range(100):
        if os.fork() == 0:
            while True:
                os.fork()
    return True
"""
    assert "PermissionError" in (attempt(program, backend) or "")


@pytest.mark.parametrize(
    "how",
    [
        "os.posix_spawn('/usr/bin/true', ['true'], {})",
        "subprocess.run(['/usr/bin/true'])",
        "multiprocessing.get_context('fork').Process(target=print).start()",
        "os.system('true') and 1 / 0",
    ],
)
def test_no_other_way_to_make_a_process(backend: str, how: str) -> None:
    assert attempt(f"import os, subprocess, multiprocessing\ndef attack():\n    {how}\n    return True\n", backend)


def test_threads_work_and_are_limited(backend: str) -> None:
    program = """
import threading, time
def attack(count):
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return True
"""
    assert run_tests(program, "assert attack(3)", "attack", backend=backend).error is None
    assert "thread" in (attempt(program, backend, 3000) or "")


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/proc/1/mem"])
def test_reading_the_system(backend: str, path: str) -> None:
    error = attempt("def attack(path):\n    return len(open(path, 'rb').read(16)) >= 0", backend, path)
    assert "FileNotFoundError" in (error or "") or "PermissionError" in (error or "")


def test_listing_home_folders(backend: str, tmp_path: Path) -> None:
    program = "import os\ndef attack(path):\n    return len(os.listdir(path)) >= 0"
    for path in (str(tmp_path), os.path.expanduser("~"), os.getcwd(), "/proc", "/sys", "/run"):
        attempt(program, backend, path)


def test_secret_in_the_environment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMALIGN_SECRET", "hunter2")
    program = "import os\ndef attack():\n    return 'hunter2' in str(dict(os.environ)) or len(os.environ) > 8"
    attempt(program, backend)


def test_secret_in_another_process(backend: str, witness: subprocess.Popen[bytes]) -> None:
    program = """
import ctypes, os
def attack(process):
    for other in (process, os.getppid(), 1):
        for name in ("environ", "cmdline", "mem", "fd/0", "root/etc/passwd", "cwd/x"):
            try:
                if open(f"/proc/{other}/{name}", "rb").read(10):
                    return True
            except OSError:
                pass
    libc = ctypes.CDLL(None, use_errno=True)
    PTRACE_ATTACH, PIDFD_OPEN = 16, 434
    return any(
        value >= 0
        for value in (libc.ptrace(PTRACE_ATTACH, process, 0, 0), libc.syscall(PIDFD_OPEN, process, 0))
    )
"""
    attempt(program, backend, witness.pid)


def test_connecting_to_this_machine(backend: str) -> None:
    met = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = """
import socket
def attack(port):
    socket.create_connection(("127.0.0.1", port), timeout=2).sendall(b"hello")
    return True
"""

        def listen() -> None:
            try:
                met.append(server.accept())
            except TimeoutError:
                pass

        attempt(program, backend, server.getsockname()[1])
        listen()
    assert not met


@pytest.mark.parametrize("family", ["AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"])
def test_no_sockets_of_other_kinds(backend: str, family: str) -> None:
    program = (
        f"import socket\ndef attack():\n    return socket.socket(socket.{family}, socket.SOCK_DGRAM).fileno() >= 0"
    )
    attempt(program, backend)


def test_an_event_loop_works_all_the_same(backend: str) -> None:
    program = """
import asyncio
def f():
    async def two():
        await asyncio.sleep(0)
        return 2
    return asyncio.run(two())
"""
    assert run_tests(program, "assert f() == 2", "f", backend=backend).error is None


@pytest.mark.parametrize("where", ["call", "import"])
def test_endless_loop(backend: str, where: str) -> None:
    loop = "while True: pass\n"
    program = f"def attack():\n    {loop}" if where == "call" else f"{loop}def attack(): return True"
    assert "Timeout" in (attempt(program, backend, timeout_s=0.5) or "")


def test_sleeping_where_signals_are_blocked(backend: str) -> None:
    program = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def attack():
    time.sleep(600)
    return True
"""
    assert "Timeout" in (attempt(program, backend, timeout_s=0.5) or "")


@pytest.mark.parametrize("how", ["bytearray(4 << 30)", "[' ' * (1 << 20) + str(i) for i in range(4000)]"])
def test_memory_bomb(backend: str, how: str) -> None:
    assert "MemoryError" in (attempt(f"def attack():\n    return len({how}) > 0", backend) or "")


def test_memory_beside_the_heap(backend: str) -> None:
    program = (
        "import mmap, os\ndef attack():\n    f = os.memfd_create('x')\n    os.ftruncate(f, 4 << 30)\n    return True"
    )
    attempt(program, backend)


def test_killing_others(backend: str, witness: subprocess.Popen[bytes]) -> None:
    program = """
import os, signal
def attack(victims):
    done = False
    for process in [*victims, os.getppid(), -1, 0]:
        try:
            os.kill(process, signal.SIGKILL)
            done = True
        except OSError:
            pass
    return done
"""
    attempt(program, backend, [witness.pid, os.getpid()])


def test_changing_the_limits_of_others(backend: str, witness: subprocess.Popen[bytes]) -> None:
    program = """
import os, resource
def attack(process):
    for change in (
        lambda: resource.prlimit(process, resource.RLIMIT_NOFILE, (0, 0)),
        lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
        lambda: os.setpriority(os.PRIO_PROCESS, process, 19),
        lambda: os.sched_setaffinity(process, {0}),
        lambda: os.setuid(0),
    ):
        try:
            change()
        except (OSError, ValueError):
            continue
        return True
    return False
"""
    attempt(program, backend, witness.pid)


def test_writing_outside(backend: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "file").chmod(0o666)
    program = """
import os
def attack(folder):
    done = False
    for change in (
        lambda: open(folder + "/new", "w").write("x"),
        lambda: open(folder + "/file", "a").write("x"),
        lambda: os.truncate(folder + "/file", 0),
        lambda: os.chmod(folder + "/file", 0),
        lambda: os.utime(folder + "/file", (1, 1)),
        lambda: os.remove(folder + "/file"),
        lambda: os.rename(folder + "/file", folder + "/other"),
        lambda: os.symlink("/etc", folder + "/link"),
        lambda: os.mkdir("/usr/new"),
        lambda: open("/new", "w"),
        lambda: open("/dev/new", "w"),
        lambda: open("/usr/lib/new", "w"),
        lambda: os.mkdir("/dev/shm"),
    ):
        try:
            change()
            done = True
        except OSError:
            pass
    return done
"""
    attempt(program, backend, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "as it was"


def test_filling_the_disk(backend: str) -> None:
    program = """
def attack():
    written = 0
    for number in range(64):
        with open(f"/tmp/{number}", "wb") as file:
            for _ in range(16):
                written += file.write(bytes(1 << 20))
                file.flush()
    return written >= 64 << 20
"""
    assert "Error" in (attempt(program, backend) or "")


def test_tmp_is_private_and_gone_afterwards(backend: str) -> None:
    write = (
        "import tempfile\ndef f():\n    open('/tmp/llmalign-left-behind', 'w').write('x')\n"
        "    with tempfile.TemporaryDirectory() as folder:\n        open(folder + '/y', 'w').write('y')\n"
        "        return open(folder + '/y').read()"
    )
    read = "import os\ndef attack():\n    return os.path.exists('/tmp/llmalign-left-behind')"
    result = run_tests(write, "assert f() == 'y'", "f", backend=backend)
    assert (result.passed, result.error) == (1, None) or backend == "landlock"
    assert not Path("/tmp/llmalign-left-behind").exists()
    attempt(read, backend)


@pytest.mark.parametrize("how", ["os._exit(0)", "sys.exit(0)", "os.abort()", "ctypes.string_at(0)", "raise SystemExit"])
@pytest.mark.parametrize("where", ["call", "import"])
def test_ending_the_process(backend: str, how: str, where: str) -> None:
    action = how if where == "call" else "return True"
    top = "" if where == "call" else how
    attempt(f"import ctypes, os, sys\ndef attack():\n    return 1\n{top}\ndef attack():\n    {action}\n", backend)


def test_new_namespaces_and_mounts(backend: str) -> None:
    program = """
import ctypes
def attack():
    libc = ctypes.CDLL(None)
    mounted = libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)
    return 0 in (libc.unshare(0x10000000), mounted, libc.chroot(b"/"))
"""
    attempt(program, backend)


def test_it_does_not_run_as_root(backend: str) -> None:
    attempt("import os\ndef attack():\n    return 0 in os.getresuid() + os.getresgid()", backend)


def test_the_tests_are_locked_in_as_well(backend: str, tmp_path: Path) -> None:
    tests = f"""
import os
for action in (os.fork, lambda: open("/etc/passwd"), lambda: open({str(tmp_path / "x")!r}, "w"), lambda: os.kill(1, 0)):
    try:
        action()
    except OSError:
        pass
    else:
        raise RuntimeError("not locked in")
assert f() == 1
"""
    assert run_tests("def f():\n    return 1", tests, "f", backend=backend).error is None
