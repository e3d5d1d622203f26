"""An instance whose services are processes of chosen releases, each started by the command that
starts it on a host. A release is a folder with its packages: this tree, or an unpacked wheel."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from cli.observe.status import read_status
from cli.run_dir import Target
from shared.clock import SystemClock
from shared.embedded_etcd import EmbeddedEtcd
from shared.etcd_permissions import EtcdService
from shared.keys import Keys
from tests.support.authentication import client_session, secret_file, secret_flags
from tests.support.cluster import free_port
from tests.support.etcd import flags_of

TREE = Path(__file__).parents[2]
WAIT_S = 120.0
NODE = "host-1"


@dataclass(slots=True)
class Service:
    process: asyncio.subprocess.Process
    log: Path
    port: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    async def kill(self) -> None:
        """As `kill -9` of this process alone."""
        self.process.kill()
        await self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(WAIT_S):
            await self.process.wait()


@dataclass(slots=True)
class ReleaseInstance:
    """`running_instance` makes it, and ends what it has started."""

    etcd: EmbeddedEtcd
    keys: Keys
    model: Path
    folder: Path
    num_ranks: int
    http: aiohttp.ClientSession
    services: list[Service] = field(default_factory=list)

    async def control_plane(self, release: Path, **environment: str) -> Service:
        token = self.folder / "admin-token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text("t" * 32)
        port = free_port()
        service = await self._start(
            release,
            "control_plane",
            EtcdService.CONTROL_PLANE,
            *("--ranks", str(self.num_ranks), "--slots-per-rank", "5", "--redundant-experts", "4"),
            *("--model", str(self.model), "--admin-port", str(port)),
            *("--admin-token-file", str(token)),
            **environment,
        )
        service.port = port
        return service

    async def gateway(self, release: Path) -> Service:
        """Returns when it is ready."""
        service = await self.start_gateway(release)
        async with asyncio.timeout(WAIT_S):
            while not await self._is_ready(service):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return service

    async def start_gateway(self, release: Path, **environment: str) -> Service:
        port = free_port()
        flags = ("--port", str(port), "--model", str(self.model))
        service = await self._start(release, "gateway", EtcdService.GATEWAY, *flags, **environment)
        service.port = port
        return service

    async def agent(
        self, release: Path, ranks: str, *, node: str = NODE, **environment: str
    ) -> Service:
        rank = flags_of(self.etcd, self.keys, EtcdService.RANK)
        return await self._start(
            release,
            "node_agent",
            EtcdService.AGENT,
            *("--node", node, "--ranks", ranks, "--model", str(self.model), "--device", "cpu"),
            *("--log-dir", str(self.folder), "--", *rank_certificate(rank)),
            **environment,
        )

    async def status(self) -> dict[str, Any]:
        """As `starfish status --json` of this tree has it, for the user that may do everything."""
        target = Target(
            store=self.etcd.root, instance=self.keys.instance, secret_file=secret_file()
        )
        status: dict[str, Any] = await read_status(target, SystemClock())
        return status

    async def until_live(self, num_ranks: int) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                status = await self.status()
                if sum(rank["state"] == "live" for rank in status["ranks"]) == num_ranks:
                    return status
                await asyncio.sleep(0.2)

    async def change(self, *arguments: str) -> str:
        """By the leader's admin API."""
        token = str(self.folder / "admin-token")
        return await self.starfish(*arguments, "--admin-token-file", token)

    async def starfish(self, *arguments: str) -> str:
        # As the user that may do everything.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", *arguments),
            *(*self.etcd.root.flags(), "--instance", self.keys.instance, *secret_flags()),
            cwd=TREE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(WAIT_S):
            out, err = await process.communicate()
        assert process.returncode == 0, (out.decode()[-2000:], err.decode()[-2000:])
        return out.decode()

    def logs(self) -> str:
        """Of all processes, to say why a test has failed."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)

    async def _is_ready(self, gateway: Service) -> bool:
        try:
            async with self.http.get(f"http://127.0.0.1:{gateway.port}/health/ready") as response:
                return response.status == 200
        except aiohttp.ClientError:
            assert gateway.process.returncode is None, gateway.log.read_text()[-2000:]
            return False

    async def _start(
        self,
        release: Path,
        module: str,
        service: EtcdService,
        *flags: str,
        **environment: str,
    ) -> Service:
        log = self.folder / f"{module}-{len(self.services)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *flags_of(self.etcd, self.keys, service)),
                *flags,
                cwd=release,  # which `-m` looks into first
                env=os.environ | environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started = Service(process, log)
        self.services.append(started)
        return started


def rank_certificate(rank_flags: Sequence[str]) -> list[str]:
    """Of the flags that say how to reach etcd, those by which a rank differs from its agent."""
    flags = dict(zip(rank_flags[::2], rank_flags[1::2], strict=True))
    return [
        word
        for name in ("--etcd-cert", "--etcd-key")
        if name in flags
        for word in (name, flags[name])
    ]


@asynccontextmanager
async def running_instance(
    etcd: EmbeddedEtcd, keys: Keys, model: Path, folder: Path, *, num_ranks: int
) -> AsyncIterator[ReleaseInstance]:
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    async with client_session(timeout=timeout) as http:
        instance = ReleaseInstance(etcd, keys, model, folder, num_ranks, http)
        try:
            yield instance
        finally:
            for service in reversed(instance.services):
                if service.process.returncode is None:
                    service.process.send_signal(signal.SIGINT)  # agents: at once, with their ranks
            for service in instance.services:
                try:
                    async with asyncio.timeout(20):
                        await service.process.wait()
                except TimeoutError:
                    await service.kill()
