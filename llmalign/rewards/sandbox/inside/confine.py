"""What a sandboxed interpreter does to itself before it reads any foreign code: limits, and Landlock where told."""

import posix
import resource
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
SIGKILL = 9
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION = 1  # flag: tell the version, make nothing
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
O_PATH = 0o10000000
# Rights on files that each version of Landlock knows: 13, then renaming between folders, truncating, device calls.
FILE_RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
TCP_BIND_AND_CONNECT, ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3


def set_limits(memory: int, seconds: int, files: int, threads: int | None) -> None:
    """Memory in bytes, CPU seconds, bytes of one file, and threads of this user (None: as many as it may have)."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: files,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if threads is not None:
        limits[resource.RLIMIT_NPROC] = threads
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    sys.set_int_max_str_digits(0)  # long integers are answers too; the CPU limit bounds them


def landlock(paths: dict[str, int], program: bytes, parent: int) -> None:
    """Leaves this process nothing but rights on some paths, /dev/null, and the system calls of a seccomp program.

    It ends when its parent, the process of this number, does. OSError when the kernel refuses one of the steps.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def checked(value: int, what: str) -> int:
        if value < 0:
            raise OSError(ctypes.get_errno(), what)
        return value

    version = checked(libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION), "Landlock is not available")
    rights = FILE_RIGHTS[min(version, len(FILE_RIGHTS) - 1)]
    words = [rights]
    if version >= 4:
        words.append(TCP_BIND_AND_CONNECT)
    if version >= 6:
        words.append(ABSTRACT_SOCKETS_AND_SIGNALS)
    attributes = (ctypes.c_uint64 * len(words))(*words)
    rules = checked(libc.syscall(LANDLOCK_CREATE, attributes, ctypes.sizeof(attributes), 0), "landlock_create_ruleset")
    for path, allowed in {**paths, "/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}.items():
        file = posix.open(path, O_PATH | posix.O_CLOEXEC)
        # struct landlock_path_beneath_attr is packed: 64 bits of rights, 32 bits of file descriptor
        rule = ctypes.create_string_buffer(allowed.to_bytes(8, sys.byteorder) + file.to_bytes(4, sys.byteorder), 12)
        checked(libc.syscall(LANDLOCK_ADD_RULE, rules, PATH_BENEATH, rule, 0), "landlock_add_rule")
        posix.close(file)
    checked(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "parent death signal")
    if posix.getppid() != parent:  # it died before it could be asked for
        posix._exit(1)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    posix.close(rules)
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    filled = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0), "seccomp")
