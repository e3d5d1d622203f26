"""A rank of the simulated cluster: the real one (`gpu_worker.rank.Rank`), on a greenlet in place
of a thread, the small model in place of a large one, and the simulated data network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import greenlet

from gpu_worker.config import ExchangeKind, RankConfig
from gpu_worker.engine.step_runner import ModelRunner, RunnerParts
from gpu_worker.exchange.graph_barrier_driver import GraphBarrierCallbacks
from gpu_worker.exchange.interface import Exchange, StepMonitor
from gpu_worker.kv_replication.writer import ReplicaWriter
from gpu_worker.rank import Hardware, KvReplication, RankParts
from gpu_worker.rejoin import RejoiningRank
from shared.expert_map import ExpertMap
from shared.handshake import Access
from shared.records import InstanceSpec, RankRecord
from shared.store import Store
from shared.types import GivenRegion, Member, RankId, Step
from shared.wire import RegionOpened
from tests.sim.sim_exchange import SimHub
from tests.sim.sim_kv_replication import KvReplicaHub, SimBlockCache
from tests.sim.sim_loop import SimLoop, SimProcess, in_process
from tests.sim.sim_model import EOS, SimModel


class SimClock:
    """Virtual time as `shared.clock.Clock`."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return self._loop.time()


class GreenletExecutor:
    """Implements `engine_client.EngineExecutor` and its Waiter. The engine blocks by switching to
    the loop."""

    def __init__(self, loop: SimLoop, process: SimProcess) -> None:
        self._loop = loop
        self._process = process
        self._hub = greenlet.getcurrent()
        self._engine: Any = None
        self._notified = False
        self._parked = 0
        self._parks = 0
        self._stalled_until = 0.0

    @property
    def waiter(self) -> GreenletExecutor:
        return self

    def cpu_s(self) -> float:
        return 0.0

    def start(self, run: Callable[[], None]) -> asyncio.Future[None]:
        ended: asyncio.Future[None] = self._loop.create_future()

        def body() -> None:
            try:
                run()
            except Exception as error:  # noqa: BLE001 - it is raised again on the loop
                if not ended.done():
                    ended.set_exception(error)
            else:
                if not ended.done():
                    ended.set_result(None)

        self._engine = greenlet.greenlet(body, parent=self._hub)
        self._engine.gr_context = in_process(self._process)
        self._loop.call_soon(self._engine.switch, context=in_process(self._process))
        return ended

    def wait(self, timeout_s: float) -> None:
        if not self._notified:
            self._park(timeout_s)
        self._notified = False

    def notify(self) -> None:
        self._notified = True
        self._wake_soon()

    def park_exchange(self) -> None:
        """A wait for peers: looks again after an arrival, a notification, or a while."""
        self._park(0.005)

    def arrived(self) -> None:
        self._wake_soon()

    def stall(self, seconds: float) -> None:
        """The engine alone stands still; the event loop goes on."""
        self._stalled_until = max(self._stalled_until, self._loop.time() + seconds)

    def _park(self, timeout_s: float) -> None:
        self._parks += 1
        self._parked = self._parks
        self._loop.call_later(
            timeout_s, self._resume, self._parked, context=in_process(self._process)
        )
        self._hub.switch()

    def _wake_soon(self) -> None:
        if self._parked:
            self._loop.call_soon(self._resume, self._parked, context=in_process(self._process))

    def _resume(self, park: int) -> None:
        if self._parked != park:
            return
        if (left_s := self._stalled_until - self._loop.time()) > 0:
            self._loop.call_later(left_s, self._resume, park, context=in_process(self._process))
        else:
            self._parked = 0
            self._engine.switch()


class SimEndpoint:
    """Implements `link_keeper.DataEndpoint` over the simulated exchange."""

    def __init__(self, hub: SimHub, member: Member) -> None:
        self._hub = hub
        self._member = member
        self._generation = 0
        self._open: set[Member] = set()

    @property
    def name(self) -> str:
        return f"sim-{self._member}"

    def next_generation(self, target: Member) -> int:
        self._generation += 1
        return self._generation

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        return GivenRegion(generation, 1)

    def connect(self, region: RegionOpened, peer: RankRecord) -> None:
        if not self._hub.can_reach(self._member, region.target):
            raise TimeoutError("first contact timed out")
        self._open.add(region.target)

    @property
    def memory_links(self) -> tuple[Member, ...]:
        return ()

    def is_open(self, target: Member) -> bool:
        return target in self._open and self._hub.can_reach(self._member, target)

    def forget(self, member: Member) -> None:
        self._open.discard(member)

    def sweep(self) -> None: ...


class SimRunner(ModelRunner):
    """As `cpu.runner.CpuRunner`."""

    def __init__(self, model: SimModel, exchange: Exchange, rank: RankId) -> None:
        super().__init__(model, exchange, model if model.drafts else None)
        self._sim_model = model
        self._rank = rank

    def adopt(self, expert_map: ExpertMap) -> Step:
        first = super().adopt(expert_map)
        self._sim_model.use_on_demand(expert_map.on_demand_of(self._rank))
        return first


def build_cpu_hardware(hub: SimHub, context: HardwareContext) -> Hardware:
    member, config, model = context.member, context.config, context.model
    hub.attach(member, context.process, context.host)

    def make_runner(monitor: StepMonitor, _: GraphBarrierCallbacks) -> RunnerParts:
        deadline_ms = config.timings.exchange_deadline_ms
        exchange = hub.exchange(member, monitor, context.clock, deadline_ms)
        return RunnerParts(SimRunner(model, exchange, member.rank))

    return Hardware(
        make_runner=make_runner,
        loader=model,
        residents=model.contents.copy(),
        endpoint=SimEndpoint(hub, member),
        exchange=ExchangeKind.TRANSFER,
        blocks=context.blocks,
        renew=lambda member: build_cpu_hardware(hub, replace(context, member=member)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareContext:
    """What the simulated hardware of one incarnation is built from."""

    loop: SimLoop
    process: SimProcess
    host: GreenletExecutor
    clock: SimClock
    member: Member
    config: RankConfig
    spec: InstanceSpec
    model: SimModel
    blocks: SimBlockCache


def build_rank(
    *,
    loop: SimLoop,
    access: Access,
    process: SimProcess,
    copies: KvReplicaHub,
    member: Member,
    lease_id: int,
    config: RankConfig,
    spec: InstanceSpec,
    store: Store,
    build_hardware: Callable[[HardwareContext], Hardware],
) -> RejoiningRank:
    """In the context of `process`."""
    host = GreenletExecutor(loop, process)
    model = SimModel(
        slots_per_rank=spec.slots_per_rank,
        kv_blocks=config.kv_tokens // config.kv_block_tokens,
        block_tokens=config.kv_block_tokens,
        drafts=spec.speculative_tokens > 0,
    )
    clock = SimClock(loop)
    blocks = SimBlockCache(model.keys, config.kv_block_tokens)

    def replication_of(member: Member) -> KvReplication:
        endpoint = copies.endpoint(member, process, blocks.block_bytes)
        replicator = ReplicaWriter(blocks, endpoint, rank=member.rank)
        return KvReplication(endpoint=endpoint, replicator=replicator, renew=replication_of)

    return RejoiningRank(
        RankParts(
            member=member,
            lease_id=lease_id,
            config=config,
            access=access,
            spec=spec,
            eos_token_ids=(EOS,),
            store=store,
            clock=clock,
            hardware=build_hardware(
                HardwareContext(
                    loop=loop,
                    process=process,
                    host=host,
                    clock=clock,
                    member=member,
                    config=config,
                    spec=spec,
                    model=model,
                    blocks=blocks,
                )
            ),
            engine_executor=host,
            replication=replication_of(member),
        )
    )
