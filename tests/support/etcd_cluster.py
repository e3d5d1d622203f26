"""An etcd of three members on this host, each of which a test may hurt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from shared.errors import StoreError
from shared.etcd_binary import packaged_etcd
from shared.etcd_options import EtcdOptions
from shared.etcd_store import EtcdStore
from shared.free_ports import free_ports

NUM_MEMBERS = 3
_START_TIMEOUT_S = 20.0


def tool(name: str) -> str:
    """`etcd`, `etcdctl` or `etcdutl`."""
    etcd = packaged_etcd()
    assert etcd is not None
    return str(etcd.with_name(name))


async def run_tool(*command: str) -> str:
    """Its output. Raises AssertionError if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "ETCDCTL_API": "3"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


class EtcdCluster:
    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        ports = free_ports(2 * NUM_MEMBERS)
        self.folder = folder
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:NUM_MEMBERS]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[NUM_MEMBERS:]]
        self._flags = flags
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @property
    def options(self) -> EtcdOptions:
        return EtcdOptions(etcd=",".join(self.endpoints))

    @property
    def members(self) -> str:
        """As `--initial-cluster` has them."""
        return ",".join(f"m{number}={peer}" for number, peer in enumerate(self._peers))

    async def start(self, member: int) -> None:
        client = f"http://{self.endpoints[member]}"
        peer = self._peers[member]
        with (self.folder / "etcd.log").open("ab") as log:
            self._processes[member] = await asyncio.create_subprocess_exec(
                *(tool("etcd"), "--name", f"m{member}"),
                *("--data-dir", str(self.folder / f"m{member}"), "--unsafe-no-fsync"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", self.members, "--log-level", "error"),
                *("--heartbeat-interval", "50", "--election-timeout", "250", *self._flags),
                stdout=log,
                stderr=log,
            )

    async def kill(self, member: int) -> None:
        process = self._processes[member]
        if process.returncode is None:
            process.kill()
            await process.wait()

    def pause(self, member: int) -> None:
        self._processes[member].send_signal(signal.SIGSTOP)

    def resume(self, member: int) -> None:
        self._processes[member].send_signal(signal.SIGCONT)

    async def until_healthy(self) -> None:
        store = EtcdStore(self.options, timeout_s=1.0)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while True:
                    with contextlib.suppress(StoreError):
                        await store.check()
                        return
                    await asyncio.sleep(0.1)
        finally:
            await store.close()

    async def restore(self, snapshot: Path) -> None:
        """All members are dead, and come back with what the snapshot holds."""
        for member, peer in enumerate(self._peers):
            data = self.folder / f"m{member}"
            data.rename(data.with_suffix(".before"))
            await run_tool(
                *(tool("etcdutl"), "snapshot", "restore", str(snapshot), "--name", f"m{member}"),
                *("--data-dir", str(data), "--initial-cluster", self.members),
                *("--initial-advertise-peer-urls", peer),
            )
            await self.start(member)
        await self.until_healthy()

    async def save(self, snapshot: Path) -> None:
        endpoint = self.endpoints[0]
        await run_tool(tool("etcdctl"), "--endpoints", endpoint, "snapshot", "save", str(snapshot))

    async def etcdctl(self, *arguments: str) -> str:
        return await run_tool(tool("etcdctl"), "--endpoints", ",".join(self.endpoints), *arguments)


@contextlib.asynccontextmanager
async def etcd_cluster(folder: Path, *flags: str) -> AsyncIterator[EtcdCluster]:
    """Runs while the body runs. `flags` are etcd's."""
    cluster = EtcdCluster(folder, flags)
    try:
        for member in range(NUM_MEMBERS):
            await cluster.start(member)
        await cluster.until_healthy()
        yield cluster
    finally:
        for member in range(NUM_MEMBERS):
            with contextlib.suppress(KeyError):
                await cluster.kill(member)
