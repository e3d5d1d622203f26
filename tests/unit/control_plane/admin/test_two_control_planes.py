"""Two real control planes on one etcd in memory: whoever is asked, a change is made once, also if
the leader is gone before it could answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest

from control_plane.admin.admin_app import AdminApp
from control_plane.admin.admin_server import serving
from control_plane.admin.client_figures import ClientFigures, gateways_of
from control_plane.control_driver import Driver
from control_plane.detector_timings import DetectorTimings
from control_plane.membership import MembershipPolicy
from control_plane.telemetry import Metrics
from shared.clock import SystemClock
from shared.desired_state import DesiredState
from shared.handshake import Access
from shared.keys import Keys
from shared.listener import listen_on
from shared.records import unpack_record
from shared.types import RankId
from tests.support.admin_api import TOKEN, AdminClient
from tests.support.fake_clock import FakeClock
from tests.support.fake_rank import FakeRank
from tests.support.memory_store import MemoryEtcd, MemoryStore
from tests.unit.control_plane.harness import spec

KEYS = Keys("test")
WAIT_S = 30.0
NUM_RANKS = 3
LEADER_TTL_S = 10.0
"""The leader acts only while it has renewed its lease in this time: more than a busy machine may
keep it from that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    driver: Driver
    store: MemoryStore
    api: AdminClient
    task: asyncio.Task[None]

    async def ends(self) -> None:
        """As if it were killed: its lease stays until the test ends it."""
        self.store.reachable = False
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@asynccontextmanager
async def control_plane(etcd: MemoryEtcd, name: str) -> AsyncIterator[ControlPlane]:
    clock, store = SystemClock(), etcd.client()
    listener = listen_on("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    driver = Driver(
        store=store,
        keys=KEYS,
        clock=clock,
        name=name,
        access=Access(KEYS.instance, b""),
        spec=spec(ranks=NUM_RANKS, slots=4),
        policy=MembershipPolicy(bytes_per_expert=1, first_formation_grace_s=0.1),
        timings=DetectorTimings(),
        leader_ttl_s=LEADER_TTL_S,
        probe_interval_s=0.1,
        urgent_probe_interval_s=0.02,
        counts_interval_s=0.0,
        metrics=Metrics(),
        admin_url=url,
    )
    app = AdminApp(
        driver,
        token=TOKEN,
        url=url,
        clock=clock,
        figures=ClientFigures(gateways_of(store, KEYS, clock.now)),
    )
    async with serving(app, [listener]), aiohttp.ClientSession() as http:
        task = asyncio.create_task(driver.run(asyncio.Event()))
        found = ControlPlane(driver=driver, store=store, api=AdminClient(url, http), task=task)
        try:
            yield found
        finally:
            await found.ends()


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def desired_of(etcd: MemoryEtcd) -> DesiredState:
    found = etcd.values.get(KEYS.desired)
    return DesiredState() if found is None else unpack_record(found.value, DesiredState)


@pytest.fixture
def etcd() -> MemoryEtcd:
    """Its clock stands still: no lease expires because the machine is busy."""
    return MemoryEtcd(FakeClock())


async def test_a_change_is_made_once_whoever_is_asked_and_whoever_dies(etcd: MemoryEtcd) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(control_plane(etcd, "first"))
        await until(lambda: first.driver.leads)
        second = await stack.enter_async_context(control_plane(etcd, "second"))
        for number in range(NUM_RANKS):
            rank = FakeRank(etcd.client(), KEYS, rank=number, slots=4)
            await rank.start()
            stack.push_async_callback(rank.stop)

        def serve() -> bool:
            found = second.driver.state.expert_map
            return found is not None and len(found.members) == NUM_RANKS

        await until(serve)
        # The standby is asked; the leader does it, and both show it.
        answer = await second.api.post("/v1/drain", {"rank": 2, "request_id": "a"})
        assert (answer.status, answer.body["changed"]) == (202, True)
        assert desired_of(etcd).drain_of(RankId(2)) is not None
        for api in (first.api, second.api):
            status = (await api.get("/v1/status")).body
            assert (status["change"]["number"], status["leader"]["term"]) == (1, 1)

        # The leader writes, but hears of nothing more: whoever asked does not know.
        first.store.replies_lost = True
        answer = await first.api.post("/v1/pause", {"request_id": "b"})
        assert answer.status == 503
        assert desired_of(etcd).verdicts_paused
        await first.ends()
        etcd.revoke(etcd.values[KEYS.leader].lease_id)  # as when it expires
        await until(lambda: second.driver.leads)
        answer = await second.api.post("/v1/pause", {"request_id": "b"})
        assert (answer.status, answer.body["changed"]) == (202, False)
        assert desired_of(etcd).change == 2
        status = (await second.api.get("/v1/status")).body
        assert (status["leader"]["term"], status["verdicts_paused"]) == (2, True)
