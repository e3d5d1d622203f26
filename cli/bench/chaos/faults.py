"""The faults of `starfish bench chaos`, by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from signal import SIGKILL, SIGSTOP, SIGTERM
from typing import Protocol

from cli.admin.goals import drained, rebalanced, replaced, restarted, scaled, serving
from cli.bench.chaos.host_faults import BadLink, LinkDown, Partition, PowerLoss
from cli.bench.chaos.planned_changes import Ask, PlannedChange
from cli.bench.chaos.process_faults import DiskFull, SignalFault, SlowFault, StoreAway
from cli.bench.chaos.processes import ProcessKind, ServiceProcess
from cli.bench.chaos.site import Site, choose
from shared.errors import ConfigError
from shared.records import RankRecord

KILL_TARGET_MS = 100.0
HANG_TARGET_MS = 300.0
PLANNED_TARGET_MS = 20.0


class Fault(Protocol):
    """One kind of fault. An object of it serves one try after another."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def hold_s(self) -> float:
        """For how long it lasts before `heal`."""

    @property
    def target_ms(self) -> float | None:
        """How much the longest gap may be above the usual at p99; None: nothing is promised."""

    def missing(self, site: Site) -> str | None:
        """What it needs and the site lacks; None: it is possible."""

    async def inject(self, site: Site, rng: random.Random) -> str:
        """Returns whom it hit. Raises OSError."""

    async def heal(self, site: Site) -> None:
        """Ends the fault. Idempotent, also after an `inject` that failed in the middle."""


def _some(kind: ProcessKind, count: int = 1) -> Callable[..., list[ServiceProcess]]:
    """So many of a kind; none if there are too few. Of ranks others must remain."""

    def chosen(site: Site, rng: random.Random) -> list[ServiceProcess]:
        found = site.victims(kind)
        others = kind is ProcessKind.RANK and not site.spared
        return choose(rng, found, count) if len(found) >= count + others else []

    return chosen


def _all(kind: ProcessKind) -> Callable[..., list[ServiceProcess]]:
    return lambda site, rng: site.processes(kind)


def _leader(site: Site, rng: random.Random) -> list[ServiceProcess]:
    return site.leader()


def _etcd_leader(site: Site, rng: random.Random) -> list[ServiceProcess]:
    """Of several etcd members."""
    members = site.processes(ProcessKind.ETCD)
    if site.cluster is None:
        return []
    leader = site.cluster.etcd_leader()
    return [process for process in members if process.pid == leader]


def _host(site: Site, rng: random.Random) -> list[ServiceProcess]:
    """All processes of one of several hosts with ranks."""
    if site.cluster is None:
        return []
    host = rng.choice(site.cluster.rank_hosts)
    return [process for process in site.processes(*ProcessKind) if process.mark == host.mark]


def all_faults() -> list[Fault]:
    """In the order in which they are run."""
    rank, etcd = ProcessKind.RANK, ProcessKind.ETCD
    return [
        SignalFault(
            name="kill-rank",
            summary="kill -9 of a rank",
            chosen=_some(rank),
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="kill-two-ranks",
            summary="kill -9 of two ranks at once",
            chosen=_some(rank, 2),
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="stop-rank",
            summary="SIGSTOP of a rank, SIGCONT after 1.5 s",
            chosen=_some(rank),
            number=SIGSTOP,
            hold_s=1.5,
            target_ms=HANG_TARGET_MS,
        ),
        SignalFault(
            name="pause-ranks",
            summary="all ranks stopped for 1 s, as on a paused host; nobody is dead",
            chosen=_all(rank),
            number=SIGSTOP,
            hold_s=1.0,
            target_ms=1000.0 + HANG_TARGET_MS,
        ),
        SlowFault(
            name="slow-rank",
            summary="a rank gets 10 % of a core for 4 s (control group)",
            chosen=_some(rank),
            share=0.1,
            hold_s=4.0,
        ),
        SignalFault(
            name="kill-control-plane",
            summary="kill -9 of the leading control plane",
            chosen=_leader,
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="stop-control-plane",
            summary="SIGSTOP of the leading control plane for 3 s",
            chosen=_leader,
            number=SIGSTOP,
            hold_s=3.0,
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="kill-gateway",
            summary="kill -9 of a gateway; its clients resume at another",
            chosen=_some(ProcessKind.GATEWAY),
            target_ms=HANG_TARGET_MS,
        ),
        SignalFault(
            name="stop-gateway",
            summary="SIGSTOP of a gateway for 1 s; its own clients wait",
            chosen=_some(ProcessKind.GATEWAY),
            number=SIGSTOP,
            hold_s=1.0,
            target_ms=1000.0 + HANG_TARGET_MS,
        ),
        SignalFault(
            name="kill-agent",
            summary="kill -9 of a node agent",
            chosen=_some(ProcessKind.AGENT),
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="stop-agent",
            summary="SIGSTOP of a node agent for 3 s",
            chosen=_some(ProcessKind.AGENT),
            number=SIGSTOP,
            hold_s=3.0,
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="kill-etcd",
            summary="kill -9 of etcd (of several: of one)",
            chosen=_some(etcd),
            number=SIGKILL,
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="stop-etcd",
            summary="SIGSTOP of etcd (of several: of all) for 4 s",
            chosen=_all(etcd),
            number=SIGSTOP,
            hold_s=4.0,
            target_ms=KILL_TARGET_MS,
        ),
        StoreAway(
            name="stop-etcd-kill-rank",
            summary="etcd stopped for 4 s, a rank killed meanwhile",
            hold_s=4.0,
        ),
        SignalFault(
            name="term-rank",
            summary="SIGTERM to a rank",
            chosen=_some(rank),
            number=SIGTERM,
            target_ms=KILL_TARGET_MS,
        ),
        DiskFull(
            name="disk-full",
            summary="the disk of the run folder full for 3 s, a rank killed meanwhile",
            hold_s=3.0,
            target_ms=KILL_TARGET_MS,
        ),
        *_planned_changes(),
        *_host_faults(),
    ]


def _planned_changes() -> list[Fault]:
    return [
        PlannedChange(
            name="drain",
            summary="a rank is drained, then undrained",
            begin=_drain,
            end=_undrain,
            target_ms=PLANNED_TARGET_MS,
        ),
        PlannedChange(
            name="scale",
            summary="one rank less, then one more",
            begin=lambda site, rank: _scale(len(site.ranks()) - 1),
            end=lambda site, rank: _scale(len(site.ranks()) + 1),
            target_ms=PLANNED_TARGET_MS,
        ),
        PlannedChange(
            name="replace",
            summary="a rank gets a new process where it is",
            begin=lambda site, rank: Ask(
                name="replace",
                fields={"rank": rank.rank, "node": rank.node},
                goal=replaced(rank.rank, rank.node),
            ),
            target_ms=PLANNED_TARGET_MS,
        ),
        PlannedChange(
            name="rolling-restart",
            summary="every rank gets a new process, one after the other",
            begin=lambda site, rank: Ask(name="restart", fields={}, goal=restarted()),
            target_ms=PLANNED_TARGET_MS,
        ),
        PlannedChange(
            name="rebalance",
            summary="experts move to where they are worth most now",
            begin=lambda site, rank: Ask(name="rebalance", fields={}, goal=rebalanced),
            hold_s=3.0,
            target_ms=PLANNED_TARGET_MS,
        ),
    ]


def _drain(site: Site, rank: RankRecord) -> Ask:
    goal = drained(lambda each: each.rank == rank.rank, f"rank {rank.rank}")
    return Ask(name="drain", fields={"rank": rank.rank}, goal=goal)


def _undrain(site: Site, rank: RankRecord) -> Ask:
    goal = serving(lambda each: each.rank == rank.rank, f"rank {rank.rank}")
    return Ask(name="undrain", fields={"rank": rank.rank}, goal=goal)


def _scale(num_ranks: int) -> Ask:
    return Ask(name="scale", fields={"ranks": num_ranks}, goal=scaled(num_ranks))


def _host_faults() -> list[Fault]:
    """Those that need several hosts."""
    rank, etcd = ProcessKind.RANK, ProcessKind.ETCD
    control, gateway = ProcessKind.CONTROL_PLANE, ProcessKind.GATEWAY
    return [
        PowerLoss(
            name="kill-host",
            summary="kill -9 of all processes of a host, which stays away for 3 s",
            hold_s=3.0,
            target_ms=KILL_TARGET_MS,
        ),
        SignalFault(
            name="pause-host",
            summary="all processes of a host stopped for 1 s",
            chosen=_host,
            number=SIGSTOP,
            hold_s=1.0,
            target_ms=1000.0 + HANG_TARGET_MS,
        ),
        SlowFault(
            name="slow-host",
            summary="all processes of a host get 10 % of a core together for 4 s (control group)",
            chosen=_host,
            share=0.1,
            hold_s=4.0,
        ),
        SignalFault(
            name="kill-etcd-leader",
            summary="kill -9 of the leader of three etcd members",
            chosen=_etcd_leader,
            target_ms=KILL_TARGET_MS,
        ),
        LinkDown(
            name="link-down",
            summary="the links of a host down for 8 s",
            hold_s=8.0,
            target_ms=HANG_TARGET_MS,
        ),
        Partition(
            name="one-way-ranks",
            summary="what one host's ranks send does not reach another's for 4 s",
            between=(rank, rank),
            is_one_way=True,
            hold_s=4.0,
            target_ms=HANG_TARGET_MS,
        ),
        Partition(
            name="partition-ranks",
            summary="the ranks of two hosts cannot reach each other for 4 s",
            between=(rank, rank),
            hold_s=4.0,
            target_ms=HANG_TARGET_MS,
        ),
        Partition(
            name="partition-ranks-etcd",
            summary="a host's ranks and agent cannot reach etcd for 8 s",
            between=(rank, etcd),
            hold_s=8.0,
            target_ms=HANG_TARGET_MS,
        ),
        Partition(
            name="partition-gateway-ranks",
            summary="a gateway cannot reach a host's ranks for 4 s",
            between=(gateway, rank),
            hold_s=4.0,
            target_ms=HANG_TARGET_MS,
        ),
        Partition(
            name="partition-control-etcd",
            summary="the leading control plane cannot reach etcd for 6 s",
            between=(control, etcd),
            hold_s=6.0,
            target_ms=KILL_TARGET_MS,
        ),
        Partition(
            name="partition-control-ranks",
            summary="the leading control plane cannot reach two of three hosts' ranks for 4 s",
            between=(control, rank),
            far_ends=2,
            hold_s=4.0,
            target_ms=KILL_TARGET_MS,
        ),
        BadLink(
            name="loss-5",
            summary="5 % of what a host's ranks send and get is lost for 6 s",
            loss=0.05,
            hold_s=6.0,
        ),
        BadLink(
            name="delay-50ms",
            summary="what a host's ranks send and get comes 50 ms later for 6 s",
            delay_s=0.05,
            hold_s=6.0,
        ),
    ]


def chosen_faults(names: str, *, has_hosts: bool) -> Sequence[Fault]:
    """`names` are comma-separated; "all" are all. Raises ConfigError if one is unknown, or named
    and needs several hosts where there is one."""
    known = {fault.name: fault for fault in all_faults()}
    if names == "all":
        return list(known.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"--faults {names!r}: pass all, or some of {', '.join(known)}, comma-separated"
        )
    of_hosts = {fault.name for fault in _host_faults()}
    impossible = [] if has_hosts else [name for name in wanted if name in of_hosts]
    if impossible:
        raise ConfigError(f"--faults {', '.join(impossible)}: pass --hosts 3 too, as root")
    return [known[name] for name in wanted]
