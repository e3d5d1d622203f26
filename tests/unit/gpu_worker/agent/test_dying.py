"""A process that has begun to die is known by it, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from gpu_worker.agent.dying import is_dying


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_running_process_is_not_dying(child: subprocess.Popen[bytes]) -> None:
    assert not is_dying(child.pid)
    assert not is_dying(os.getpid())


def test_a_stopped_process_is_not_dying(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert not is_dying(child.pid)


def test_a_killed_process_is_dying_before_anybody_has_waited_for_it(
    child: subprocess.Popen[bytes],
) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    child.kill()
    # Whatever the kernel has done of its work by now: the signal pends, or it exits, or it is gone.
    assert is_dying(child.pid)
    child.wait()
    assert is_dying(child.pid)
