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
from gpu_worker.control_server import ControlServer, CopyKeeper
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_client import EngineGate
from gpu_worker.engine.grammar_matcher import Guides
from gpu_worker.engine.kv_replication import BlockCache, BlockKeeper, CopyEndpoint
from gpu_worker.engine.mailbox import (
    Adopted,
    Event,
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
from gpu_worker.engine.no_kv_replication import NoCopies
from gpu_worker.engine.scheduler import Scheduler, SchedulerLimits
from gpu_worker.engine.step_runner import StepRunner
from gpu_worker.exchange.graph_barrier_driver import ConductorDoors, GraphConductor
from gpu_worker.kv_replication.writer import CopyWriter
from gpu_worker.membership.link_keeper import LinkEvents, LinkKeeper
from gpu_worker.membership.membership_driver import EngineDoor, MembershipDriver, SlotLoader
from gpu_worker.membership.rank_membership import Standing
from shared.clock import Clock
from shared.exit_codes import EXIT_FENCED
from shared.expert_map import Placement
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import ExchangeHandles, InstanceSpec, RankRecord
from shared.store import Store
from shared.types import Epoch, Member, NodeId, RankState, Step
from shared.wire import AreaOpened, OpenArea

log = structlog.get_logger()


class Endpoint(Protocol):
    """This rank's end of the data network. See `exchange.links.TransferEndpoint`."""

    @property
    def name(self) -> str: ...

    def next_generation(self, target: Member) -> int: ...

    def open_area(self, source: Member, generation: int) -> tuple[int, int]: ...

    def connect(self, area: AreaOpened, peer: RankRecord) -> None: ...

    def is_open(self, target: Member) -> bool: ...

    def forget(self, member: Member) -> None: ...


class Copies(CopyEndpoint, CopyKeeper, Protocol):
    """Copies of KV blocks, here and on peers. See `copies.mooncake_copies.MooncakeCopies`."""

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
    endpoint: Endpoint
    exchange: ExchangeKind
    blocks: BlockCache | None = None  # the KV cache's contents, where copies of them are kept
    handles: ExchangeHandles | None = None  # for the peers, where the exchange has any
    conductor: GraphConductor | None = None  # where ranks meet by counting graphs


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
    guides: Guides | None = None  # for guided decoding
    copies: Copies | None = None  # opened; needs the hardware's `blocks`


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
        keeper = _keeper(parts)
        self._engine = Engine(
            member=parts.member,
            runner=parts.hardware.make_runner(monitor),
            scheduler=Scheduler(
                scheduler_limits(config, parts.spec), parts.eos_token_ids, parts.guides, keeper
            ),
            inbox=inbox,
            monitor=monitor,
            post=self._post,
            clock=clock,
            keeper=keeper,
        )
        self._inbox = inbox
        self._gate = EngineGate(
            member=parts.member,
            engine=self._engine,
            inbox=inbox,
            clock=clock,
            conductor=parts.hardware.conductor,
        )
        self._server = ControlServer(
            member=parts.member, engine=self._gate, areas=self, copies=parts.copies
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
                self._join(tasks, port)
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
            self._gate.stop()
            await self._server.close()
        return self._ended.result()

    def open_area(self, request: OpenArea) -> AreaOpened:
        """Implements `control_server.AreaKeeper`."""
        endpoint = self._parts.hardware.endpoint
        address, nbytes = endpoint.open_area(request.source, request.generation)
        return AreaOpened(
            target=self._parts.member,
            source=request.source,
            generation=request.generation,
            transfer_name=endpoint.name,
            address=address,
            nbytes=nbytes,
        )

    def _join(self, tasks: asyncio.TaskGroup, port: int) -> None:
        parts, config = self._parts, self._parts.config
        self._membership = MembershipDriver(
            store=parts.store,
            keys=self._keys,
            clock=parts.clock,
            standing=Standing(
                self._record(port),
                parts.hardware.residents,
                peers_lag=parts.hardware.conductor is not None,
            ),
            leased=self._leased,
            loader=parts.hardware.loader,
            engine=EngineDoor(
                see_map=self._gate.see_map,
                hand_map=self._gate.hand_map,
                hold=self._gate.hold,
                condemn=self._gate.condemn,
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
        if parts.copies is not None:
            parts.copies.start(tasks)
        self._membership.attach_links(self._links, parts.copies)
        if parts.hardware.conductor is not None:
            parts.hardware.conductor.attach(self._conductor_doors())
        self._membership.register()
        tasks.create_task(self._leased.write())
        tasks.create_task(self._membership.keep_lease())
        tasks.create_task(self._membership.watch())

    def _conductor_doors(self) -> ConductorDoors:
        def wake(step: Step) -> None:
            self._links.wake(self._membership.other_members, Epoch(0), step)

        return ConductorDoors(
            tell=self._links.tell,
            wake=wake,
            nudge=self._inbox.nudge,
            held=self._membership.on_held,
            leave=self._leave,
        )

    def _on_link_opened(self, peer: Member) -> None:
        if self._parts.hardware.conductor is not None:
            self._parts.hardware.conductor.greet(peer)
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

    def _post(self, event: Event) -> None:
        """On the engine thread."""
        self._loop.call_soon_threadsafe(self._on_engine_event, event)

    def _on_engine_event(self, event: Event) -> None:
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
                self._leave(f"no map has followed that of epoch {epoch}, though a step was spoilt")
            case Fenced(epoch=epoch):
                self._leave(f"the map of epoch {epoch} leaves this rank out")


class _Ended(Exception):
    """Takes a task group down without being an error."""


def _keeper(parts: RankParts) -> BlockKeeper:
    if parts.copies is None:
        return NoCopies()
    assert parts.hardware.blocks is not None, "copies of what?"
    return CopyWriter(parts.hardware.blocks, parts.copies, rank=parts.member.rank)


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
