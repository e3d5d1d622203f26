"""What etcd's certificates, users and roles cost: the start, and the way of a death through etcd,
with them and without, in turns. `python -m benchmarks.etcd`."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.embedded_etcd import EmbeddedEtcd
from shared.errors import StoreUnavailable
from shared.etcd_binary import etcd_binary
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService
from shared.etcd_store import EtcdStore, connect_store
from shared.free_ports import free_ports
from shared.keys import Keys
from shared.store import Put
from shared.types import Incarnation, RankId

Form = contextlib.AbstractAsyncContextManager[Mapping[EtcdService, EtcdOptions]]

DEATHS = 300
TURNS = 3
KEYS = Keys("bench")
RECORD, MAP = b"r" * 400, b"m" * 8000


@dataclass(frozen=True, slots=True)
class Found:
    start_s: float
    detected_s: list[float]  # from the agent's revocation to the control plane's DELETE
    published_s: list[float]  # from there to the map at the gateway


@contextlib.asynccontextmanager
async def secured(folder: Path) -> AsyncIterator[Mapping[EtcdService, EtcdOptions]]:
    etcd = EmbeddedEtcd(folder)
    try:
        await etcd.start()
        await etcd.admit(KEYS)
        yield {service: etcd.options(KEYS, service) for service in EtcdService}
    finally:
        await etcd.stop()


@contextlib.asynccontextmanager
async def plain(folder: Path) -> AsyncIterator[Mapping[EtcdService, EtcdOptions]]:
    """With the same flags otherwise."""
    port, peer_port = free_ports(2)
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    process = await asyncio.create_subprocess_exec(
        *(str(await etcd_binary()), "--data-dir", str(folder / "data"), "--name", "embedded"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"embedded={peer}", "--unsafe-no-fsync"),
        *("--heartbeat-interval", "50", "--election-timeout", "250", "--log-level", "error"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    options = EtcdOptions(etcd=f"127.0.0.1:{port}")
    try:
        while True:
            with contextlib.suppress(StoreUnavailable):
                await (await connect_store(options, timeout_s=1.0)).close()
                break
        yield dict.fromkeys(EtcdService, options)
    finally:
        process.kill()
        await process.wait()


async def measure(form: Form) -> Found:
    began = time.perf_counter()
    async with form as options, contextlib.AsyncExitStack() as stack:
        start_s = time.perf_counter() - began

        async def store(service: EtcdService) -> EtcdStore:
            connected = await connect_store(options[service])
            stack.push_async_callback(connected.close)
            return connected

        agent, planner = await store(EtcdService.AGENT), await store(EtcdService.CONTROL_PLANE)
        gateway = await store(EtcdService.GATEWAY)
        all_seen, served_seen = planner.watch(KEYS.root), gateway.watch(KEYS.serving)
        for watch in (all_seen, served_seen):
            stack.push_async_callback(watch.aclose)
            await anext(watch)
        key, detected_s, published_s = KEYS.rank(RankId(1), Incarnation(1)), [], []
        for _ in range(DEATHS):
            lease_id = await agent.grant_lease(30)
            await agent.put(key, RECORD, lease_id=lease_id)
            await anext(all_seen), await anext(served_seen)
            died_at = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(agent.revoke_lease(lease_id))
                await anext(all_seen)
                seen_at = time.perf_counter()
                await anext(served_seen)
                tasks.create_task(planner.txn([], [Put(key=KEYS.map, value=MAP)]))
                await anext(served_seen)
                known_at = time.perf_counter()
            await anext(all_seen)
            detected_s.append(seen_at - died_at)
            published_s.append(known_at - seen_at)
        return Found(start_s, detected_s, published_s)


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:.2f} ms"


async def main() -> None:
    for turn in range(TURNS):
        for name, form in (("plain", plain), ("secured", secured)):
            with tempfile.TemporaryDirectory() as folder:
                found = await measure(form(Path(folder)))
            print(
                f"{turn} {name:8} start {found.start_s:.2f} s, revoked to DELETE "
                f"{_ms(found.detected_s)}, DELETE to map {_ms(found.published_s)}",
                flush=True,
            )


if __name__ == "__main__":
    asyncio.run(main())
