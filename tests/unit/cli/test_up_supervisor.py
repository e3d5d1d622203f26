"""What `starfish up` reads in its children's logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.up.supervisor import Supervisor
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
