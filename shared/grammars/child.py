"""One life of a grammar child, seen from its parent: starts it, passes messages, and kills it when
a job takes more than its budget. Who sent the job, and what follows, its owner decides."""

from __future__ import annotations

import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shared.grammars.messages import (
    Advance,
    Began,
    Checked,
    Gone,
    GrammarBudget,
    Mask,
    Ready,
    Refused,
    Reply,
    Request,
    Unusable,
    frame,
    read_reply,
)
from shared.grammars.running_jobs import RunningJobs

_LOOK_S = 0.05  # how often a running job's cost is looked at
_IDLE_LOOK_S = 1.0
_EXIT_S = 1.0  # from the end of its messages to its exit
_CPU_CLOCK = 2  # of a process: the kernel's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFile:
    """0 tokens, or no end ids: what the file says."""

    path: Path
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """Why a life ended. `blamed` is the job that took too long, or that ran when the child died;
    None if none did. `detail` says it in a few words."""

    blamed: int | None
    overran: bool
    detail: str


class GrammarChild:
    """`on_reply` and `on_end` are called on a thread of this object; `on_end` once, last. Any
    thread may `send` and `kill`."""

    def __init__(
        self,
        tokenizer: TokenizerFile,
        budget: GrammarBudget,
        *,
        on_reply: Callable[[Reply], None],
        on_end: Callable[[ChildEnd], None],
    ) -> None:
        """Raises OSError if no process can be started."""
        self._budget = budget
        self._on_reply = on_reply
        self._on_end = on_end
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._running = RunningJobs()
        self._lock = threading.Lock()
        self._overran: int | None = None
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                _command(tokenizer, budget, theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # One arena: the limit counts address space, and each arena reserves 64 MB.
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            )
        for body, name in ((self._write, "grammar-write"), (self._read, "grammar-read")):
            threading.Thread(target=body, name=name, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Request) -> None:
        if isinstance(request, Advance):
            with self._lock:
                self._running.on_step_sent(request.job, self._cpu_s())
        self._requests.put(frame(request))

    def kill(self) -> None:
        self._process.kill()

    def _write(self) -> None:
        """On a thread of its own: a child that does not read must not hold up who sends."""
        try:
            while (data := self._requests.get()) is not None:
                self._channel.sendall(data)
        except OSError:
            self.kill()

    def _read(self) -> None:
        reader = _FrameReader(self._channel)
        try:
            while (reply := reader.next(self._look)) is not None:
                self._take(reply)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            pass
        code = self._exit_code()
        self._requests.put(None)
        self._channel.close()
        with self._lock:
            blamed = self._overran if self._overran is not None else self._running.suspect
        overran = self._overran is not None
        detail = "a job took too long" if overran else f"it ended with {code}"
        self._on_end(ChildEnd(blamed=blamed, overran=overran, detail=detail))

    def _exit_code(self) -> int:
        """Of a child that has closed its end, or says what is none."""
        try:
            return self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def _take(self, reply: Reply) -> None:
        with self._lock:
            match reply:
                case Began(job=job):
                    self._running.on_began(job, self._cpu_s())
                case Checked(job=job) | Mask(job=job) | Refused(job=job) | Gone(job=job):
                    self._running.on_ended(job, self._cpu_s())
                case Ready() | Unusable():
                    pass
        if not isinstance(reply, Began):
            self._on_reply(reply)

    def _look(self) -> bool:
        """Kills the child if a job has used up its budget: of CPU seconds, because a loaded host
        makes everything late. Returns whether any job runs."""
        with self._lock:
            job = self._running.overrun(
                self._cpu_s(), compile_s=self._budget.compile_s, step_s=self._budget.step_s
            )
            if job is not None and self._overran is None:
                self._overran = job
                self.kill()
            return self._running.suspect is not None

    def _cpu_s(self) -> float:
        try:
            return time.clock_gettime((~self._process.pid << 3) | _CPU_CLOCK)
        except OSError:  # it has ended
            return 0.0


class _FrameReader:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._readable = select.poll()  # a timeout of the socket would be the writer's, too
        self._readable.register(channel, select.POLLIN)
        self._data = bytearray()

    def next(self, look: Callable[[], bool]) -> Reply | None:
        """None at the end. Calls `look`, which says whether to look again soon, whenever nothing
        has come for a while."""
        is_busy = True
        while (body := self._whole()) is None:
            if not self._readable.poll((_LOOK_S if is_busy else _IDLE_LOOK_S) * 1000):
                is_busy = look()
                continue
            data = self._channel.recv(1 << 20)
            if not data:
                return None
            self._data += data
        return read_reply(body)

    def _whole(self) -> bytes | None:
        if len(self._data) < 4:
            return None
        end = 4 + int.from_bytes(self._data[:4], "little")
        if len(self._data) < end:
            return None
        body = bytes(self._data[4:end])
        del self._data[:end]
        return body


def _command(tokenizer: TokenizerFile, budget: GrammarBudget, fd: int) -> Sequence[str]:
    return (
        *(sys.executable, "-m", "shared.grammars.worker", "--fd", str(fd)),
        *("--tokenizer", str(tokenizer.path), "--vocab-size", str(tokenizer.vocab_size)),
        *("--memory-mb", str(budget.memory_mb), "--eos", *map(str, tokenizer.eos_token_ids)),
    )
