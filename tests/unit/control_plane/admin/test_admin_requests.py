"""What the admin API makes of requests that are repeated, coded or overtaken, and what it says of
ranks that are no more."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from control_plane.admin.admin_app import BODY_BYTES_MAX
from control_plane.desired_changes import Scale, StopRestart
from control_plane.known_requests import REQUESTS_MAX
from shared.codec import pack, unpack
from shared.desired_state import DesiredState
from shared.types import Member
from tests.support.admin_api import HEADERS, AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, member, state_of


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1), agent("b", 2, 3, ranks_max=8)), FakeClock())


@pytest_asyncio.fixture
async def client(control: FakeControl) -> AsyncIterator[AdminClient]:
    async with admin_api(control, FakeClock()) as found:
        yield found


def without_record(control: FakeControl, *members: Member) -> None:
    records = {m: r for m, r in control.state.records.items() if m not in members}
    control.state = replace(control.state, records=records)


# Repeated requests.

SCALE_DOWN = {"instruction": "scale_down", "params": {"removed_dp_ranks": [3]}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/drain", {"rank": 2}),
        ("/v1/drain", {"rank": 1, "grace_s": 5}),
        ("/v1/undrain", {"rank": 1}),
        ("/v1/pause", {}),
        ("/v1/fault_tolerance/apply", SCALE_DOWN),
        ("/v1/fault_tolerance/apply", {"instruction": "retry"}),
    ],
)
async def test_a_request_id_of_another_request_is_refused_and_says_so(
    client: AdminClient, control: FakeControl, path: str, body: Mapping[str, Any]
) -> None:
    await client.post("/v1/drain", {"rank": 1, "request_id": "r"})
    before = control.state.desired
    answer = await client.post(path, {**body, "request_id": "r"})
    assert answer.status == 409
    assert "the request_id 'r' was used before, for something else (by change 1)" in answer.message
    assert control.state.desired == before


async def test_what_is_so_already_and_what_was_seen_before_are_told_apart(
    client: AdminClient, control: FakeControl
) -> None:
    first = await client.post("/v1/scale", {"add": 1, "request_id": "a"})
    await client.post("/v1/scale", {"add": 2, "request_id": "b"})
    again = await client.post("/v1/scale", {"request_id": "a", "add": 1})
    assert (again.status, again.body["repeated"], again.body["changed"]) == (202, True, False)
    assert (again.body["change"], again.body["ranks"]) == (first.body["change"], 5)
    assert "taken before" in again.body["message"]
    await client.post("/v1/pause")
    same = await client.post("/v1/pause", {"request_id": "c"})
    assert (same.body["repeated"], same.body["changed"]) == (False, False)
    assert same.body["message"] == "nothing to change: it is so already"
    assert len(control.state.desired.ranks) == 7


async def test_requests_are_remembered_within_bounds_and_older_states_are_read(
    client: AdminClient, control: FakeControl
) -> None:
    older = DesiredState(requests=("old",), change=1)
    control.state = replace(control.state, desired=older)
    answer = await client.post("/v1/drain", {"rank": 1, "request_id": "old"})
    assert (answer.status, answer.body["repeated"]) == (202, True)
    for number in range(REQUESTS_MAX + 1):
        await client.post("/v1/pause", {"request_id": str(number)})
    desired = control.state.desired
    assert [each.request_id for each in desired.known] == list(desired.requests)
    assert (len(desired.known), desired.known[0].request_id) == (REQUESTS_MAX, "1")
    assert unpack(pack(desired), DesiredState) == desired


# Bodies.


def gzip_of(raw: bytes) -> bytes:
    """Without the time, which would give a test another name in each process of a parallel run."""
    return gzip.compress(raw, mtime=0)


@pytest.mark.parametrize(
    ("coding", "raw", "status", "said"),
    [
        ("gzip", b'{"rank": 1}', 400, "not gzip"),
        ("deflate", b'{"rank": 1}', 400, "not deflate"),
        ("br", b'{"rank": 1}', 415, "not supported"),
        ("gzip", gzip_of(b" " * (BODY_BYTES_MAX + 1)), 413, f"{BODY_BYTES_MAX} bytes"),
        ("", b" " * (BODY_BYTES_MAX + 1), 413, f"{BODY_BYTES_MAX} bytes"),
        ("gzip", gzip_of(b'{"rank": 1}'), 202, ""),
        ("identity", b'{"rank": 1}', 202, ""),
    ],
)
async def test_a_body_may_be_coded_within_limits(
    client: AdminClient, coding: str, raw: bytes, status: int, said: str
) -> None:
    headers = {**HEADERS, **({"Content-Encoding": coding} if coding else {})}
    answer = await client.ask("POST", "/v1/drain", raw, headers=headers)
    assert answer.status == status
    assert said in (answer.message if said else "")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b'"\xf3x"', id="no UTF-8"),
        pytest.param(b'{"\xf3x": 1}', id="a name that is no UTF-8"),
        pytest.param(b"1e999", id="beyond doubles"),
        pytest.param(b"1" * 5000, id="an integer of 5000 digits"),
        pytest.param(b"[" * 20_000 + b"]" * 20_000, id="deep"),
    ],
)
@pytest.mark.parametrize("instruction", [b"scale_down", b"retry"])
async def test_a_field_that_is_ignored_may_not_be_unreadable(
    client: AdminClient, control: FakeControl, value: bytes, instruction: bytes
) -> None:
    before = control.state.desired
    body = b'{"instruction": "%s", "params": {"removed_dp_ranks": [3], "later": %s}}'
    for path in ("/fault_tolerance/apply", "/v1/fault_tolerance/apply"):
        answer = await client.post(path, body % (instruction, value))
        assert (answer.status, answer.body["error"]["type"]) == (400, "invalid_request_error")
        assert "the body is not what is asked for here" in answer.message
    assert control.state.desired == before


async def test_the_description_says_which_bodies_may_be_left_out(client: AdminClient) -> None:
    paths = (await client.get("/openapi.json")).body["paths"]
    bodies = {
        path: each["post"]["requestBody"]
        for path, each in paths.items()
        if "post" in each and "requestBody" in each["post"]
    }
    optional = {path for path, body in bodies.items() if not body["required"]}
    assert optional == {"/v1/pause", "/v1/resume", "/v1/rebalance", "/v1/restart"}
    for path in optional:
        assert (await client.post(path)).status == 202
    for path in set(bodies) - optional:
        assert (await client.post(path)).status == 400


# What somebody else changed.


async def test_a_scale_that_another_one_overtakes_is_no_success(
    client: AdminClient, control: FakeControl
) -> None:
    asking = asyncio.create_task(client.post("/scale_elastic_ep", {"new_data_parallel_size": 6}))
    while len(control.state.desired.ranks) != 6:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await control.change(Scale(num_ranks=4))
    control.state = replace(
        control.state, desired=replace(control.state.desired, drains=())
    )  # those that were to come never did
    answer = await asking
    assert answer.status == 409
    assert "not scaled to 6 ranks: somebody has changed the plan" in answer.message
    assert "4 ranks shall exist" in answer.message


async def test_a_scale_waits_for_ranks_that_died_meanwhile(
    client: AdminClient, control: FakeControl
) -> None:
    """Whatever comes back by itself is no change in progress, but does not serve yet."""
    without_record(control, member(3))
    asking = asyncio.create_task(client.post("/scale_elastic_ep", {"new_data_parallel_size": 4}))
    await asyncio.sleep(0.4)
    assert not asking.done()
    control.state = state_of(agent("a", 0, 1), agent("b", 2, 3))
    answer = await asking
    assert (answer.status, answer.body) == (200, {"message": "Scaled to 4 data parallel engines"})


async def test_the_status_tells_of_a_restart_that_is_still_to_come(
    client: AdminClient, control: FakeControl
) -> None:
    await client.post("/v1/restart", {"ranks": [1, 2]})
    status = (await client.get("/v1/status")).body
    assert status["change"]["restart"] == [1, 2]
    assert [rank["process"] for rank in status["ranks"]] == [1, 1, 1, 1]
    await control.change(StopRestart())
    assert (await client.get("/v1/status")).body["change"]["restart"] == []


# Ranks that are no more.


async def test_members_without_a_process_are_dead_and_not_live(
    client: AdminClient, control: FakeControl
) -> None:
    without_record(control, member(1), member(3))
    await control.change(Scale(num_ranks=4))
    ranks = (await client.get("/v1/status")).body["ranks"]
    assert [rank["state"] for rank in ranks] == ["live", "dead", "live", "dead"]
    assert [rank["process"] for rank in ranks] == [1, None, 1, None]
    engines = (await client.get("/v1/fault_tolerance/status")).body["engines"]
    assert [engine["status"] for engine in engines] == ["healthy", "dead", "healthy", "dead"]
