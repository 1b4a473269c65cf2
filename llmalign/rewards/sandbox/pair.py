"""Runs an answer and its tests in two sandboxes and carries messages between them, as bytes that it never reads into.

What comes from either side is data: lengths are limited, one request is open at a time, counts are checked, texts are
cut and made printable. A third sandbox of the answer's kind is started for a problem's helpers when the tests ask for
them. Time is counted while every sandbox that there is has started.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmalign.rewards.sandbox.backends import ENVIRONMENT, Backend

MAX_FRAME = 16 * 1024 * 1024
START_SECONDS = 60.0  # for interpreters on a busy machine; no foreign code runs before the clock starts
LONGEST_ERROR = 400


class SandboxError(RuntimeError):
    """A sandbox could not be started: says nothing of the answer."""


@dataclass(frozen=True)
class Job:
    """One answer to be judged: `prompt` is the code whose helpers count ('' for none), limits are for each sandbox."""

    program: str
    tests: str
    entry_point: str
    prompt: str
    timeout_s: float
    memory_mb: int
    own_names: bool = True  # whether tests may use what the program alone defines


@dataclass
class Report:
    """Tests passed and there, and what failed first ('' for nothing)."""

    passed: int = 0
    total: int = 0
    error: str = ""


def run_pair(backend: Backend, job: Job) -> Report:
    """Judges one answer; SandboxError when the sandboxes do not start."""
    pair = _Pair(backend, job)
    try:
        return pair.run()
    finally:
        pair.close()


@dataclass
class _Room:
    """One sandbox: its process and what is on the way to and from it."""

    name: str
    process: subprocess.Popen[bytes]
    unsent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False
    waited_for: bool = False  # a reply is due
    closed: bool = False

    @property
    def reader(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def writer(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def send(self, data: bytes) -> None:
        self.unsent += len(data).to_bytes(4, "big") + data

    def next_frame(self) -> bytes | None:
        """The next message that has arrived whole; ValueError for one that is too long."""
        if len(self.received) < 4:
            return None
        size = int.from_bytes(self.received[:4], "big")
        if size > MAX_FRAME + 1:
            raise ValueError(f"sent more than {MAX_FRAME >> 20} MiB at once")
        if len(self.received) < 4 + size:
            return None
        frame = bytes(self.received[4 : 4 + size])
        del self.received[: 4 + size]
        return frame


class _Pair:
    def __init__(self, backend: Backend, job: Job) -> None:
        self.backend, self.job = backend, job
        self.report = Report()
        self.rooms: dict[str, _Room] = {}
        self.ended: dict[str, str] = {}  # rooms that are no more, and why
        self.told: set[str] = set()  # those of them of which the tests know
        self.finished = False
        self.starting = True
        self.since = time.monotonic()  # when the present start, or stretch of running, began
        self.spent = 0.0  # seconds of running before it

    def run(self) -> Report:
        job = self.job
        self._open("answer", {"program": job.program})
        parts = ("program", "tests", "entry_point", "prompt", "own_names")
        self._open("tests", {part: getattr(job, part) for part in parts})
        while not self.finished:
            left = self._seconds_left()
            if left <= 0:
                if self.starting:
                    raise SandboxError(f"The sandboxes did not start within {START_SECONDS:g} seconds.")
                self._fail(f"Timeout: the tests took longer than {job.timeout_s:g} seconds.")
                break
            self._exchange(left)
        return self.report

    def close(self) -> None:
        """Kills what still runs, with all that it started."""
        for room in self.rooms.values():
            _kill(room.process)
        for room in self.rooms.values():
            room.process.wait()
            for pipe in (room.process.stdin, room.process.stdout, room.process.stderr):
                if pipe is not None:
                    pipe.close()

    def _open(self, name: str, parts: dict[str, Any]) -> None:
        role = "checker" if name == "tests" else "answer"
        room = self.rooms[name] = _Room(name, _start(self.backend, role))
        os.set_blocking(room.reader, False)
        os.set_blocking(room.writer, False)
        limits = {"memory": self.job.memory_mb << 20, "seconds": int(self.job.timeout_s) + 2}
        room.unsent += self.backend.interpreter.bundles[role]
        room.send(ascii({**parts, **limits, **self.backend.confinement()}).encode("ascii"))

    def _seconds_left(self) -> float:
        limit = START_SECONDS if self.starting else self.job.timeout_s - self.spent
        return self.since + limit - time.monotonic()

    def _fail(self, error: str) -> None:
        """Ends the run; what has passed so far stays passed."""
        self.report.error = self.report.error or error
        self.finished = True

    def _exchange(self, seconds: float) -> None:
        poll = select.poll()
        by_file: dict[int, _Room] = {}
        for room in self.rooms.values():
            if room.closed:
                continue
            by_file[room.reader] = room
            poll.register(room.reader, select.POLLIN)
            if room.unsent:
                by_file[room.writer] = room
                poll.register(room.writer, select.POLLOUT)
        for file, _ in poll.poll(max(1, int(seconds * 1000))):
            room = by_file[file]
            if file == room.writer:
                self._write(room)
            elif not room.closed:
                self._read(room)

    def _write(self, room: _Room) -> None:
        try:
            sent = os.write(room.writer, memoryview(room.unsent)[: 1 << 20])
        except BlockingIOError:
            return
        except BrokenPipeError:
            room.unsent.clear()  # reading will tell that it has ended
            return
        del room.unsent[:sent]

    def _read(self, room: _Room) -> None:
        try:
            data = os.read(room.reader, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self._end(room, "ended before it answered")
            return
        room.received += data
        handle: Callable[[_Room, bytes], None] = self._from_tests if room.name == "tests" else self._from_answer
        try:
            while not self.finished and not room.closed and (frame := room.next_frame()) is not None:
                handle(room, frame)
        except ValueError as error:
            self._end(room, str(error))

    def _end(self, room: _Room, why: str) -> None:
        room.closed = True
        if not room.ready:
            raise SandboxError(f"The {self.backend.name} sandbox did not start: {_last_words(room.process)}")
        _kill(room.process)
        self.ended[room.name] = f"The sandbox of the {room.name} {why}."
        if room.name == "tests":
            self._fail(self.ended[room.name])
        elif room.waited_for:
            self._gone(room.name)

    def _gone(self, name: str) -> None:
        self.told.add(name)
        self.rooms["tests"].send(b"X" + self.ended[name].encode("ascii", "replace"))

    def _is_ready(self, room: _Room) -> None:
        room.ready = True
        if self.starting and all(other.ready for other in self.rooms.values()):
            self.starting, self.since = False, time.monotonic()

    def _open_helpers(self, source: str) -> None:
        if not self.starting:
            now = time.monotonic()
            self.starting, self.spent, self.since = True, self.spent + now - self.since, now
        self._open("helpers", {"program": source})

    def _from_answer(self, room: _Room, frame: bytes) -> None:
        if not room.ready and frame == b"R":
            self._is_ready(room)
        elif not room.waited_for:
            self._end(room, "spoke without being asked")
        else:
            room.waited_for = False
            self.rooms["tests"].send(b"V" + frame)

    def _from_tests(self, room: _Room, frame: bytes) -> None:
        kind, rest = frame[:1], frame[1:]
        if kind == b"R" and not room.ready:
            self._is_ready(room)
        elif kind in (b"A", b"H"):
            self._ask("answer" if kind == b"A" else "helpers", rest)
        elif kind == b"S" and "helpers" not in self.rooms:
            self._open_helpers(rest.decode("utf-8", "surrogatepass"))
        elif kind == b"N" and rest.isdigit() and len(rest) < 7:
            self.report.total = int(rest)
        elif kind == b"P":
            self._progress(rest)
        elif kind == b"V":
            self.finished = True
        else:
            self._fail("The tests broke the protocol.")

    def _progress(self, rest: bytes) -> None:
        count, _, error = rest.partition(b" ")
        if not count.isdigit() or len(count) > 6 or int(count) > self.report.total:
            self._fail("The tests broke the protocol.")
            return
        self.report.passed = int(count)
        self.report.error = _printable(error)

    def _ask(self, name: str, request: bytes) -> None:
        room = self.rooms.get(name)
        if name in self.told or (room and room.waited_for):  # would grow without bound in this process
            self._fail("The tests broke the protocol.")
            return
        if name in self.ended or room is None:
            self.ended.setdefault(name, f"There is no sandbox for the {name}.")
            self._gone(name)
            return
        room.waited_for = True
        room.send(request)


def _start(backend: Backend, role: str) -> subprocess.Popen[bytes]:
    """One interpreter under lock. No preexec_fn: the process that trains has threads, and may be very large.

    It leads a group of its own, so that one signal reaches all of bubblewrap's processes: one that is killed while it
    starts leaves a child behind that waits for it and is not yet told to die with it.
    """
    filter_fd = None
    try:
        if backend.name == "bubblewrap" and backend.seccomp is not None:
            filter_fd, end = os.pipe()
            with os.fdopen(end, "wb") as pipe:
                pipe.write(backend.seccomp)
        return subprocess.Popen(
            backend.command(role, filter_fd),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=() if filter_fd is None else (filter_fd,),
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"The {backend.name} sandbox did not start: {error}.") from error
    finally:
        if filter_fd is not None:
            os.close(filter_fd)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a sandbox whole, also where its first process has ended; until that is reaped its number is its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """What a process that failed to start wrote to its standard error."""
    _kill(process)
    assert process.stderr is not None
    return _printable(process.stderr.read(4096)) or "it said nothing"


def _printable(text: bytes) -> str:
    return re.sub(r"[^ -~]+", " ", text.decode("ascii", "replace")).strip()[:LONGEST_ERROR]
