"""One rank, wired: its engine, its control server, its membership. The process, the hardware and
the store are given, so that the simulator runs the same rank."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog

from gpu_worker.attempt_reports import AttemptReports
from gpu_worker.config import ExchangeKind, RankConfig
from gpu_worker.control_server import ControlServer, KvReplicaHost
from gpu_worker.engine.engine_client import EngineCallbacks, EngineClient, EngineExecutor
from gpu_worker.engine.grammar_matcher import Grammars
from gpu_worker.engine.kv_replication import BlockCache, KvReplicator, ReplicaEndpoint
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import NO_LIMIT, SchedulerLimits
from gpu_worker.engine.step_runner import MakeRunner
from gpu_worker.exchange.expert_counter import ExpertCounter, count_experts
from gpu_worker.membership.announcements import Announcements
from gpu_worker.membership.link_keeper import DataEndpoint
from gpu_worker.membership.membership_driver import MembershipDriver, SlotLoader
from gpu_worker.membership.rank_membership import RankMembership
from shared.clock import Clock
from shared.errors import DeviceLost
from shared.exit_codes import EXIT_DEVICE_LOST, EXIT_FENCED
from shared.expert_map import ExpertMap, Placement
from shared.handshake import Access
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import ExchangeHandles, InstanceSpec, RankRecord
from shared.release import own_release
from shared.store import Store
from shared.tracing import Tracer
from shared.types import Incarnation, Member, NodeId, RankState
from shared.wire import Adoption

log = structlog.get_logger()


class KvReplicaEndpoint(ReplicaEndpoint, KvReplicaHost, Protocol):
    """KV replicas here and on peers, with the network between. See
    `kv_replication.mooncake_replicator.MooncakeReplicator`."""

    def start(self, tasks: asyncio.TaskGroup) -> None: ...

    def keep(self, peer: RankRecord) -> None: ...

    def close(self, peer: Member) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplication:
    """`replicator` sends and restores the engine's blocks through `endpoint`."""

    endpoint: KvReplicaEndpoint
    replicator: KvReplicator
    renew: Callable[[Member], KvReplication]  # for the process's next incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a rank computes with and sends over. See `cpu.hardware` and `cuda.hardware`."""

    make_runner: MakeRunner
    loader: SlotLoader
    residents: Placement  # what the slots hold at the start
    endpoint: DataEndpoint
    exchange: ExchangeKind
    blocks: BlockCache | None = None  # the KV cache's contents, if they are replicated
    handles: ExchangeHandles | None = None  # for the peers, if the exchange has any
    expert_counter: ExpertCounter | None = None  # of this incarnation; None: nobody counts
    computes_on_demand: bool = False  # see `ExpertMap.on_demand`
    renew: Callable[[Member], Hardware] | None = None
    """Makes what the process's next incarnation computes with: the same weights, but no link to a
    peer and no region of this incarnation. May block. Not while the engine or a load still runs.
    None: the process must end."""
    end_waits: Callable[[], None] = lambda: None
    """This incarnation is over: what its engine may wait for on the device ends. Raises
    DeviceLost."""
    check_device: Callable[[], None] = lambda: None
    """Raises DeviceLost if this process can compute on its device no more. May block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What a rank is made of."""

    member: Member
    lease_id: int
    config: RankConfig
    access: Access
    spec: InstanceSpec
    eos_token_ids: tuple[int, ...]
    store: Store
    clock: Clock
    hardware: Hardware
    engine_executor: EngineExecutor
    grammars: Grammars | None = None  # for guided decoding
    replication: KvReplication | None = None
    first_incarnation: Incarnation = Incarnation(0)  # of the process; 0: it is this one
    tracer: Tracer | None = None


class Rank:
    """Runs one incarnation from its registration to its end. See `rejoin` for what comes then."""

    def __init__(self, parts: RankParts) -> None:
        """On the event loop."""
        config, hardware, replication = parts.config, parts.hardware, parts.replication
        replicas = None if replication is None else replication.endpoint
        self._config = config
        self._check_device = hardware.check_device
        self._end_waits = hardware.end_waits
        self._replicas = replicas
        self._tasks = asyncio.TaskGroup()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._reports = _attempt_reports(parts)
        self._engine_ended: asyncio.Future[None] | None = None
        self._engine = _make_engine_client(parts, self._engine_callbacks())
        announcements = Announcements(parts.clock, lambda: self._server.send_announcements())
        self._server = ControlServer(
            member=parts.member,
            access=parts.access,
            knows=lambda member: self._membership.knows(member),
            engine=self._engine,
            endpoint=hardware.endpoint,
            announced=announcements.current,
            left_out=lambda: self._membership.left_out,
            offer_map=lambda packed: self._membership.on_offered_map(packed),
            on_control_plane_ping=lambda name: self._membership.doubts.on_control_plane_ping(name),
            on_control_plane_gone=lambda name: self._membership.doubts.on_control_plane_gone(name),
            unheard=lambda: self._membership.doubts.unheard(),
            replication=replicas,
            orphan_s=config.orphan_s,
            reports=self._reports,
            count_experts=partial(count_experts, hardware.expert_counter, parts.member),
        )
        self._leased = LeasedKeys(
            parts.store, ttl_s=config.timings.lease_ttl_s, lease_id=parts.lease_id
        )
        self._membership = MembershipDriver(
            store=parts.store,
            keys=Keys(config.instance),
            clock=parts.clock,
            membership=RankMembership(
                _first_record(parts), hardware.residents, peers_may_lag=self._engine.counts_graphs
            ),
            access=parts.access,
            leased=self._leased,
            loader=hardware.loader,
            endpoint=hardware.endpoint,
            engine=self._engine,
            announcements=announcements,
            replication=replicas,
            leave=self._leave,
            tasks=self._tasks,
        )

    @property
    def lease_id(self) -> int:
        """The lease under which it is registered now."""
        return self._leased.lease_id

    def ask_to_leave(self) -> bool:
        """Asks the control plane to drain this rank; a verdict then ends `run`. False if there is
        nothing to wait for: no other rank serves with it."""
        return self._membership.ask_to_leave()

    def stop(self, exit_code: int = 0) -> None:
        """Ends `run`."""
        if not self._ended.done():
            self._ended.set_result(exit_code)

    async def run(self) -> int:
        """The exit code: 0 after `stop`, EXIT_FENCED after a verdict, EXIT_DEVICE_LOST if the
        process can use its device no more. Raises what else the engine raised."""
        try:
            async with self._tasks:
                port = await self._server.start(
                    self._config.control_host, self._config.control_port
                )
                if self._replicas is not None:
                    self._replicas.start(self._tasks)
                self._membership.start(port)
                engine = self._engine_ended = self._engine.start()
                either: list[asyncio.Future[Any]] = [engine, self._ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if engine.done():
                    await self._raise_engine_error(engine)
                    self.stop(EXIT_FENCED)
                self._engine.stop()
                raise _Ended
        except* _Ended:
            pass
        except* DeviceLost as lost:
            log.error("device_lost", detail=str(lost.exceptions[0]))
            self.stop(EXIT_DEVICE_LOST)
        finally:
            self._engine.stop()
            await self._server.close()
            if self._reports is not None:
                self._reports.close()
        return self._ended.result()

    async def wait_for_threads(self) -> None:
        """After `run`. Returns once neither the engine nor a load touches the hardware any more.
        Raises what the engine raised, DeviceLost."""
        await asyncio.to_thread(self._end_waits)
        await self._membership.wait_for_load()
        if self._engine_ended is not None:
            await self._engine_ended

    async def _raise_engine_error(self, engine: asyncio.Future[None]) -> None:
        """Raises what the engine raised, if anything; DeviceLost if that is the cause."""
        if engine.exception() is not None:
            await asyncio.to_thread(self._check_device)
        engine.result()

    def _engine_callbacks(self) -> EngineCallbacks:
        """The server and the membership are looked up at each call: they use the engine, so they
        are built after it. The engine reports nothing before `run` starts it."""
        return EngineCallbacks(
            send_tokens=lambda tokens: self._server.send_tokens(tokens),
            send_wake=lambda epoch, step: self._membership.send_wake(epoch, step),
            send_update=lambda update, peers: self._membership.send_update(update, peers),
            suspect=lambda suspect: self._membership.on_suspect(suspect),
            adopted=self._on_adopted,
            held=lambda epoch: self._membership.on_held(epoch),
            stopped=lambda reason: self._membership.on_engine_stopped(reason),
        )

    def _on_adopted(self, expert_map: ExpertMap, adoption: Adoption) -> None:
        if self._reports is not None:
            self._reports.on_adopted(expert_map.epoch, abandoned=adoption.abandoned)
        self._membership.on_adopted(expert_map)

    def _leave(self, reason: str) -> None:
        log.warning("fenced", reason=reason)
        self.stop(EXIT_FENCED)


def _attempt_reports(parts: RankParts) -> AttemptReports | None:
    if parts.tracer is None and parts.config.log_level != "debug":
        return None
    return AttemptReports(parts.member, parts.tracer)


class _Ended(Exception):
    """Takes a task group down without being an error."""


def _make_engine_client(parts: RankParts, callbacks: EngineCallbacks) -> EngineClient:
    replication = parts.replication
    replicator = NoKvReplication() if replication is None else replication.replicator
    return EngineClient(
        member=parts.member,
        executor=parts.engine_executor,
        make_runner=parts.hardware.make_runner,
        scheduler=Scheduler(
            scheduler_limits(parts.config, parts.spec),
            parts.eos_token_ids,
            parts.grammars,
            replicator,
        ),
        replicator=replicator,
        clock=parts.clock,
        callbacks=callbacks,
        grammars=parts.grammars,
    )


def _first_record(parts: RankParts) -> RankRecord:
    """Before the control port is known."""
    config = parts.config
    return RankRecord(
        rank=parts.member.rank,
        incarnation=parts.member.incarnation,
        node=NodeId(config.node),
        pid=os.getpid(),
        lease_id=parts.lease_id,
        state=RankState.STARTING,
        control_host=config.control_host,
        control_port=0,
        transfer_name=parts.hardware.endpoint.name,
        slots=parts.spec.slots_per_rank,
        kv_blocks=config.kv_tokens // config.kv_block_tokens,
        kv_block_tokens=config.kv_block_tokens,
        exchange=parts.hardware.exchange.value,
        exchange_handles=parts.hardware.handles,
        computes_on_demand=parts.hardware.computes_on_demand,
        started_at=parts.clock.wall(),
        first_incarnation=parts.first_incarnation or parts.member.incarnation,
        release=own_release(),
        sessions_max=config.running_max + config.waiting_max,
        kv_cache_dtype=config.kv_cache_dtype.value,
    )


def scheduler_limits(config: RankConfig, spec: InstanceSpec) -> SchedulerLimits:
    return SchedulerLimits(
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        kv_blocks=config.kv_tokens // config.kv_block_tokens,
        kv_block_tokens=config.kv_block_tokens,
        step_tokens_max=config.step_tokens_max,
        step_sequences_max=config.step_sequences_max,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        mixed_prefill_tokens=config.mixed_prefill_tokens or NO_LIMIT,
        tenant_step_tokens=(
            NO_LIMIT if config.tenant_step_tokens < 0 else config.tenant_step_tokens
        ),
        tenant_host_rows=NO_LIMIT if config.tenant_host_rows < 0 else config.tenant_host_rows,
        running_max=config.running_max,
        waiting_max=config.waiting_max,
        prefix_cache=config.prefix_cache,
        orphans_max=config.orphans_max,
    )
