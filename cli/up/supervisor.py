"""The child processes of `starfish up`: starts them with a lifeline, restarts them if they crash,
and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from cli.up.services import Service
from shared.clock import Clock
from shared.errors import Unavailable

_BACKOFF_FIRST_S = 0.2
_BACKOFF_MAX_S = 10.0
_HEALTHY_AFTER_S = 20.0
_LOG_TAIL_BYTES = 64 << 10


class Supervisor:
    """The lifeline is a pipe whose write end only this process holds, and to which it never writes.
    However this process ends, the pipe then ends too, and every child stops by itself."""

    def __init__(self, log_dir: Path, clock: Clock, on_restart: Callable[[str], None]) -> None:
        self.log_dir = log_dir
        self._clock = clock
        self._on_restart = on_restart
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False

    @property
    def lifeline_fd(self) -> int:
        return self._lifeline_read

    async def start(self, service: Service) -> None:
        with (self.log_dir / f"{service.name}.log").open("ab") as log:
            self._children[service.name] = await asyncio.create_subprocess_exec(
                *service.command(self._lifeline_read),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lifeline_read, *service.inherited_fds],
                start_new_session=True,  # Ctrl-C reaches only us, and we stop them in order
                env=os.environ | service.environment,
            )

    def has_exited(self, service: Service) -> bool:
        return self._children[service.name].returncode is not None

    async def supervise(self, service: Service) -> None:
        """Restarts the service whenever it exits, until `stop`."""
        backoff_s = _BACKOFF_FIRST_S
        while not self._stopping:
            started_at = self._clock.now()
            await self._children[service.name].wait()
            if self._stopping:
                return
            if self._clock.now() - started_at > _HEALTHY_AFTER_S:
                backoff_s = _BACKOFF_FIRST_S
            self._on_restart(
                f"{service.name} exited ({self.exit_message(service.name)}); restarting it"
            )
            await asyncio.sleep(backoff_s * random.uniform(1.0, 1.5))
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)
            if not self._stopping:
                await self.start(service)

    def require_alive(self, service: Service) -> None:
        """Raises Unavailable with the child's own message if it has exited."""
        if self.has_exited(service):
            raise Unavailable(self.exit_message(service.name))

    def exit_message(self, name: str) -> str:
        """The message with which a process of ours exited, else the last line of its log."""
        path = self.log_dir / f"{name}.log"
        try:
            lines = path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").splitlines()
        except OSError:
            lines = []
        said = [line.strip() for line in lines if any(map(str.isalpha, line))]
        for line in reversed(said):
            if line.startswith("starfish ") and ": " in line:
                return line.partition(": ")[2]
        return f"{name} exited: {said[-1]}" if said else f"{name} exited without a message"

    def startup_error(self, name: str) -> str | None:
        """The last message in which a rank's log says why it cannot start; None if there is
        none."""
        try:
            lines = (self.log_dir / f"{name}.log").read_bytes().decode(errors="replace")
        except OSError:
            return None
        found = [line for line in lines.splitlines() if line.startswith("starfish rank: ")]
        return found[-1].partition(": ")[2] if found else None

    async def stop(self, service: Service) -> None:
        """Sends SIGTERM, then SIGKILL after the service's stop time. Returns when it has exited."""
        self._stopping = True
        child = self._children.get(service.name)
        if child is None or child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), service.stop_timeout_s)
        except TimeoutError:
            child.kill()
            await child.wait()

    def kill_all(self) -> None:
        """Kills the children without waiting. The end of the lifeline stops their own children."""
        for child in self._children.values():
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGKILL)

    def close_lifeline(self) -> None:
        for fd in (self._lifeline_read, self._lifeline_write):
            os.close(fd)
