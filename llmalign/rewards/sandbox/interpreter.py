"""The Python that runs inside, and the programs of `inside` compiled by it."""

import json
import marshal
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmalign.errors import UserError

INSIDE = Path(__file__).parent / "inside"
MODULES = {
    "answer": ("wire", "confine", "start", "answer"),
    "checker": ("wire", "confine", "start", "names", "plan", "units", "channel", "checker"),
}
PACKAGE = "llmalign.rewards.sandbox.inside"
OLDEST = (3, 10)

# Reads the compiled modules from standard input, puts each where `import` finds it, and runs the last one's main().
BOOT = """
import marshal, posix, sys
size, data = int(sys.argv[1]), b""
while len(data) < size:
    piece = posix.read(0, size - len(data))
    if not piece:
        sys.exit(3)
    data += piece
for name, code in marshal.loads(data):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main()
"""

COMPILE = """
import json, marshal, sys
modules = json.load(sys.stdin)
bundles = {
    role: marshal.dumps([(name, compile(text, name, "exec")) for name, text in parts])
    for role, parts in modules.items()
}
sys.stdout.buffer.write(marshal.dumps((sys.version_info[:2], sys.prefix, sys.exec_prefix, bundles), 4))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python executable, the folders that it reads, and what it is sent for each role (`answer`, `checker`)."""

    executable: str
    folders: tuple[str, ...]
    bundles: dict[str, bytes]

    def command(self, role: str) -> list[str]:
        return [self.executable, "-S", "-s", "-B", "-c", BOOT, str(len(self.bundles[role]))]


@lru_cache(maxsize=2)
def find_interpreter(as_other_user: bool) -> Interpreter:
    """The Python that this process runs on, or the system's where another user cannot reach that one.

    UserError when neither can be used.
    """
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    tried = []
    for candidate in (own, Path("/usr/bin/python3"), Path("/usr/local/bin/python3")):
        path = candidate.resolve()
        if not path.exists():
            continue
        if as_other_user and not _open_to_all(path):
            tried.append(f"{path} lies in a folder that only its owner may enter")
            continue
        found = _ask(path)
        if isinstance(found, Interpreter):
            return found
        tried.append(found)
    raise UserError(f"No Python can be used inside the sandbox: {'; '.join(tried)}. Install the system's python3.")


def _open_to_all(path: Path) -> bool:
    """Whether every folder above may be entered, and the file run, by any user."""
    return all(os.stat(part).st_mode & stat.S_IXOTH for part in (path, *path.parents))


def _ask(path: Path) -> Interpreter | str:
    """What the executable says of itself, or a clause that says why it will not do."""
    sources = {
        role: [(f"{PACKAGE}.{name}", (INSIDE / f"{name}.py").read_text(encoding="utf-8")) for name in names]
        for role, names in MODULES.items()
    }
    run = subprocess.run(
        [path, "-I", "-S", "-B", "-c", COMPILE], input=json.dumps(sources).encode(), capture_output=True, timeout=60
    )
    if run.returncode:
        return (
            f"{path} cannot compile the programs of the sandbox ({run.stderr.decode(errors='replace').strip()[-200:]})"
        )
    version, prefix, exec_prefix, bundles = marshal.loads(run.stdout)
    if version < OLDEST:
        return f"{path} is Python {version[0]}.{version[1]}, older than {OLDEST[0]}.{OLDEST[1]}"
    folders = {str(path.parent)} | {f"{root}/{name}" for root in (prefix, exec_prefix) for name in ("lib", "lib64")}
    return Interpreter(str(path), tuple(sorted(folder for folder in folders if Path(folder).is_dir())), bundles)
