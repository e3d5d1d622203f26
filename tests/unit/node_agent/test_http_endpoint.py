"""What an agent's `/health/ready` knows of etcd."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from node_agent.http_endpoint import serve_http
from node_agent.metrics import AgentMetrics
from node_agent.rank_supervisor import RankSupervisor
from node_agent.restart_policy import RestartPolicy
from shared.handshake import Access
from shared.keys import Keys
from shared.types import NodeId
from tests.support.fake_clock import FakeClock
from tests.support.memory_store import MemoryEtcd

KEYS = Keys("test")


@pytest.mark.parametrize("key", [KEYS.map, KEYS.desired])
async def test_what_no_service_of_ours_wrote_ends_no_agent(key: str) -> None:
    store = MemoryEtcd(FakeClock()).client()
    supervisor = RankSupervisor((), RestartPolicy(), random.Random(), 0.0, stop_grace_s=1.0)
    metrics = AgentMetrics(NodeId("a"), KEYS.instance, Access(KEYS.instance, b""))
    async with (
        serve_http(supervisor, metrics, store, KEYS, host="127.0.0.1", port=0) as port,
        aiohttp.ClientSession() as http,
    ):
        await store.put(key, b"no record of ours")
        await asyncio.sleep(0.05)
        async with http.get(f"http://127.0.0.1:{port}/health/ready") as answer:
            assert (await answer.json())["reasons"] == ["no expert map is published yet"]
