"""What `starfish up` reads in its children's logs, and says of their ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from cli.up.services import Service, Standby
from cli.up.supervisor import Supervisor
from shared.errors import Unavailable
from tests.support.fake_clock import FakeClock

_PREPARES = "2026-11-30 [info     ] fork_server_prepares     done=3 node=vm service=agent total=8\n"
_READY = "2026-11-30 [info     ] fork_server_ready        node=vm pid=5443 service=agent\n"


async def _revokes_nothing(pid: int) -> bool:
    return False


def _supervisor(folder: Path) -> Supervisor:
    """It says nothing, and there is no leader."""
    return Supervisor(
        folder,
        FakeClock(),
        run="",
        warn=lambda text: None,
        revoke_leadership=_revokes_nothing,
    )


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
    supervisor = _supervisor(tmp_path)
    assert supervisor.preparation() == expected
    supervisor.close_lifeline()


_CAPTURES = "2026-11-30 [info     ] captures_graphs          done=3 rank=1 service=rank total=14\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (None, None),
        (_CAPTURES.replace("=3", "=2") + _CAPTURES, "rank-1 compiles kernels, 3 of 14 graphs"),
        (_CAPTURES + "2026-11-30 [info     ] graphs_captured         seconds=31.2\n", None),
        (_CAPTURES + "… rank_crashed\n", None),
        (_CAPTURES + "starfish rank: the card has no room\n", None),
    ],
)
def test_progress_of_a_ranks_graphs(tmp_path: Path, log: str | None, expected: str | None) -> None:
    if log is not None:
        (tmp_path / "rank-1.log").write_text(log)
    supervisor = _supervisor(tmp_path)
    assert supervisor.capture("rank-1") == expected
    supervisor.close_lifeline()


_CRASH = (
    "2026-11-30 [error    ] rank_crashed             rank=1 service=rank\n"
    "Traceback (most recent call last):\n"
    '  File "a.py", line 7, in run\n'
    "    dispatch()\n"
    "RuntimeError: Failed: Assertion error b.cpp:204 'hidden % 128 == 0'\n"
)
_WHY = "RuntimeError: Failed: Assertion error b.cpp:204 'hidden % 128 == 0'"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (None, None),
        ("2026-11-30 [info     ] rank_started\n", None),
        (_CRASH, f"rank-1 crashed once: {_WHY}"),
        (_CRASH * 3 + "2026-11-30 [info     ] rank_started\n", f"rank-1 crashed 3 times: {_WHY}"),
        ("… rank_crashed\n", "rank-1 crashed once: for an unknown reason"),
    ],
)
def test_a_rank_that_crashes_again_and_again_is_told(
    tmp_path: Path, log: str | None, expected: str | None
) -> None:
    if log is not None:
        (tmp_path / "rank-1.log").write_text(log)
    supervisor = _supervisor(tmp_path)
    place = f"; see {tmp_path / 'rank-1.log'}"
    assert supervisor.crashes("rank-1") == (None if expected is None else expected + place)
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
    supervisor = _supervisor(tmp_path)
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


_STANDBY = """
import os, sys, time
words = os.read(int(sys.argv[1]), 100)
open(words.decode().split(chr(0))[0], "w").write(str(os.getpid()))
time.sleep(60)
"""


_SERVICE = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


async def pid_in(file: Path) -> int:
    async with asyncio.timeout(30):
        while not (file.exists() and file.read_text().strip()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return int(file.read_text())


async def test_a_standby_takes_over_before_etcd_is_asked_who_led(tmp_path: Path) -> None:
    """etcd may be away, and clients wait."""

    async def never(pid: int) -> bool:
        await asyncio.Event().wait()
        return False

    warnings: list[str] = []
    supervisor = Supervisor(
        tmp_path, FakeClock(), run="", warn=warnings.append, revoke_leadership=never
    )
    took_over = tmp_path / "took-over"
    standby = Standby(
        name="s", program=(sys.executable, "-c", _STANDBY), arguments=(), inherited_fds=()
    )
    service = Service(
        name="gateway",
        argv=(sys.executable, "-c", _SERVICE),
        stop_timeout_s=1.0,
        standby="s",
        standby_word=str(took_over),
    )
    await supervisor.start_standby(standby)
    await supervisor.start(service)
    supervising = asyncio.create_task(supervisor.supervise(service))
    os.kill(await pid_in(tmp_path / "gateway.log"), signal.SIGKILL)
    successor = await pid_in(took_over)
    assert warnings == ["gateway was killed by SIGKILL; its standby is gateway now"]
    assert not supervisor.has_exited(service)
    supervising.cancel()
    await asyncio.gather(supervising, return_exceptions=True)
    os.kill(successor, signal.SIGKILL)
    await supervisor.stop(service)
    supervisor.close_lifeline()


_DRAINING = """
import os, signal, sys, time
from pathlib import Path
name, fd = sys.argv[1], int(sys.argv[sys.argv.index("--handover-fd") + 1])
def drain(*_):
    try:
        os.write(fd, b"1\\n")
        taken = "taken over"
    except BrokenPipeError:
        taken = "alone"
    Path(name + "-drains").write_text(taken)
    while not (Path(sys.argv[2]) / "end").exists():
        time.sleep(0.01)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print(os.getpid(), flush=True)
while True:
    time.sleep(1)
"""


async def test_services_that_stop_together_drain_together_and_nobody_takes_over(
    tmp_path: Path,
) -> None:
    supervisor = _supervisor(tmp_path)
    gateways = [
        Service(
            name=f"gateway-{number}",
            argv=(
                *(sys.executable, "-c", _DRAINING),
                *(str(tmp_path / f"gateway-{number}"), str(tmp_path)),
            ),
            stop_timeout_s=30.0,
            standby="s",
        )
        for number in range(2)
    ]
    for service in gateways:
        await supervisor.start(service)
        await pid_in(tmp_path / f"{service.name}.log")
    stopping = asyncio.create_task(supervisor.stop(*gateways))
    for service in gateways:  # the other one has not ended
        async with asyncio.timeout(20):
            while not (said := tmp_path / f"{service.name}-drains").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert not stopping.done()
    (tmp_path / "end").touch()
    await stopping
    assert all(map(supervisor.has_exited, gateways))
    assert said.read_text() == "alone"
    supervisor.close_lifeline()
