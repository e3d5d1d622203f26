"""Processes of ranks: starts them, finds those of an earlier agent, watches them by pidfd, and
never signals another process that got the same pid."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from node_agent.exit_detection import Dying, StatFile
from node_agent.rank_supervisor import RunningRank
from shared.etcd_options import EtcdOptions
from shared.logs import open_log
from shared.types import Incarnation, Member, NodeId, RankId

_MODULE = "gpu_worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCommand:
    """The command line of this node's ranks, without the flags that differ between incarnations."""

    node: NodeId
    store: EtcdOptions
    instance: str
    lifeline_fd: int
    extra_flags: tuple[str, ...]
    host_experts_fd: int = -1  # memory that all ranks share
    control_ports: Mapping[RankId, int] = field(default_factory=dict)  # of others: a free one
    program: tuple[str, ...] = (sys.executable, "-m", _MODULE)

    def argv(self, member: Member, lease_id: int, card_flags: Sequence[str] = ()) -> list[str]:
        port = self.control_ports.get(member.rank)
        return [
            *self.program,
            *("--rank", str(member.rank), "--incarnation", str(member.incarnation)),
            *("--lease-id", str(lease_id)),
            *(("--control-port", str(port)) if port else ()),
            *card_flags,
            *self.common_flags,
        ]

    @property
    def common_flags(self) -> tuple[str, ...]:
        cache_flags = ("--host-experts-gb", "0")  # or each rank would create a cache of its own
        if self.host_experts_fd >= 0:
            cache_flags = ("--host-experts-fd", str(self.host_experts_fd))
        return (
            *("--node", self.node, *self.store.flags(), "--instance", self.instance),
            *("--lifeline-fd", str(self.lifeline_fd)),
            *cache_flags,
            *self.extra_flags,
        )

    @property
    def shared_fds(self) -> tuple[int, ...]:
        """The file descriptors that every rank inherits."""
        return tuple(fd for fd in (self.lifeline_fd, self.host_experts_fd) if fd >= 0)

    def running_rank_of(self, pid: int, argv: Sequence[str]) -> RunningRank | None:
        """The running rank whose process has this command line; None if it is not one of this
        node's ranks."""
        if tuple(argv[1 : len(self.program)]) != self.program[1:]:
            return None
        flags = dict(zip(argv[len(self.program) :], argv[len(self.program) + 1 :], strict=False))
        if flags.get("--node") != self.node or flags.get("--instance") != self.instance:
            return None
        if flags.get("--etcd") != self.store.etcd:
            return None
        try:
            member = Member(
                rank=RankId(int(flags["--rank"])),
                incarnation=Incarnation(int(flags["--incarnation"])),
            )
            return RunningRank(member=member, lease_id=int(flags["--lease-id"]), pid=pid)
        except (KeyError, ValueError):
            return None


class RankProcess:
    """One process, held by its pidfd: `fileno()` becomes readable when the process has exited."""

    def __init__(
        self, pid: int, child: subprocess.Popen[bytes] | None = None, *, is_forked: bool = False
    ) -> None:
        """`is_forked`: a fork server started it, as a child of this process. Raises OSError if
        there is no such process."""
        self.pid = pid
        self.is_forked = is_forked
        self._child = child
        self._stat = StatFile(pid)
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:
            self._stat.close()
            raise

    def fileno(self) -> int:
        return self._pidfd

    def exit_code(self) -> int | None:
        """The code of a process that has exited: negative for a signal, None if it was adopted."""
        if self._child is not None:
            return self._child.wait()
        return _wait_for(self._pidfd) if self.is_forked else None

    def read_dying(self) -> Dying | None:
        """Not None if the process has begun to exit, even before `fileno()` is readable."""
        return self._stat.read_dying()

    def poll_stopped(self) -> bool | None:
        """Whether the process was stopped (True) or continued (False) last, if either has happened
        since the last call; None otherwise, and always if it was adopted from an earlier agent."""
        if self._child is None and not self.is_forked:
            return None
        last: bool | None = None
        options = os.WSTOPPED | os.WCONTINUED | os.WNOHANG
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_PIDFD, self._pidfd, options)) is not None:
                last = found.si_code == os.CLD_STOPPED
        return last

    def set_cpu_affinity(self, cpus: frozenset[int]) -> None:
        """Applies to all its threads, and to those that they start later."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cpus)

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        os.close(self._pidfd)
        self._stat.close()


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    pass_fds: Sequence[int],
    log_path: Path | None,
    cpus: frozenset[int] = frozenset(),
) -> RankProcess:
    """Starts a process, pinned to `cpus` if there are any. It has a session of its own, so that a
    terminal's Ctrl-C reaches only the agent's parent, which stops everything in order. Raises
    OSError."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open_log(log_path)) if log_path is not None else None
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log or sys.stderr,
            stderr=log,
            env=dict(environment),
            pass_fds=[fd for fd in pass_fds if fd >= 0],
            start_new_session=True,
        )
    process = RankProcess(child.pid, child)
    if cpus:
        process.set_cpu_affinity(cpus)
    return process


def adopt_fork(pid: int, cpus: frozenset[int]) -> RankProcess:
    """A child of this process that a fork server has just started, pinned to `cpus` if there are
    any. Raises OSError."""
    process = RankProcess(pid, is_forked=True)
    if cpus:
        process.set_cpu_affinity(cpus)
    return process


def _wait_for(pidfd: int) -> int | None:
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def reap_orphans(own: Collection[int]) -> None:
    """Reaps the processes that became our children when their own parents died, for they would stay
    as zombies. Leaves the children in `own` alone."""
    with contextlib.suppress(ChildProcessError):
        look = os.WEXITED | os.WNOHANG
        while (found := os.waitid(os.P_ALL, 0, look | os.WNOWAIT)) and found.si_pid not in own:
            os.waitid(os.P_PID, found.si_pid, look)


def find_running(command: RankCommand) -> Iterator[tuple[RunningRank, RankProcess]]:
    """Ranks of this node that an earlier agent left running, newest incarnation first. It reads the
    process table, which also has ranks that have not registered yet."""
    found: list[tuple[RunningRank, RankProcess]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        process = _open(int(entry.name))
        if process is None:
            continue
        # Read after the pidfd is open, so that it belongs to the process that the pidfd holds.
        running_rank = command.running_rank_of(process.pid, command_line_of(process.pid))
        if running_rank is None or _has_exited(process):
            process.close()
        else:
            found.append((running_rank, process))
    found.sort(key=lambda pair: pair[0].member.incarnation, reverse=True)
    return iter(found)


def _open(pid: int) -> RankProcess | None:
    try:
        return RankProcess(pid)
    except OSError:
        return None


def command_line_of(pid: int) -> list[str]:
    """Empty for another user's process, so that it cannot pass for a rank by its arguments."""
    entry = Path(f"/proc/{pid}")
    try:
        if entry.stat().st_uid != os.geteuid():
            return []
        # A forked process has zeros behind its arguments.
        text = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
        return text.split("\0") if text else []
    except OSError:
        return []


def _has_exited(process: RankProcess) -> bool:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(0))
