"""What an agent tells of ranks that have no process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from node_agent.own_record import OwnRecord, why_it_ended
from node_agent.rank_supervisor import RankWait
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import AgentRecord
from shared.types import NodeId, RankId
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd


@pytest.fixture
def own() -> OwnRecord:
    clock = FakeClock()
    return OwnRecord(
        record=AgentRecord(node=NodeId("a"), pid=1, ranks=(RankId(3), RankId(4))),
        leased=LeasedKeys(MemoryEtcd(clock).client(), ttl_s=5.0),
        keys=Keys("i"),
        clock=clock,
    )


def told(own: OwnRecord) -> dict[int, tuple[float, str]]:
    wall = own.clock.wall()
    return {each.rank: (each.until - wall, each.why) for each in own.record.waiting}


def wait(own: OwnRecord, seconds: float, failures: int = 2) -> RankWait:
    return RankWait(until=own.clock.now() + seconds, failures=failures)


def test_a_rank_that_waits_is_told_until_it_has_registered(own: OwnRecord) -> None:
    own.on_waits(RankId(3), wait(own, 8.0), "no memory")
    own.on_waits(RankId(4), wait(own, 0.1, failures=1), "a single death")
    assert told(own) == {3: (pytest.approx(8.0, abs=0.1), "no memory")}
    own.on_gone(RankId(3))
    assert told(own) == {}


def test_a_rank_that_shall_not_run_here_any_more_waits_for_nothing(own: OwnRecord) -> None:
    for rank in (3, 4):
        own.on_waits(RankId(rank), wait(own, 8.0), "x" * 1000)
    own.on_wanted({RankId(4)})
    assert list(told(own)) == [4]
    assert len(told(own)[4][1]) == 300
    own.on_waits(RankId(4), None, "it was stopped")
    assert told(own) == {}


@pytest.mark.parametrize(
    ("exit_code", "log", "expected"),
    [
        (1, "a\nstarfish rank: /m/x.safetensors is truncated\n", "/m/x.safetensors is truncated"),
        (70, "starfish rank: of long ago\nTraceback …\nKeyError: 1\n", "exited with code 70; see "),
        (-signal.SIGKILL, "starfish rank: of long ago\n", "memory runs out"),
        (-signal.SIGSEGV, "starfish rank: of long ago\n", "killed by SIGSEGV; see "),
        (1, None, "exited with code 1"),
        (None, "", "its process exited"),
    ],
)
def test_why_a_process_has_ended(
    tmp_path: Path, exit_code: int | None, log: str | None, expected: str
) -> None:
    file = tmp_path / "rank-3.log"
    if log is not None:
        file.write_text(log)
    assert expected in why_it_ended(exit_code, file if log is not None else None)
