"""Runs a gateway in the test's process with real sockets, an in-memory etcd and toy ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np

from gateway.api_key_watch import ApiKeyWatch
from gateway.config import GatewayConfig
from gateway.service import GatewayDependencies, Listeners, run_gateway
from shared.clock import SystemClock
from shared.codec import pack
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import InstanceSpec, pack_map
from shared.store import Store
from shared.tracing import Tracer
from shared.types import Epoch, Member
from tests.support import authentication
from tests.support.authentication import access_to, client_session
from tests.support.memory_store import MemoryEtcd, MemoryStore
from tests.support.toy_rank import VOCAB, ToyRank

MODEL = "toy-moe"


def toy_spec(model: Path, *, context_tokens_max: int = 2048, num_ranks: int = 2) -> InstanceSpec:
    return InstanceSpec(
        model_name=MODEL,
        model_path=str(model),
        num_moe_layers=1,
        num_experts=1,
        num_ranks=num_ranks,
        slots_per_rank=1,
        redundant_experts=0,
        context_tokens_max=context_tokens_max,
        vocab_size=VOCAB,
    )


def toy_map(epoch: int, members: Sequence[Member]) -> ExpertMap:
    num_ranks = max((m.rank for m in members), default=0) + 1
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=1,
        members=tuple(members),
        placement=np.zeros((1, num_ranks, 1), dtype=np.int16),
    )


class GatewayHarness:
    """What a test uses: the etcd, the ranks, the gateway's address."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        http: aiohttp.ClientSession,
        port: int,
        *,
        scheme: str = "http",
        api_key: str = "",
    ) -> None:
        self._headers = {"Authorization": f"Bearer {api_key or authentication.api_key()}"}
        self.store = store
        self.keys = keys
        self.http = http
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.stop = asyncio.Event()
        self.ranks: list[ToyRank] = []
        self.gateway_store: MemoryStore | None = None
        self.epoch = 0

    async def add_rank(self, rank: ToyRank) -> ToyRank:
        rank.access = access_to(self.keys.instance)
        record = await rank.start()
        self.ranks.append(rank)
        await self.store.put(self.keys.rank(record.rank, record.incarnation), pack(record))
        return rank

    async def publish(self, ranks: Sequence[ToyRank]) -> None:
        self.epoch += 1
        await self.store.put(
            self.keys.map, pack_map(toy_map(self.epoch, [r.member for r in ranks]))
        )

    async def wait_metric(self, name: str, value: float) -> None:
        async with asyncio.timeout(20):
            while True:
                if await self.metric(name) == value:
                    return
                await asyncio.sleep(0.01)

    async def metric(self, name: str) -> float:
        async with self.http.get(self.url + "/metrics", headers=self._headers) as response:
            for line in (await response.text()).splitlines():
                if line.startswith(f"starfish_gateway_{name} "):
                    return float(line.split()[1])
        return 0.0


@asynccontextmanager
async def running_gateway(
    model: Path,
    *,
    num_ranks: int = 2,
    context_tokens_max: int = 2048,
    scheme: str = "http",
    api_key: str = "",
    tracer: Tracer | None = None,
    **options: object,
) -> AsyncIterator[GatewayHarness]:
    """`options` are fields of GatewayConfig. The gateway is ready when the body begins; if it wants
    an API key, `api_key` is used to find that out."""
    etcd = MemoryEtcd(SystemClock())
    options = {"api_key_file": authentication.api_key_file(), "drain_s": 1.0, **options}
    config = dataclasses.replace(GatewayConfig(), **options)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connector = aiohttp.TCPConnector(ssl=False)  # certificates of tests are their own
        async with client_session(connector=connector) as http:
            harness = GatewayHarness(
                etcd.client(), Keys(config.instance), http, port, scheme=scheme, api_key=api_key
            )
            harness.gateway_store = etcd.client()
            spec = toy_spec(model, context_tokens_max=context_tokens_max, num_ranks=num_ranks)
            await harness.store.put(harness.keys.spec, pack(spec))
            for number in range(num_ranks):
                await harness.add_rank(ToyRank(number))
            if num_ranks:
                await harness.publish(harness.ranks)

            async def listeners() -> Listeners:
                return Listeners(listener)

            dependencies = GatewayDependencies(
                store=harness.gateway_store,
                clock=SystemClock(),
                listeners=listeners,
                stop=harness.stop,
                access=access_to(config.instance),
                api_keys=ApiKeyWatch(config.api_key_file, "", poll_s=0.05),
                tracer=tracer,
            )
            gateway = asyncio.create_task(run_gateway(config, dependencies))
            try:
                await _wait_ready(harness, gateway, num_ranks)
                yield harness
            finally:
                harness.stop.set()
                try:
                    async with asyncio.timeout(20):
                        await gateway
                finally:
                    for rank in harness.ranks:
                        await rank.kill()


async def _wait_ready(harness: GatewayHarness, gateway: asyncio.Task[None], num_ranks: int) -> None:
    async with asyncio.timeout(20):
        while True:
            if gateway.done():
                await gateway
            async with harness.http.get(
                harness.url + "/v1/models", headers=harness._headers
            ) as response:
                if (await response.json())["data"]:
                    break
            await asyncio.sleep(0.01)
        await harness.wait_metric("live_ranks", num_ranks)
