"""The system calls that a sandboxed interpreter may make, as a seccomp program in the kernel's own format.

Everything not listed fails with EPERM: in particular making processes (threads are allowed), sockets other than a
connected pair, signals to anyone (also by a file that signals its owner when it has data), mounting, tracing, links,
special files, file locks, changing owners and modes, System V objects, memory files and io_uring. Because
no process can be made, a limit on one process's memory is a limit on the whole sandbox.
"""

import platform
import struct

# Name, number on x86_64, number on aarch64 (- where the call does not exist); the busiest first.
ALLOWED = """
read 0 63; write 1 64; futex 202 98; ppoll 271 73; poll 7 -; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68
mmap 9 222; mprotect 10 226; munmap 11 215; mremap 25 216; madvise 28 233; brk 12 214
clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169; time 201 -; times 100 153
open 2 -; openat 257 56; close 3 57; close_range 436 436; lseek 8 62; getdents64 217 61; getcwd 79 17
stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; chdir 80 49; fchdir 81 50
access 21 -; faccessat 269 48; faccessat2 439 439; readlink 89 -; readlinkat 267 78
rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigtimedwait 128 137; sigaltstack 131 132
pipe 22 -; pipe2 293 59; dup 32 23; dup2 33 -; dup3 292 24
select 23 -; pselect6 270 72; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22
eventfd2 290 19; nanosleep 35 101; clock_nanosleep 230 115; getitimer 36 102; setitimer 38 103; alarm 37 -
futex_waitv 449 449; set_robust_list 273 99; get_robust_list 274 100; set_tid_address 218 96; rseq 334 293
sched_yield 24 124; sched_getaffinity 204 123; getpid 39 172; gettid 186 178; getppid 110 173; getpgrp 111 -
getpgid 121 155; getsid 124 156; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177
getresuid 118 148; getresgid 120 150; getgroups 115 158; uname 63 160; sysinfo 99 179; getrlimit 97 163
getrusage 98 165; getrandom 318 278; exit 60 93; exit_group 231 94; wait4 61 260; waitid 247 95
restart_syscall 219 128; arch_prctl 158 -; execve 59 221
mkdir 83 -; mkdirat 258 34; unlink 87 -; unlinkat 263 35; rmdir 84 -; rename 82 -; renameat 264 38; renameat2 316 276
ftruncate 77 46; fsync 74 82; fdatasync 75 83; umask 95 166
socketpair 53 199; recvfrom 45 207; shutdown 48 210; getsockname 51 204; getsockopt 55 209
"""
CLONE, CLONE3, PRLIMIT, SENDTO = (56, 220), (435, 435), (302, 261), (44, 206)
FCNTL, IOCTL = (72, 25), (16, 29)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
AUDIT_ARCH = (0xC000003E, 0xC00000B7)

LOAD, JUMP_EQUAL, JUMP_SET, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL, NOT_PERMITTED, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
NUMBER, ARCH = 0, 4
FIRST_ARGUMENT, SECOND_ARGUMENT = 16, 24
CLONE_THREAD = 0x10000
FOREIGN_ABI = 0x40000000  # x32 calls carry this bit on x86_64


def seccomp_program() -> bytes | None:
    """The filter as an array of `struct sock_filter`, or None on a machine whose call numbers are not listed."""
    machines = {"x86_64": 0, "aarch64": 1}
    if platform.machine() not in machines:
        return None
    column = machines[platform.machine()]
    lines = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[column]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, FOREIGN_ABI),
        (RETURN, 0, 0, KILL),
    ]
    for entry in ALLOWED.replace("\n", ";").split(";"):
        words = entry.split()
        if words and words[1 + column] != "-":
            lines += _when(int(words[1 + column]), [(RETURN, 0, 0, ALLOW)])
    new_thread = [(LOAD, 0, 0, FIRST_ARGUMENT), (JUMP_SET, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW)]
    lines += _when(CLONE[column], [*new_thread, (RETURN, 0, 0, NOT_PERMITTED)])
    # clone3's flags lie behind a pointer that a filter cannot follow; told that it is missing, libc falls back to clone
    lines += _when(CLONE3[column], [(RETURN, 0, 0, NO_SUCH_CALL)])
    lines += _when(FCNTL[column], _one_of(FCNTL_COMMANDS))
    lines += _when(IOCTL[column], _one_of(IOCTL_COMMANDS))
    lines += _when(PRLIMIT[column], _zero(0))  # one's own limits alone
    lines += _when(SENDTO[column], _zero(4))  # no address: what a connected pair needs
    lines.append((RETURN, 0, 0, NOT_PERMITTED))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _when(number: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`body`, which ends in a return, for one call number; the number is in the accumulator before and after."""
    return [(JUMP_EQUAL, 0, len(body), number), *body]


def _one_of(commands: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Allow if the second argument, of which the kernel reads 32 bits, is one of these."""
    tests = [(JUMP_EQUAL, len(commands) - place, 0, command) for place, command in enumerate(commands)]
    return [(LOAD, 0, 0, SECOND_ARGUMENT), *tests, (RETURN, 0, 0, NOT_PERMITTED), (RETURN, 0, 0, ALLOW)]


def _zero(argument: int) -> list[tuple[int, int, int, int]]:
    """Allow if the 64-bit argument is 0."""
    low = FIRST_ARGUMENT + 8 * argument
    return [
        (LOAD, 0, 0, low),
        (JUMP_EQUAL, 0, 3, 0),
        (LOAD, 0, 0, low + 4),
        (JUMP_EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOT_PERMITTED),
    ]
