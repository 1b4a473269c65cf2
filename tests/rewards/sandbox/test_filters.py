"""The seccomp program, run instruction by instruction as the kernel would."""

import platform
import struct

import pytest

from llmalign.rewards.sandbox.filters import seccomp_program

MASK = 0xFFFFFFFF
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
X86_64, AARCH64 = (0xC000003E, "x86_64"), (0xC00000B7, "aarch64")


def verdict(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """What a classic BPF filter returns for one `struct seccomp_data`."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *(arguments + (0,) * (6 - len(arguments))))
    lines = list(struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, yes, no, k = lines[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            value = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x06:  # BPF_RET | BPF_K
            return k
        else:
            met = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]  # JEQ, JGE, JSET
            at += yes if met else no


@pytest.fixture(params=[X86_64, AARCH64], ids=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, int, bool]:
    arch, name = request.param
    monkeypatch.setattr(platform, "machine", lambda: name)
    program = seccomp_program()
    assert program is not None and len(program) % 8 == 0 and len(program) // 8 < 4096
    return program, arch, name == "x86_64"


# Numbers from the kernel's tables: (x86_64, aarch64).
@pytest.mark.parametrize(
    "call", [(0, 63), (1, 64), (257, 56), (9, 222), (202, 98), (231, 94), (53, 199), (318, 278), (59, 221)]
)
def test_what_an_interpreter_needs_is_allowed(machine: tuple[bytes, int, bool], call: tuple[int, int]) -> None:
    program, arch, intel = machine
    assert verdict(program, call[not intel], arch) == ALLOW


@pytest.mark.parametrize(
    "name, call",
    {
        "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211), "kill": (62, 129),
        "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
        "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
        "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "memfd_create": (319, 279), "bpf": (321, 280),
        "io_uring_setup": (425, 425), "keyctl": (250, 219), "shmget": (29, 194), "chmod at": (268, 53),
        "chown at": (260, 54), "utimensat": (280, 88), "prctl": (157, 167), "setuid": (105, 146),
        "userfaultfd": (323, 282), "perf_event_open": (298, 241), "execveat": (322, 281), "setpriority": (141, 140),
        "sched_setaffinity": (203, 122), "seccomp": (317, 277), "name_to_handle_at": (303, 264),
        "symlinkat": (266, 36), "linkat": (265, 37), "flock": (73, 32),
        "mknodat": (259, 33), "unknown": (9999, 9999),
    }.items(),
)  # fmt: skip
def test_what_reaches_others_is_refused(machine: tuple[bytes, int, bool], name: str, call: tuple[int, int]) -> None:
    program, arch, intel = machine
    assert verdict(program, call[not intel], arch) == EPERM


def test_fork_is_refused_and_threads_are_not(machine: tuple[bytes, int, bool]) -> None:
    program, arch, intel = machine
    clone = 56 if intel else 220
    thread = 0x3D0F00  # what pthread_create passes; 0x10000 is CLONE_THREAD
    assert verdict(program, clone, arch, thread) == ALLOW
    assert verdict(program, clone, arch, thread & ~0x10000) == EPERM
    assert verdict(program, clone, arch, 17) == EPERM  # SIGCHLD: fork
    assert verdict(program, 435, arch) == ENOSYS
    if intel:
        assert verdict(program, 57, arch) == verdict(program, 58, arch) == EPERM


def test_arguments_are_looked_at_in_full(machine: tuple[bytes, int, bool]) -> None:
    program, arch, intel = machine
    limits, send = (302, 44) if intel else (261, 206)
    assert verdict(program, limits, arch, 0, 7) == ALLOW
    assert verdict(program, limits, arch, 1234, 7) == EPERM
    assert verdict(program, send, arch, 3, 5, 6, 0, 0) == ALLOW
    assert verdict(program, send, arch, 3, 5, 6, 0, 1 << 32) == EPERM
    assert verdict(program, send, arch, 3, 5, 6, 0, 64) == EPERM


@pytest.mark.parametrize(
    "call, allowed, refused",
    [
        ((72, 25), [0, 1, 2, 3, 4, 1030, 1032], [5, 6, 7, 8, 10, 15, 37, 38, 1024, 1026, 1031, 1033, (1 << 32) + 8]),
        ((16, 29), [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451], [0, 0x5412, 0x5452, 0x8901, 0x8902, 0x541C]),
    ],
    ids=["fcntl", "ioctl"],
)
def test_only_harmless_requests_to_files(
    machine: tuple[bytes, int, bool], call: tuple[int, int], allowed: list[int], refused: list[int]
) -> None:
    """The owner of a file (F_SETOWN 8, F_SETSIG 10, F_SETOWN_EX 15) is signalled whoever it is."""
    program, arch, intel = machine
    number = call[not intel]
    assert {verdict(program, number, arch, 3, command) for command in allowed} == {ALLOW}
    assert {verdict(program, number, arch, 3, command) for command in refused} == {EPERM}
    assert verdict(program, number, arch, allowed[-1], refused[-1]) == EPERM


def test_calls_of_another_abi_kill(machine: tuple[bytes, int, bool]) -> None:
    program, arch, _ = machine
    assert verdict(program, 1, 0x40000003) == KILL  # 32-bit calls
    assert verdict(program, 0x40000000 + 1, arch) == KILL  # x32


def test_an_unknown_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp_program() is None
