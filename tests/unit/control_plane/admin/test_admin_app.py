"""What the admin API answers: changes that are taken, repeated, refused and malformed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from shared.desired_state import AfterDrain
from shared.errors import StoreUnavailable
from shared.records import LeaderRecord
from shared.types import RankId
from shared.wire import Load
from tests.support.admin_api import HEADERS, AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, member, state_of


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def control(clock: FakeClock) -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1), agent("b", 2, 3, ranks_max=8)), clock)


@pytest_asyncio.fixture
async def client(control: FakeControl, clock: FakeClock) -> AsyncIterator[AdminClient]:
    async with admin_api(control, clock) as found:
        yield found


def load(running: int, waiting: int) -> Load:
    return Load(running=running, waiting=waiting, tokens=1, kv_blocks_free=1, kv_blocks=1)


async def test_a_drain_is_written_and_shown_until_the_rank_has_left(
    client: AdminClient, control: FakeControl, clock: FakeClock
) -> None:
    control.loads[member(2)] = load(3, 1)
    answer = await client.post("/v1/drain", {"rank": 2, "grace_s": 5, "request_id": "x"})
    assert (answer.status, answer.body["changed"], answer.body["request_id"]) == (202, True, "x")
    drain = control.state.desired.drain_of(RankId(2))
    assert drain is not None
    assert (drain.grace_s, drain.after, drain.requested_at) == (5, AfterDrain.STAY, clock.wall())

    status = (await client.get("/v1/status")).body
    rank = status["ranks"][2]
    assert (rank["state"], rank["sessions_left"], rank["in_map"]) == ("draining", 4, True)
    assert not rank["safe_to_terminate"]
    assert status["change"]["in_progress"]
    (step,) = status["change"]["steps"]
    assert (step["kind"], step["rank"]) == ("drain", 2)
    assert "4 sessions left, which may finish there for 5 s" in step["text"]
    clock.advance(6)
    (step,) = (await client.get("/v1/status")).body["change"]["steps"]
    assert "4 sessions left, which move to other ranks" in step["text"]

    control.leave_map(2)
    status = (await client.get("/v1/status")).body
    rank = status["ranks"][2]
    assert (rank["state"], rank["safe_to_terminate"]) == ("drained", True)
    assert status["change"] == {"number": 1, "in_progress": False, "steps": [], "restart": []}
    assert [r["state"] for r in status["ranks"]] == ["live", "live", "drained", "live"]

    assert (await client.post("/v1/undrain", {"rank": 2})).status == 202
    status = (await client.get("/v1/status")).body
    (step,) = status["change"]["steps"]
    assert (step["kind"], step["rank"]) == ("join", 2)
    assert not status["ranks"][2]["safe_to_terminate"]


async def test_the_same_request_id_again_changes_nothing(
    client: AdminClient, control: FakeControl
) -> None:
    first = await client.post("/v1/scale", {"add": 1, "request_id": "once"})
    again = await client.post("/v1/scale", {"add": 1, "request_id": "once"})
    assert (first.status, again.status) == (202, 202)
    assert (first.body["changed"], again.body["changed"]) == (True, False)
    assert again.body["change"] == first.body["change"] == 1
    assert len(control.state.desired.ranks) == 5


async def test_without_a_request_id_the_answer_has_one(client: AdminClient) -> None:
    answer = await client.post("/v1/pause")
    assert answer.body["request_id"]
    repeated = await client.post("/v1/pause", {"request_id": answer.body["request_id"]})
    assert not repeated.body["changed"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/drain", {"ranks": [0, 1, 2, 3]}, "no other rank serves; add ranks first"),
        ("/v1/drain", {"ranks": [0, 1, 2]}, "1 more rank of 3 slots must serve"),
        ("/v1/drain", {"ranks": [0, 1, 2, 3]}, "let 2 of these stay"),
        ("/v1/drain", {"rank": 9}, "rank 9 does not exist; this instance has ranks 0-3"),
        ("/v1/drain", {"ranks": [1, 7, 9]}, "ranks 7, 9 do not exist"),
        ("/v1/drain", {"node": "c"}, "no rank runs on node 'c'"),
        ("/v1/scale", {"ranks": 1}, "1 more rank of 3 slots must serve"),
        ("/v1/replace", {"rank": 1, "node": "c"}, "start a node agent there"),
        ("/v1/restart", {"ranks": [7]}, "rank 7 does not exist"),
        ("/scale_elastic_ep", {"new_ep_size": 1}, "1 more rank of 3 slots must serve"),
        (
            "/v1/fault_tolerance/apply",
            {
                "instruction": "scale_down",
                "request_id": "r",
                "params": {"removed_dp_ranks": [0, 1, 2]},
            },
            "1 more rank of 3 slots must serve",
        ),
    ],
)
async def test_what_cannot_be_is_refused_and_says_what_would_be_needed(
    client: AdminClient, control: FakeControl, path: str, body: dict[str, Any], said: str
) -> None:
    before = control.state.desired
    answer = await client.post(path, body)
    assert (answer.status, answer.body["error"]["type"]) == (409, "refused")
    assert said in answer.message
    assert control.state.desired == before


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/drain", {}, "one of rank, ranks and node"),
        ("/v1/drain", {"rank": 1, "node": "a"}, "one of rank, ranks and node"),
        ("/v1/drain", {"rank": -1}, "`$.rank`"),
        ("/v1/drain", {"rank": "1"}, "`$.rank`"),
        ("/v1/drain", {"rank": 1, "grace_s": -1}, "`$.grace_s`"),
        ("/v1/drain", {"rank": 1, "grace": 1}, "unknown field `grace`"),
        ("/v1/drain", b"{", "truncated"),
        ("/v1/drain", [], "object"),
        ("/v1/scale", {}, "one of ranks, add, add_ranks and remove"),
        ("/v1/scale", {"ranks": 3, "add": 1}, "one of ranks, add, add_ranks and remove"),
        ("/v1/scale", {"remove": [1], "node": "a"}, "node is for ranks that come"),
        ("/v1/scale", {"ranks": 0}, "`$.ranks`"),
        ("/v1/restart", {"rolling": False}, "rolling"),
        ("/v1/restart", {"stop": True, "ranks": [1]}, "leave ranks out"),
        ("/v1/restart", {"ranks": []}, "ranks names none"),
        ("/v1/pause", {"request_id": "a b"}, "`$.request_id`"),
        ("/scale_elastic_ep", {}, "new_data_parallel_size"),
        ("/scale_elastic_ep", {"new_data_parallel_size": 0}, "new_data_parallel_size"),
        ("/scale_elastic_ep", {"new_data_parallel_size": 3, "drain_timeout": 0}, "drain_timeout"),
        ("/fault_tolerance/apply", {"instruction": "retry", "request_id": "a b"}, "request_id"),
        ("/v1/fault_tolerance/apply", {"instruction": "fly", "request_id": "1"}, "scale_down"),
        (
            "/v1/fault_tolerance/apply",
            {"instruction": "scale_down", "request_id": "1"},
            "removed_dp_ranks",
        ),
    ],
)
async def test_what_is_malformed_is_named(
    client: AdminClient, control: FakeControl, path: str, body: Any, said: str
) -> None:
    before = control.state.desired
    answer = await client.post(path, body)
    assert (answer.status, answer.body["error"]["type"]) == (400, "invalid_request_error")
    assert said in answer.message
    assert control.state.desired == before


async def test_a_path_that_is_none_says_where_the_paths_stand(client: AdminClient) -> None:
    answer = await client.post("/v1/nothing", {})
    assert answer.status == 404
    assert "/openapi.json" in answer.message


async def test_scale_says_which_ranks_come_and_go(
    client: AdminClient, control: FakeControl
) -> None:
    assert (await client.post("/v1/scale", {"ranks": 6, "node": "b"})).status == 202
    desired = control.state.desired
    assert [(d.rank, d.node) for d in desired.ranks[4:]] == [(4, "b"), (5, "b")]
    texts = [s["text"] for s in (await client.get("/v1/status")).body["change"]["steps"]]
    assert texts == [
        "rank 4 has not registered yet (on b)",
        "rank 5 has not registered yet (on b)",
    ]
    assert (await client.post("/v1/scale", {"remove": [1]})).status == 202
    desired = control.state.desired
    assert [d.rank for d in desired.ranks] == [0, 2, 3, 4, 5]
    drain = desired.drain_of(RankId(1))
    assert drain is not None
    assert drain.after is AfterDrain.LEAVE


async def test_a_rolling_restart_is_shown_and_can_be_stopped(
    client: AdminClient, control: FakeControl
) -> None:
    assert (await client.post("/v1/restart", {"rolling": True})).status == 202
    steps = (await client.get("/v1/status")).body["change"]["steps"]
    assert [(s["kind"], s["rank"]) for s in steps] == [("restart", rank) for rank in range(4)]
    assert (await client.post("/v1/restart", {"stop": True})).status == 202
    assert control.state.desired.restart is None
    assert not (await client.get("/v1/status")).body["change"]["in_progress"]


async def test_pause_resume_and_rebalance(client: AdminClient, control: FakeControl) -> None:
    await client.post("/v1/pause")
    assert (await client.get("/v1/status")).body["verdicts_paused"]
    await client.post("/v1/resume")
    assert not (await client.get("/v1/status")).body["verdicts_paused"]
    await client.post("/v1/rebalance")
    assert control.state.desired.rebalances == 1


async def test_as_sglang_scales(client: AdminClient, control: FakeControl) -> None:
    idle = await client.get("/is_scaling_elastic_ep")
    assert idle.body == {
        "is_scaling_elastic_ep": False,
        "effective_ep_size": 4,
        "pending_ep_size": None,
        "scale_phase": "idle",
        "last_error": None,
    }
    answer = await client.post("/scale_elastic_ep", {"new_ep_size": 3})
    assert (answer.status, answer.body["old_ep_size"], answer.body["new_ep_size"]) == (200, 4, 3)
    going = (await client.post("/is_scaling_elastic_ep")).body
    assert going["is_scaling_elastic_ep"]
    assert (going["pending_ep_size"], going["scale_phase"]) == (3, "draining")
    control.leave_map(3)
    desired = control.state.desired.without_drain(RankId(3))
    records = {m: r for m, r in control.state.records.items() if m.rank != 3}
    control.state = replace(control.state, desired=desired, records=records)
    done = (await client.get("/is_scaling_elastic_ep")).body
    assert not done["is_scaling_elastic_ep"]
    assert (done["effective_ep_size"], done["scale_phase"]) == (3, "serving_shrunk")


async def test_as_vllm_scales(client: AdminClient, control: FakeControl) -> None:
    """Nothing to do, so the answer comes at once; a field that is not known does no harm."""
    body = {"new_data_parallel_size": 4, "drain_timeout": 7, "other": 1}
    answer = await client.post("/scale_elastic_ep", body)
    assert answer.status == 200
    assert answer.body == {"message": "Scaled to 4 data parallel engines"}


async def test_as_vllm_tells_of_faults_and_applies(
    client: AdminClient, control: FakeControl
) -> None:
    body = {
        "instruction": "scale_down",
        "request_id": "ft-1",
        "params": {"removed_dp_ranks": [1]},
    }
    for _ in range(2):
        answer = await client.post("/v1/fault_tolerance/apply", body)
        assert (answer.status, answer.body["request_id"]) == (202, "ft-1")
    assert control.state.desired.change == 1
    assert [each.rank for each in control.state.desired.ranks] == [0, 2, 3]
    control.leave_map(1)
    status = (await client.get("/v1/fault_tolerance/status")).body
    assert (status["schema_version"], status["total_engines"]) == (1, 4)
    assert [(e["id"], e["status"]) for e in status["engines"]] == [
        (0, "healthy"),
        (1, "unhealthy"),
        (2, "healthy"),
        (3, "healthy"),
    ]
    assert status["engines"][1]["safe_to_terminate"]
    retry = await client.post(
        "/v1/fault_tolerance/apply", {"instruction": "retry", "request_id": "2"}
    )
    assert retry.status == 202
    assert "nothing to do" in retry.body["message"]


async def test_fault_tolerance_is_also_where_newer_releases_of_vllm_have_it(
    client: AdminClient, control: FakeControl
) -> None:
    body = {"instruction": "scale_down", "params": {"removed_dp_ranks": [1]}}
    answer = await client.post("/fault_tolerance/apply", body)
    assert answer.status == 202
    assert answer.body["request_id"]
    assert [each.rank for each in control.state.desired.ranks] == [0, 2, 3]
    new, old = [await client.get(f"{p}/fault_tolerance/status") for p in ("", "/v1")]
    assert new.body == old.body
    assert new.body["total_engines"] == 4


async def test_etcd_that_does_not_answer_is_503_and_the_same_request_may_be_repeated(
    client: AdminClient, control: FakeControl
) -> None:
    control.errors = [StoreUnavailable("etcd did not answer")]
    body = {"rank": 1, "request_id": "r"}
    answer = await client.post("/v1/drain", body)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert (await client.post("/v1/drain", body)).body["changed"]


async def test_a_standby_passes_on_to_the_leader_and_nobody_in_a_circle(
    client: AdminClient, control: FakeControl, clock: FakeClock
) -> None:
    standby = FakeControl(control.state, clock)
    standby.leads = False
    async with admin_api(standby, clock) as other:
        assert (await other.post("/v1/drain", {"rank": 1})).status == 503
        assert (await other.get("/v1/status")).body["leader"] is None
        leader = LeaderRecord(control_plane="a", pid=1, term=1, since=0.0, admin_url=client.url)
        standby.state = replace(standby.state, leader=leader)
        answer = await other.post("/v1/drain", {"rank": 1, "request_id": "p"})
        assert (answer.status, answer.body["request_id"]) == (202, "p")
        assert control.state.desired.drain_of(RankId(1)) is not None
        assert standby.state.desired.drain_of(RankId(1)) is None
        refused = await other.post("/v1/drain", {"rank": 9})
        assert (refused.status, refused.message) == (
            409,
            "rank 9 does not exist; this instance has ranks 0-3",
        )
        control.errors = [StoreUnavailable("etcd did not answer")]
        later = await other.post("/v1/drain", {"rank": 0})
        assert (later.status, later.headers["Retry-After"]) == (503, "1")
        wrong = await other.get("/v1/drain")
        assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
        # Each believes that the other leads.
        control.leads = False
        back = replace(leader, admin_url=other.url)
        control.state = replace(control.state, leader=back)
        assert (await other.post("/v1/drain", {"rank": 1})).status == 503


async def test_a_leader_that_is_gone_is_503_but_the_status_is_still_told(
    client: AdminClient, control: FakeControl
) -> None:
    control.leads = False
    gone = LeaderRecord(control_plane="a", pid=1, term=1, since=0.0, admin_url="http://127.0.0.1:9")
    control.state = replace(control.state, leader=gone)
    answer = await client.post("/v1/drain", {"rank": 1})
    assert (answer.status, "does not answer" in answer.message) == (503, True)
    assert (await client.get("/v1/status")).status == 200


async def test_a_leader_that_is_lost_while_it_is_asked_is_503_at_once(
    client: AdminClient, control: FakeControl
) -> None:
    """As one that is stopped: it takes the connection, and says nothing. A standby leads then, be
    it another one or the one that passed the request on."""
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(await reader.readline())
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        lost = LeaderRecord(control_plane="a", pid=1, term=1, since=0.0, admin_url=url)
        next_one = replace(lost, control_plane="b", term=2, admin_url="http://127.0.0.1:9")
        for leads, leader in ((False, next_one), (False, None), (True, next_one)):
            control.leads, control.state = False, replace(control.state, leader=lost)
            change = asyncio.create_task(client.post("/v1/drain", {"rank": 1, "request_id": "a"}))
            status = asyncio.create_task(client.get("/v1/status"))
            for _ in range(2):
                await asked.get()
            control.leads, control.state = leads, replace(control.state, leader=leader)
            answer = await change
            assert (answer.status, "was lost" in answer.message) == (503, True)
            assert (await status).status == 200


async def test_the_description_names_every_path_and_the_types_of_its_bodies(
    client: AdminClient,
) -> None:
    document = (await client.get("/openapi.json")).body
    assert document["openapi"] == "3.1.0"
    paths = document["paths"]
    assert {"/v1/status", "/v1/scale", "/scale_elastic_ep", "/v1/fault_tolerance/apply"} < set(
        paths
    )
    scale = paths["/v1/scale"]["post"]
    assert {"202", "400", "401", "409", "503"} < set(scale["responses"])
    name = scale["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    fields = document["components"]["schemas"][name]["properties"]
    wanted = {"ranks", "add", "add_ranks", "remove", "node", "grace_s", "request_id"}
    assert wanted == set(fields)
    status = paths["/v1/status"]["get"]["responses"]["200"]["content"]["application/json"]
    assert status["schema"]["$ref"].endswith("StatusAnswer")


async def test_unknown_paths_and_methods_are_errors_of_the_same_shape(client: AdminClient) -> None:
    assert (await client.get("/v1/nothing")).status == 404
    answer = await client.get("/v1/drain")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert answer.body["error"]["type"] == "invalid_request_error"
    large = await client.post("/v1/drain", b" " * (65 << 10))
    assert large.status == 413
    assert HEADERS["Authorization"][7:] not in large.message
