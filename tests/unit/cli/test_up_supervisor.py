"""What `starfish up` reads in its children's logs, and says of their ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from cli.up.services import Service
from cli.up.supervisor import Supervisor
from shared.errors import Unavailable
from tests.support.fake_clock import FakeClock

_PREPARES = "2026-11-30 [info     ] fork_server_prepares     done=3 node=vm service=agent total=8\n"
_READY = "2026-11-30 [info     ] fork_server_ready        node=vm pid=5443 service=agent\n"


async def _revokes_nothing(pid: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (None, None),
        ("", None),
        (_PREPARES, "loading kernels, 20 %"),
        (_PREPARES + _READY, None),
        (_PREPARES + _READY + _PREPARES, "loading kernels, 20 %"),
    ],
)
def test_progress_of_the_preparation(tmp_path: Path, log: str | None, expected: str | None) -> None:
    if log is not None:
        (tmp_path / "agent.log").write_text(log)
    supervisor = Supervisor(
        tmp_path,
        FakeClock(),
        run="",
        warn=lambda text: None,
        revoke_leadership=_revokes_nothing,
    )
    assert supervisor.preparation() == expected
    supervisor.close_lifeline()


@pytest.mark.parametrize(
    ("last_act", "message"),
    [
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", "agent was killed by SIGKILL"),
        ("sys.exit('starfish agent: no such etcd')", "no such etcd"),
        ("sys.exit('all is well')", "agent exited: all is well"),
    ],
)
async def test_how_a_child_ended(tmp_path: Path, last_act: str, message: str) -> None:
    """The last line of a killed one's log is not the reason of its end."""
    supervisor = Supervisor(
        tmp_path,
        FakeClock(),
        run="",
        warn=lambda text: None,
        revoke_leadership=_revokes_nothing,
    )
    program = f"import os, sys; print('rank_started', flush=True); {last_act}"
    service = Service(name="agent", argv=(sys.executable, "-c", program), stop_timeout_s=1.0)
    await supervisor.start(service)
    async with asyncio.timeout(30):
        while not supervisor.has_exited(service):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable) as raised:
        supervisor.require_alive(service)
    assert str(raised.value) == message
    supervisor.close_lifeline()
