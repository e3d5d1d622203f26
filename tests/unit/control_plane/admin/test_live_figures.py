"""What the page shows of experts and of clients, and the kill that it may offer."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web

from control_plane.admin.client_figures import gateways_of
from control_plane.admin.experts import experts_of
from shared.errors import StoreUnavailable
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import GatewayRecord, pack_record
from shared.types import Epoch
from tests.support.admin_api import FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd
from tests.unit.control_plane.desired import agent, member, state_of

CLOCK = FakeClock()


def control() -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1)), CLOCK)


def gateway(name: str, port: int) -> GatewayRecord:
    return GatewayRecord(gateway=name, pid=1, host="127.0.0.1", port=port)


def metrics(tokens: dict[str, int], gaps: dict[str, int]) -> str:
    lines = [f'vllm:generation_tokens_total{{engine="{e}"}} {n}' for e, n in tokens.items()]
    name = "starfish_gateway_inter_token_seconds_bucket"
    lines += [f'{name}{{le="{bound}"}} {n}.0' for bound, n in gaps.items()]
    return "\n".join(["# HELP something else", *lines, "python_gc_objects 3"])


@asynccontextmanager
async def gateways(*texts: str | int) -> AsyncIterator[list[GatewayRecord]]:
    """One for each: what it answers to /metrics, or with which status it refuses."""
    runners, records = [], []
    for number, text in enumerate(texts):

        async def answer(request: web.Request, text: str | int = text) -> web.Response:
            return web.Response(status=text) if isinstance(text, int) else web.Response(text=text)

        app = web.Application()
        app.router.add_get("/metrics", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        records.append(gateway(f"g{number}", runner.addresses[0][1]))
    yield records
    for runner in runners:
        await runner.cleanup()


async def test_clients_are_what_all_gateways_count() -> None:
    first = metrics({"0": 10, "1": 5}, {"0.05": 3, "0.1": 7, "+Inf": 8})
    second = metrics({"0": 100}, {"0.05": 1, "0.1": 1, "+Inf": 1})
    async with gateways(first, second) as records, admin_api(control(), CLOCK, records) as client:
        answer = await client.get("/v1/clients")
    assert answer.body == {
        "gateways": 2,
        "answered": 2,
        "tokens": 115,
        "gaps": 9,
        "gap_bounds_s": [0.05, 0.1],
        "gap_counts": [4, 8],
        "problem": "",
    }


async def test_a_gateway_that_does_not_answer_is_named() -> None:
    async with gateways(401, metrics({"0": 7}, {"+Inf": 0})) as records:
        gone = gateway("gone", 1)
        async with admin_api(control(), CLOCK, [*records, gone]) as client:
            body = (await client.get("/v1/clients")).body
    assert (body["gateways"], body["answered"], body["tokens"]) == (3, 1, 7)
    assert "g0 answers /metrics with HTTP 401" in body["problem"]
    assert "gone does not answer" in body["problem"]


async def test_gateways_are_looked_up_now_and_then_and_remembered_while_etcd_is_away() -> None:
    etcd, clock, keys = MemoryEtcd(CLOCK), FakeClock(), Keys("t")
    store = etcd.client()
    read = gateways_of(store, keys, clock.now)
    await store.put(keys.gateway("g0"), pack_record(gateway("g0", 1)))
    assert [each.gateway for each in await read()] == ["g0"]
    await store.put(keys.gateway("g1"), pack_record(gateway("g1", 2)))
    assert len(await read()) == 1
    clock.advance(6.0)
    assert len(await read()) == 2
    clock.advance(6.0)
    store.reachable = False
    with pytest.raises(StoreUnavailable):
        await store.get(keys.spec)
    assert len(await read()) == 2


def test_experts_with_their_replicas_and_their_load_over_the_mean() -> None:
    placement = np.array([[[0, 1], [1, 2]], [[2, 0], [1, -1]]], dtype=np.int16)
    expert_map = ExpertMap(
        epoch=Epoch(4), num_experts=3, members=(member(0), member(1)), placement=placement
    )
    found = experts_of(expert_map, np.array([[30.0, 60.0, 0.0], [10.0, 10.0, 10.0]]))
    assert (found.epoch, found.num_experts) == (4, 3)
    assert found.ranks == [[[0], [0, 1], [1]], [[0], [1], [0]]]
    assert found.load == [[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]]
    assert experts_of(expert_map, None).load is None
    assert experts_of(None, None).ranks == []


async def test_the_experts_of_the_map_are_served() -> None:
    served = control()
    expert_map = served.state.expert_map
    assert expert_map is not None
    async with admin_api(served, CLOCK) as client:
        body = (await client.get("/v1/experts")).body
        assert body["load"] is None
        served.loads_LE = np.ones((expert_map.num_layers, expert_map.num_experts))
        loads = (await client.get("/v1/experts")).body["load"]
    assert np.asarray(loads).shape == (expert_map.num_layers, expert_map.num_experts)
    counts = [[len(ranks) for ranks in layer] for layer in body["ranks"]]
    assert counts == expert_map.replica_counts().tolist()


@asynccontextmanager
async def rank_process(rank: int, incarnation: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Something that has the command line of a rank."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"),
        *("--rank", str(rank), "--incarnation", str(incarnation)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_kill_ends_the_process_if_it_is_allowed() -> None:
    served = control()
    async with rank_process(1, 1) as process:
        record = replace(served.state.records[member(1)], pid=process.pid)
        served.state = replace(served.state, records={member(1): record})
        body = {"rank": 1, "incarnation": 1}
        async with admin_api(served, CLOCK) as client:
            assert (await client.get("/v1/status")).body["can_kill"] is False
            refused = await client.post("/v1/kill", body)
        assert (refused.status, process.returncode) == (409, None)
        assert "--allow-kill" in refused.message
        async with admin_api(served, CLOCK, can_kill=True) as client:
            assert (await client.get("/v1/status")).body["can_kill"] is True
            other = await client.post("/v1/kill", {"rank": 1, "incarnation": 2})
            assert (other.status, process.returncode) == (409, None)
            killed = await client.post("/v1/kill", body)
        assert killed.body == {"rank": 1, "incarnation": 1, "pid": process.pid}
        assert await process.wait() == -signal.SIGKILL


async def test_a_process_that_is_not_the_rank_is_left_alone() -> None:
    served = control()
    async with rank_process(0, 1) as process:
        record = replace(served.state.records[member(1)], pid=process.pid)
        served.state = replace(served.state, records={member(1): record})
        async with admin_api(served, CLOCK, can_kill=True) as client:
            answer = await client.post("/v1/kill", {"rank": 1, "incarnation": 1})
        assert answer.status == 409
        assert "is not rank" in answer.message
        assert process.returncode is None
