"""The commands against an admin API: what they print, and with which code they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cli.admin.follow import EXIT_FAILED, EXIT_REFUSED, EXIT_TIMEOUT, Manner, Wish, carry_out
from cli.admin.goals import drained
from cli.run_dir import Target
from shared.clock import SystemClock
from shared.desired_state import DesiredState
from shared.errors import ConfigError, StoreUnavailable
from shared.etcd_options import EtcdOptions
from shared.secret import write_private_file
from shared.types import RankId
from tests.support.admin_api import TOKEN, AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, state_of

CLOCK = SystemClock()
WAITING = Manner(waits=True, timeout_s=0.0, as_json=False)


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1), agent("b", 2, 3)), FakeClock())


@pytest_asyncio.fixture
async def api(control: FakeControl) -> AsyncIterator[AdminClient]:
    async with admin_api(control, FakeClock()) as found:
        yield found


@pytest.fixture
def target(api: AdminClient, tmp_path: Path) -> Target:
    file = tmp_path / "token"
    write_private_file(file, TOKEN)
    return Target(
        store=EtcdOptions(etcd="none:1"), instance="t", admin_url=api.url, admin_token_file=file
    )


def drain(*ranks: int, undo: str = "") -> Wish:
    goal = drained(lambda rank: rank.rank in ranks, "it")
    return Wish(name="drain", fields={"ranks": ranks, "grace_s": 7}, goal=goal, undo=undo)


def last_line(text: str) -> str:
    """The control plane, which is in this process, logs to the same place."""
    return text.splitlines()[-1]


async def told(control: FakeControl, rank: int) -> None:
    while control.state.desired.drain_of(RankId(rank)) is None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def it_waits(following: asyncio.Task[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Until it has said what it waits for: only then has it read the answer to its request."""
    shown = ""
    while "rank 2 has sessions left" not in shown:
        assert not following.done()
        await asyncio.sleep(0.01)
        shown += capsys.readouterr().err


async def test_it_waits_until_the_change_is_done(
    target: Target, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    following = asyncio.create_task(carry_out(target, drain(2), WAITING, CLOCK))
    await it_waits(following, capsys)
    control.leave_map(2)
    assert await following == 0
    assert last_line(capsys.readouterr().out) == "it is drained, and safe to terminate"


async def test_it_need_not_wait(
    target: Target, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await carry_out(target, drain(2), replace(WAITING, waits=False), CLOCK) == 0
    assert control.state.desired.drain_of(RankId(2)) is not None
    assert "accepted" in capsys.readouterr().out


async def test_a_refusal_says_why_and_has_a_code_of_its_own(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    manner = replace(WAITING, as_json=True)
    assert await carry_out(target, drain(0, 1, 2), manner, CLOCK) == EXIT_REFUSED
    said = capsys.readouterr()
    assert "1 more rank of 3 slots must serve" in json.loads(last_line(said.out))["refused"]
    assert said.err.startswith("starfish: refused: ")


async def test_a_time_limit_ends_the_wait_and_not_the_change(
    target: Target, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    manner = replace(WAITING, timeout_s=0.1, as_json=True)
    assert await carry_out(target, drain(2), manner, CLOCK) == EXIT_TIMEOUT
    answer = json.loads(last_line(capsys.readouterr().out))
    assert not answer["done"]
    assert "goes on: rank 2 has sessions left" in answer["result"]
    assert control.state.desired.drain_of(RankId(2)) is not None


async def test_somebody_who_undoes_it_meanwhile_is_a_failure(
    target: Target, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    following = asyncio.create_task(carry_out(target, drain(2), WAITING, CLOCK))
    await told(control, 2)
    control.state = replace(control.state, desired=DesiredState(change=2))
    assert await following == EXIT_FAILED
    assert "somebody undrained it" in capsys.readouterr().err


async def test_an_interrupt_says_that_the_change_goes_on(
    target: Target, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = drain(2, undo="starfish undrain 2")
    following = asyncio.create_task(carry_out(target, wish, WAITING, CLOCK))
    await it_waits(following, capsys)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    said = " ".join(capsys.readouterr().err.split())
    assert "the change goes on without this command" in said
    assert "`starfish undrain 2` takes it back" in said


async def test_without_a_leader_the_same_request_is_sent_again(
    target: Target, control: FakeControl
) -> None:
    control.errors = [StoreUnavailable("etcd did not answer")] * 2
    assert await carry_out(target, drain(2), replace(WAITING, waits=False), CLOCK) == 0
    assert control.errors == []
    assert control.state.desired.change == 1


async def test_a_control_plane_that_is_away_for_a_while_ends_no_wait(
    target: Target, control: FakeControl
) -> None:
    following = asyncio.create_task(carry_out(target, drain(2), WAITING, CLOCK))
    await told(control, 2)
    state = control.state
    control.state = replace(state, desired=DesiredState())  # one that has not heard of it yet
    await asyncio.sleep(0.6)
    assert not following.done()
    control.state = state
    control.leave_map(2)
    assert await following == 0


@pytest.mark.parametrize("token", [None, b"x" * 64])
async def test_without_the_right_token_it_says_what_to_pass(
    target: Target, tmp_path: Path, token: bytes | None
) -> None:
    file: Any = None
    if token is not None:
        file = tmp_path / "wrong"
        write_private_file(file, token)
    with pytest.raises(ConfigError, match=r"admin token|--admin-token-file"):
        await carry_out(replace(target, admin_token_file=file), drain(2), WAITING, CLOCK)
