"""One rank, wired: its engine, its control port, its membership. The process around it, the
hardware under it and the store are handed in, so that the simulator runs the very same rank."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from gpu_worker.config import ExchangeKind, RankConfig
from gpu_worker.control_server import ControlServer, KvReplicaHost
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_client import EngineClient
from gpu_worker.engine.grammar_matcher import GrammarCompiler
from gpu_worker.engine.kv_replication import BlockCache, KvReplicator, ReplicaEndpoint
from gpu_worker.engine.mailbox import (
    Adopted,
    EngineEvent,
    Fenced,
    Held,
    Inbox,
    SendWake,
    StepTokens,
    Stranded,
    Suspect,
    Waiter,
)
from gpu_worker.engine.monitor import EngineMonitor
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.scheduler import Scheduler, SchedulerLimits
from gpu_worker.engine.step_runner import StepRunner
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks, GraphBarrierDriver
from gpu_worker.kv_replication.writer import ReplicaWriter
from gpu_worker.membership.link_keeper import LinkEvents, LinkKeeper
from gpu_worker.membership.membership_driver import EngineCallbacks, MembershipDriver, SlotLoader
from gpu_worker.membership.rank_membership import RankMembership
from shared.clock import Clock
from shared.exit_codes import EXIT_FENCED
from shared.expert_map import Placement
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import ExchangeHandles, InstanceSpec, RankRecord
from shared.store import Store
from shared.types import Epoch, Member, NodeId, RankState, Step
from shared.wire import OpenRegion, RegionOpened

log = structlog.get_logger()


class DataEndpoint(Protocol):
    """This rank's end of the data network. See `exchange.links.TransferEndpoint`."""

    @property
    def name(self) -> str: ...

    def next_generation(self, target: Member) -> int: ...

    def open_region(self, source: Member, generation: int) -> tuple[int, int]: ...

    def connect(self, region: RegionOpened, peer: RankRecord) -> None: ...

    def is_open(self, target: Member) -> bool: ...

    def forget(self, member: Member) -> None: ...


class KvReplication(ReplicaEndpoint, KvReplicaHost, Protocol):
    """Replicas of KV blocks, here and on peers. See
    `kv_replication.mooncake_replicator.MooncakeReplicator`."""

    def start(self, tasks: asyncio.TaskGroup) -> None: ...

    def keep(self, peer: RankRecord) -> None: ...

    def close(self, peer: Member) -> None: ...


class EngineHost(Protocol):
    """What the engine runs on: a thread, or a greenlet of the simulator."""

    @property
    def waiter(self) -> Waiter: ...

    def cpu_s(self) -> float:
        """CPU time that the engine has used; a constant where nobody counts it."""
        ...

    def start(self, run: Callable[[], None]) -> asyncio.Future[None]:
        """Runs it; the future ends with it, or with its exception."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a rank computes with and talks over: `cpu_hardware`, or `cuda.hardware`."""

    make_runner: Callable[[EngineMonitor], StepRunner]
    loader: SlotLoader
    residents: Placement  # what the slots hold at the start
    endpoint: DataEndpoint
    exchange: ExchangeKind
    blocks: BlockCache | None = None  # the KV cache's contents, where replicas of them are kept
    handles: ExchangeHandles | None = None  # for the peers, where the exchange has any
    barrier_driver: GraphBarrierDriver | None = None  # where ranks meet by counting graphs


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What a rank is made of."""

    member: Member
    lease_id: int
    config: RankConfig
    spec: InstanceSpec
    eos_token_ids: tuple[int, ...]
    store: Store
    clock: Clock
    hardware: Hardware
    engine_host: EngineHost
    grammars: GrammarCompiler | None = None  # for guided decoding
    replication: KvReplication | None = None  # opened; needs the hardware's `blocks`


class Rank:
    """Runs one incarnation from its registration to its end."""

    def __init__(self, parts: RankParts) -> None:
        self._parts = parts
        self._keys = Keys(parts.config.instance)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        config, clock = parts.config, parts.clock
        inbox = Inbox(parts.engine_host.waiter)
        monitor = EngineMonitor(inbox, self._post, clock, parts.engine_host.cpu_s)
        replicator = _make_replicator(parts)
        self._engine = Engine(
            member=parts.member,
            runner=parts.hardware.make_runner(monitor),
            scheduler=Scheduler(
                scheduler_limits(config, parts.spec),
                parts.eos_token_ids,
                parts.grammars,
                replicator,
            ),
            inbox=inbox,
            monitor=monitor,
            post=self._post,
            clock=clock,
            replicator=replicator,
        )
        self._inbox = inbox
        self._engine_client = EngineClient(
            member=parts.member,
            engine=self._engine,
            inbox=inbox,
            clock=clock,
            barrier_driver=parts.hardware.barrier_driver,
        )
        self._server = ControlServer(
            member=parts.member,
            engine=self._engine_client,
            regions=self,
            replication=parts.replication,
        )
        self._leased = LeasedKeys(
            parts.store, ttl_s=config.timings.lease_ttl_s, lease_id=parts.lease_id
        )

    @property
    def lease_id(self) -> int:
        """The lease under which it is registered now."""
        return self._leased.lease_id

    def stop(self, exit_code: int = 0) -> None:
        """Ends `run`."""
        if not self._ended.done():
            self._ended.set_result(exit_code)

    async def run(self) -> int:
        """The exit code: 0 after `stop`, EXIT_FENCED after a verdict. Raises what the engine
        raised."""
        config = self._parts.config
        try:
            async with asyncio.TaskGroup() as tasks:
                port = await self._server.start(config.control_host, config.control_port)
                self._start_membership(tasks, port)
                engine = self._parts.engine_host.start(self._engine.run)
                either: list[asyncio.Future[Any]] = [engine, self._ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if engine.done():
                    engine.result()  # raises what it raised
                    self.stop(EXIT_FENCED)
                raise _Ended
        except* _Ended:
            pass
        finally:
            self._engine_client.stop()
            await self._server.close()
        return self._ended.result()

    def open_region(self, request: OpenRegion) -> RegionOpened:
        """Implements `control_server.RegionProvider`."""
        endpoint = self._parts.hardware.endpoint
        address, nbytes = endpoint.open_region(request.source, request.generation)
        return RegionOpened(
            target=self._parts.member,
            source=request.source,
            generation=request.generation,
            transfer_name=endpoint.name,
            address=address,
            nbytes=nbytes,
        )

    def _start_membership(self, tasks: asyncio.TaskGroup, port: int) -> None:
        parts, config = self._parts, self._parts.config
        self._membership = MembershipDriver(
            store=parts.store,
            keys=self._keys,
            clock=parts.clock,
            membership=RankMembership(
                self._record(port),
                parts.hardware.residents,
                peers_may_lag=parts.hardware.barrier_driver is not None,
            ),
            leased=self._leased,
            loader=parts.hardware.loader,
            engine=EngineCallbacks(
                on_map_seen=self._engine_client.on_map_seen,
                enqueue_map=self._engine_client.enqueue_map,
                hold=self._engine_client.hold,
                declare_dead=self._engine_client.declare_dead,
                leave=self._leave,
            ),
            tasks=tasks,
            suspicion_interval_s=config.timings.suspicion_window_ms / 1000,
        )
        self._links = LinkKeeper(
            member=parts.member,
            endpoint=parts.hardware.endpoint,
            events=LinkEvents(opened=self._on_link_opened, broken=self._membership.on_link_broken),
            tasks=tasks,
        )
        if parts.replication is not None:
            parts.replication.start(tasks)
        self._membership.attach_links(self._links, parts.replication)
        if parts.hardware.barrier_driver is not None:
            parts.hardware.barrier_driver.attach(self._graph_barrier_callbacks())
        self._membership.register()
        tasks.create_task(self._leased.write())
        tasks.create_task(self._membership.keep_lease())
        tasks.create_task(self._membership.watch())

    def _graph_barrier_callbacks(self) -> GraphBarrierCallbacks:
        def wake(step: Step) -> None:
            self._links.wake(self._membership.other_members, Epoch(0), step)

        return GraphBarrierCallbacks(
            send_update=self._links.tell,
            wake=wake,
            notify_engine=self._inbox.notify,
            on_undeliverable=self._membership.on_held,
            leave=self._leave,
        )

    def _on_link_opened(self, peer: Member) -> None:
        if self._parts.hardware.barrier_driver is not None:
            self._parts.hardware.barrier_driver.handshake(peer)
        self._membership.on_link_opened(peer)

    def _record(self, port: int) -> RankRecord:
        config = self._parts.config
        return RankRecord(
            rank=self._parts.member.rank,
            incarnation=self._parts.member.incarnation,
            node=NodeId(config.node),
            pid=os.getpid(),
            lease_id=self._parts.lease_id,
            state=RankState.STARTING,
            control_host=config.control_host,
            control_port=port,
            transfer_name=self._parts.hardware.endpoint.name,
            slots=self._parts.spec.slots_per_rank,
            kv_blocks=config.kv_tokens // config.kv_block_tokens,
            kv_block_tokens=config.kv_block_tokens,
            exchange=self._parts.hardware.exchange.value,
            exchange_handles=self._parts.hardware.handles,
            started_at=self._parts.clock.wall(),
        )

    def _leave(self, reason: str) -> None:
        log.warning("fenced", reason=reason)
        self.stop(EXIT_FENCED)

    def _post(self, event: EngineEvent) -> None:
        """On the engine thread."""
        self._loop.call_soon_threadsafe(self._on_engine_event, event)

    def _on_engine_event(self, event: EngineEvent) -> None:
        match event:
            case StepTokens(sessions=sessions, epoch=epoch, step=step, load=load):
                self._server.send_tokens(sessions, epoch, step, load)
            case Suspect(rank=rank, reason=reason, epoch=epoch, step=step, detail=detail):
                peer = self._membership.member_of(rank)
                if peer is not None:
                    self._membership.suspect(peer, reason, epoch, step, detail)
            case SendWake(epoch=epoch, step=step):
                self._links.wake(self._membership.other_members, epoch, step)
            case Adopted(expert_map=expert_map, adoption=adoption):
                log.info("adopted", epoch=expert_map.epoch, abandoned=adoption.abandoned)
                self._membership.on_adopted(expert_map)
            case Held(epoch=epoch):
                self._membership.on_held(epoch)
            case Stranded(epoch=epoch):
                self._leave(
                    f"no map has followed that of epoch {epoch}, though a step was invalidated"
                )
            case Fenced(epoch=epoch):
                self._leave(f"the map of epoch {epoch} leaves this rank out")


class _Ended(Exception):
    """Takes a task group down without being an error."""


def _make_replicator(parts: RankParts) -> KvReplicator:
    if parts.replication is None:
        return NoKvReplication()
    assert parts.hardware.blocks is not None, "replicas of what?"
    return ReplicaWriter(parts.hardware.blocks, parts.replication, rank=parts.member.rank)


def scheduler_limits(config: RankConfig, spec: InstanceSpec) -> SchedulerLimits:
    return SchedulerLimits(
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        kv_blocks=config.kv_tokens // config.kv_block_tokens,
        kv_block_tokens=config.kv_block_tokens,
        step_tokens_max=config.step_tokens_max,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        running_max=config.running_max,
        waiting_max=config.waiting_max,
        prefix_cache=config.prefix_cache,
    )
