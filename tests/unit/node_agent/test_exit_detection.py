"""A process that has begun to exit is recognised, and no other process is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.exit_detection import Dying, StatFile, parse_dying
from node_agent.rank_process import RankProcess, spawn

LARGE = """
import os, signal
# Not pause(): a signal that comes just before it would be waited for without end.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
held = bytearray(b"x") * (500 << 20)
print("there", flush=True)
signal.sigwait({signal.SIGTERM})
os._exit(75)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def large(tmp_path: Path) -> Iterator[RankProcess]:
    """A process whose memory takes the kernel a while to free."""
    log_path = tmp_path / "log"
    argv = [sys.executable, "-c", LARGE]
    process = spawn(argv, environment=os.environ, pass_fds=(), log_path=log_path)
    while b"there" not in log_path.read_bytes():
        assert process.read_dying() is None
    yield process
    process.close()


def first_sign(process: RankProcess) -> Dying:
    while (seen := process.read_dying()) is None:
        pass
    return seen


def stat_line(*, state: str = "S", flags: int = 0, pending: int = 0, status: int = 0) -> bytes:
    """The name of the command imitates the rest of the line."""
    fields = ["0"] * 50
    fields[0], fields[6], fields[28], fields[49] = state, str(flags), str(pending), str(status)
    return b"42 (a) Z 1 (b) " + " ".join(fields).encode() + b"\n"


def seen(pid: int) -> Dying | None:
    stat = StatFile(pid)
    try:
        return stat.read_dying()
    finally:
        stat.close()


def test_a_running_process_is_not_dying(child: subprocess.Popen[bytes]) -> None:
    assert seen(child.pid) is None
    assert seen(os.getpid()) is None


def test_a_stopped_process_is_not_dying(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert seen(child.pid) is None


def test_a_killed_process_is_dying_before_anybody_has_waited_for_it(
    child: subprocess.Popen[bytes],
) -> None:
    stat = StatFile(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    child.kill()
    # For a moment, between taking the signal and beginning to exit, the kernel shows neither.
    while stat.read_dying() is None:
        pass
    assert seen(child.pid) is not None
    child.wait()
    assert stat.read_dying() == Dying(exit_code=None)
    with pytest.raises(FileNotFoundError):
        StatFile(child.pid)
    stat.close()


def test_a_large_process_that_is_killed_tells_by_what_or_nothing(large: RankProcess) -> None:
    large.send_signal(signal.SIGKILL)
    assert first_sign(large).exit_code in (-signal.SIGKILL, None)
    assert large.exit_code() == -signal.SIGKILL
    assert large.read_dying() == Dying(exit_code=None)


def test_a_large_process_that_leaves_by_itself_tells_its_code_or_nothing(
    large: RankProcess,
) -> None:
    large.send_signal(signal.SIGTERM)
    assert first_sign(large).exit_code in (75, None)
    assert large.exit_code() == 75


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (stat_line(), None),
        (stat_line(state="T"), None),
        (stat_line(pending=1 << (signal.SIGTERM - 1)), None),
        (stat_line(pending=1 << (signal.SIGKILL - 1)), Dying(exit_code=-9)),
        (stat_line(flags=0x4), Dying(exit_code=None)),
        (stat_line(state="D", flags=0x404, status=9), Dying(exit_code=-9)),
        (stat_line(state="Z", flags=0x4, status=75 << 8), Dying(exit_code=75)),
        (stat_line(state="Z", flags=0x4, status=0x80 | 11), Dying(exit_code=-11)),
    ],
)
def test_what_a_line_says(line: bytes, seen: Dying | None) -> None:
    assert parse_dying(line) == seen
