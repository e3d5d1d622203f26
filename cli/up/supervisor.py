"""The child processes of `starfish up`: starts them with a lifeline, restarts them if they crash,
and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from cli.up.handovers import Handovers
from cli.up.leftovers import RUN_VARIABLE
from cli.up.restart_backoff import RestartBackoff
from cli.up.services import Service, Standby
from cli.up.warm_standby import WarmStandby
from shared.clock import Clock
from shared.errors import Unavailable
from shared.exit_codes import describe_exit
from shared.logs import open_log

_JITTER = (1.0, 1.5)
_LOG_TAIL_CHARACTERS = 64 << 10
_CRASH = re.compile(r"\brank_crashed\b")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: |$)")  # the last line of a traceback
_SHOWN_CHARACTERS_MAX = 200
_PREPARATION = re.compile(
    r"fork_server_(?:ready|prepares\s+done=(?P<done>\d+)\s.*\btotal=(?P<total>\d+))"
)
_CAPTURE = re.compile(
    r"graphs_captured|rank_crashed|starfish rank: "
    r"|captures_graphs\s+done=(?P<done>\d+)\s.*\btotal=(?P<total>\d+)"
)


class Supervisor:
    """The lifeline is a pipe whose write end only this process holds, and to which it never writes.
    However this process ends, the pipe then ends too, and every child stops by itself."""

    def __init__(
        self,
        log_dir: Path,
        clock: Clock,
        *,
        run: str,
        warn: Callable[[str], None],
        revoke_leadership: Callable[[int], Awaitable[bool]],
    ) -> None:
        """`run` marks all children, and theirs. `revoke_leadership` is called with the pid of a
        child that has exited, and returns whether that was the leader."""
        self.log_dir = log_dir
        self._clock = clock
        self._run = run
        self._warn = warn
        self._revoke_leadership = revoke_leadership
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._handovers = Handovers()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._draining: dict[str, list[asyncio.subprocess.Process]] = {}  # that have a successor
        self._standbys: dict[str, WarmStandby] = {}
        self._stopping = False

    @property
    def lifeline_fd(self) -> int:
        return self._lifeline_read

    async def start(self, service: Service) -> None:
        """Raises OSError."""
        handover_fd = self._handovers.write_fd
        command = service.command(self._lifeline_read, handover_fd)
        environment, fds = service.environment, service.inherited_fds
        if service.standby:
            fds = (*fds, handover_fd)
        child = await self._spawn(self._log_file(service.name), command, environment, fds)
        self._children[service.name] = child

    async def _spawn(
        self,
        log_file: Path,
        command: list[str],
        environment: Mapping[str, str],
        fds: Sequence[int],
    ) -> asyncio.subprocess.Process:
        with open_log(log_file) as log:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lifeline_read, *fds],
                start_new_session=True,  # Ctrl-C reaches only us, and we stop them in order
                env=os.environ | environment | {RUN_VARIABLE: self._run},
            )

    def _log_file(self, name: str) -> Path:
        return self.log_dir / f"{name}.log"

    async def start_standby(self, planned: Standby) -> None:
        """Has a process prepare itself to take over."""
        log_file = self._log_file(planned.name)

        async def spawn(begin_fd: int) -> asyncio.subprocess.Process:
            handover_fd = self._handovers.write_fd
            command = planned.command(self._lifeline_read, begin_fd, handover_fd)
            fds = (*planned.inherited_fds, handover_fd, begin_fd)
            return await self._spawn(log_file, command, {}, fds)

        standby = self._standbys[planned.name] = WarmStandby(spawn)
        with contextlib.suppress(OSError):  # `keep_standby` tries again
            await standby.start()

    async def keep_standby(self, planned: Standby) -> None:
        """After `start_standby`: replaces a standby that was needed, or has exited, until
        `stop`."""
        standby, backoff = self._standbys[planned.name], RestartBackoff()
        while not self._stopping:
            started_at = self._clock.now()
            is_taken = await standby.until_gone()
            wait_s = backoff.on_exit(self._clock.now() - started_at, led=is_taken)
            await asyncio.sleep(wait_s * random.uniform(*_JITTER))
            with contextlib.suppress(OSError):
                await standby.start()

    def has_exited(self, service: Service) -> bool:
        return self._children[service.name].returncode is not None

    async def supervise(self, service: Service) -> None:
        """Restarts the service whenever it exits, or hands over, until `stop`."""
        backoff = RestartBackoff()
        while not self._stopping:
            started_at = self._clock.now()
            child = self._children[service.name]
            await self._handovers.until(child)
            if self._stopping:
                return
            if child.returncode is None:
                why = f"{service.name} was told to end, and its streams finish"
                self._draining[service.name] = self._processes_of(service.name)
            else:
                why = self.exit_message(service.name)
            if self._take_over(service):  # at once: who waits for its successor are clients
                self._warn(f"{why}; its standby is {service.name} now")
                continue
            if child.returncode is None:  # it is no crash: clients wait in its socket's queue
                self._warn(f"{why}; starting its successor")
                await self._restart(service, backoff, 0.0)
                continue
            lived_s = self._clock.now() - started_at
            led = await self._revoke_leadership(child.pid)
            if self._stopping:
                return
            self._warn(f"{why}; restarting {service.name}")
            await self._restart(service, backoff, backoff.on_exit(lived_s, led=led))

    async def _restart(self, service: Service, backoff: RestartBackoff, wait_s: float) -> None:
        """Tries again for as long as the host cannot start a process, until `stop`."""
        while True:
            await asyncio.sleep(wait_s * random.uniform(*_JITTER))
            if self._stopping or self._take_over(service):
                return
            try:
                await self.start(service)
            except OSError as error:
                self._warn(f"{service.name} cannot be started ({error.strerror}); trying again")
                wait_s = backoff.on_exit(0.0, led=False)
            else:
                return

    def _take_over(self, service: Service) -> bool:
        """Whether a standby is the service now, and writes to its log."""
        standby = self._standbys.get(service.standby)
        words = (service.standby_word, str(self._log_file(service.name)))
        process = None if standby is None else standby.take(words)
        if process is not None:
            self._children[service.name] = process
        return process is not None

    def require_alive(self, service: Service) -> None:
        """Raises Unavailable with the child's own message if it has exited."""
        if self.has_exited(service):
            raise Unavailable(self.exit_message(service.name))

    def exit_message(self, name: str) -> str:
        """The message with which a process of ours exited, else the last line of its log. Of one
        that was killed the log says nothing."""
        code = self._children[name].returncode
        if code is not None and code < 0:
            return f"{name} was {describe_exit(code)}"
        lines = self._log_text(name)[-_LOG_TAIL_CHARACTERS:].splitlines()
        said = [line.strip() for line in lines if any(map(str.isalpha, line))]
        for line in reversed(said):
            if line.startswith("starfish ") and ": " in line:
                return line.partition(": ")[2]
        return f"{name} exited: {said[-1]}" if said else f"{name} exited without a message"

    def startup_error(self, name: str) -> str | None:
        """The last message in which a rank's log says why it cannot start; None if there is
        none."""
        lines = self._log_text(name).splitlines()
        found = [line for line in lines if line.startswith("starfish rank: ")]
        return found[-1].partition(": ")[2] if found else None

    def crashes(self, name: str) -> str | None:
        """How often a rank has crashed by what its log says, and with what the last time; None if
        it has not. Its agent starts it again, which may go on for ever."""
        *before, last = _CRASH.split(self._log_text(name))
        if not before:
            return None
        lines = last.splitlines()[1:]
        what = next((line for line in lines if _EXCEPTION.match(line)), "for an unknown reason")
        times = "once" if len(before) == 1 else f"{len(before)} times"
        return f"{name} crashed {times}: {what[:_SHOWN_CHARACTERS_MAX]}; see {self._log_file(name)}"

    def preparation(self) -> str | None:
        """How much the agent's log says is prepared before the ranks start; None if all is."""
        found = self._last_match("agent", _PREPARATION)
        if found is None or found["done"] is None:
            return None
        percent = 20 * (5 * int(found["done"]) // max(int(found["total"]), 1))
        return f"loading kernels, {percent} %"

    def capture(self, name: str) -> str | None:
        """How far a rank's log says that it is with its graphs, for which it may have to compile
        kernels; None if it captures none now."""
        found = self._last_match(name, _CAPTURE)
        if found is None or found["done"] is None:
            return None
        return f"{name} compiles kernels, {found['done']} of {found['total']} graphs"

    def _last_match(self, name: str, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """In the end of a child's log."""
        found = [*pattern.finditer(self._log_text(name)[-_LOG_TAIL_CHARACTERS:])]
        return found[-1] if found else None

    def _log_text(self, name: str) -> str:
        """Of a child; empty if there is none."""
        try:
            return self._log_file(name).read_bytes().decode(errors="replace")
        except OSError:
            return ""

    async def stop(self, *services: Service) -> None:
        """Sends all of them SIGTERM, then SIGKILL after their stop time. Returns when they have
        exited. Nothing takes over from them."""
        self._stopping = True
        self._handovers.refuse()
        for name in {service.standby for service in services} & self._standbys.keys():
            await self._standbys[name].stop()
        async with asyncio.TaskGroup() as tasks:
            for service in services:
                for child in self._processes_of(service.name):
                    tasks.create_task(_end(child, service.stop_timeout_s))

    def _processes_of(self, name: str) -> list[asyncio.subprocess.Process]:
        """Those that run: the service's, and others before it that it has taken over from."""
        newest = self._children.get(name)
        found = [*self._draining.get(name, ()), *([] if newest is None else [newest])]
        return [child for child in found if child.returncode is None]

    def kill_all(self) -> None:
        """Kills the children without waiting. The end of the lifeline stops their own children."""
        for standby in self._standbys.values():
            standby.kill()
        for name in self._children:
            for child in self._processes_of(name):
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGKILL)

    def close_lifeline(self) -> None:
        for fd in (self._lifeline_read, self._lifeline_write):
            os.close(fd)
        self._handovers.close()


async def _end(child: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Sends SIGTERM, then SIGKILL. Returns when it has exited."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        await asyncio.wait_for(child.wait(), timeout_s)
    except TimeoutError:
        child.kill()
        await child.wait()
