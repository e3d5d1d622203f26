"""The agent's side of a fork server: starts one, asks it for processes, replaces it when it
exits."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from node_agent.restart_policy import RestartPolicy
from shared.clock import Clock
from shared.codec import pack, unpack
from shared.errors import WireError
from shared.fork_server import (
    CHANNEL_FLAG,
    MESSAGE_BYTES_MAX,
    PADDING,
    PADDING_FLAG,
    ForkReply,
    ForkRequest,
    ForkServerStatus,
)

log = structlog.get_logger()

_PREPARE_TIMEOUT_S = 300.0  # if there are kernels to compile
_FORK_TIMEOUT_S = 10.0
_FAILURES_MAX = 3
_RESTARTS = RestartPolicy(delay_s_max=60.0)  # each attempt costs seconds of a CPU
_PR_SET_CHILD_SUBREAPER = 36


class ForkUnavailable(Exception):
    """There is no child, and no request for one is under way: start the process by `exec`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkServerCommand:
    """`flags` say what to prepare."""

    program: tuple[str, ...]  # python -m MODULE
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    pass_fds: tuple[int, ...]  # which every child inherits


@dataclass(slots=True, kw_only=True)
class ForkClient:
    """One request at a time. Call `start` once on the event loop, then run `keep_ready`; call
    `close` at the end."""

    command: ForkServerCommand
    clock: Clock
    _server: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None
    _is_ready: bool = False
    _failures: int = 0  # in a row
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _is_closed: bool = False

    @property
    def is_forking(self) -> bool:
        """Whether a child may exist whose pid is not known yet."""
        return self._is_ready and self._lock.locked()

    @property
    def pid(self) -> int | None:
        return None if self._server is None else self._server.pid

    def start(self) -> None:
        """Returns at once; the server prepares meanwhile. Without one, `fork` says so."""
        try:
            become_subreaper()
            self._start_server()
        except OSError as error:
            log.warning("no_fork_server", detail=str(error))
            self._failures = _FAILURES_MAX

    async def fork(self, argv: Sequence[str], log_path: Path | None) -> int:
        """The pid of a new child of this process. Waits until the server is prepared. Raises
        ForkUnavailable if there certainly is no child, OSError if there may be one."""
        async with self._lock:
            await self._make_ready()
            request = ForkRequest(argv=tuple(argv), log_path=str(log_path or ""))
            try:
                reply = await self._ask(request)
            except (OSError, TimeoutError, WireError) as error:
                detail = f"the fork server failed: {error}"
                self._fail(detail)
                raise OSError(detail) from error
        if reply.error:
            raise ForkUnavailable(reply.error)
        self._failures = 0
        return reply.pid

    async def keep_ready(self) -> None:
        """Prepares another server as soon as one has exited, long before a rank may need it.
        Returns after `close`."""
        failures = 0
        while not self._is_closed:
            started_at = self.clock.now()
            await self._until_exited()
            lived_s = self.clock.now() - started_at
            failures = _RESTARTS.failures_after(failures, uptime_s=lived_s, exit_code=None)
            wait_s = _RESTARTS.delay_s(failures, exit_code=None, jitter=random.random())
            await asyncio.sleep(wait_s)
            async with self._lock:
                self._failures = min(self._failures, _FAILURES_MAX - 1)
                with contextlib.suppress(ForkUnavailable):
                    await self._make_ready()

    async def _until_exited(self) -> None:
        """At once if there is no server."""
        if self._server is None:
            return
        try:
            pidfd = os.pidfd_open(self._server.pid)
        except OSError:
            return
        exited, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(pidfd, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    def close(self) -> None:
        """Ends a server that is not in the middle of a request; it also ends when this process
        does."""
        self._is_closed = True
        if not self.is_forking:
            self._drop_server()

    async def _make_ready(self) -> None:
        """Raises ForkUnavailable."""
        if self._is_closed or self._failures >= _FAILURES_MAX:
            raise ForkUnavailable("there is no fork server")
        if self._server is None or self._server.poll() is not None:
            self._drop_server()
            try:
                self._start_server()
            except OSError as error:
                self._fail(str(error))
                raise ForkUnavailable(str(error)) from error
        if self._is_ready:
            return
        try:
            async with _answer_within(_PREPARE_TIMEOUT_S):
                await self._receive_ready()
        except (OSError, TimeoutError, WireError) as error:
            detail = f"the fork server does not start: {error}"
            self._fail(detail)
            raise ForkUnavailable(detail) from error
        self._is_ready = True

    async def _receive_ready(self) -> None:
        while not (status := unpack(await self._receive(), ForkServerStatus)).is_ready:
            log.info("fork_server_prepares", done=status.done, total=status.total)
        log.info("fork_server_ready", pid=status.pid)

    async def _ask(self, request: ForkRequest) -> ForkReply:
        assert self._channel is not None
        async with _answer_within(_FORK_TIMEOUT_S):
            await asyncio.get_running_loop().sock_sendall(self._channel, pack(request))
            return unpack(await self._receive(), ForkReply)

    async def _receive(self) -> bytes:
        assert self._channel is not None
        data = await asyncio.get_running_loop().sock_recv(self._channel, MESSAGE_BYTES_MAX)
        if not data:
            raise ConnectionResetError("it has exited")
        return data

    def _start_server(self) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = self.command
        with theirs:
            try:
                self._server = subprocess.Popen(
                    [
                        *(*command.program, CHANNEL_FLAG, str(theirs.fileno())),
                        *(PADDING_FLAG, PADDING, *command.flags),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    # Threads of a library would make a fork unsafe.
                    env={**command.environment, "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=[fd for fd in (*command.pass_fds, theirs.fileno()) if fd >= 0],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self._channel, self._is_ready = ours, False

    def _fail(self, detail: str) -> None:
        if not self._is_closed:
            self._failures += 1
            log.warning("fork_server_failed", detail=detail, failures=self._failures)
        self._drop_server()

    def _drop_server(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                self._server.send_signal(signal.SIGKILL)
            self._server.wait()
        if self._channel is not None:
            self._channel.close()
        self._server, self._channel, self._is_ready = None, None, False


@contextlib.asynccontextmanager
async def _answer_within(seconds: float) -> AsyncIterator[None]:
    """Raises TimeoutError, which says for how long there was none."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from error


def become_subreaper() -> None:
    """Orphaned descendants become children of this process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
