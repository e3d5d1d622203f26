"""A whole instance in one process: real ranks, control planes and gateway on virtual time, an
in-memory etcd, and a node agent per rank that does what the real one does with pidfds. Driven by
one seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from control_plane.control_driver import Driver
from control_plane.detector_timings import DetectorTimings
from control_plane.membership import MembershipPolicy
from control_plane.planned_change import DrainPolicy
from control_plane.rebalancer import RebalancePolicy
from control_plane.silence import SilenceTimings
from control_plane.telemetry import Metrics
from control_plane.writes import PublishMap
from gateway.cluster_view import ClusterWatch
from gateway.metrics import GatewayMetrics
from gateway.routing_policy import PrefixAffinity
from gateway.session_driver import SessionDriver
from gateway.session_state import SessionPolicy
from gateway.stream_session import StreamSession
from gpu_worker.config import RankConfig
from gpu_worker.membership.membership_driver import SlotLoader
from gpu_worker.rank import Hardware
from gpu_worker.rejoin import RejoiningRank
from shared.config import Timings
from shared.expert_map import Placement
from shared.handshake import Access, gateway_caller
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import InstanceSpec
from shared.types import DEFAULT_SCHEDULING, Member, RankId, SamplingParams, SchedulingParams
from tests.sim.sim_agent import SimAgent
from tests.sim.sim_exchange import SimHub
from tests.sim.sim_kv_replication import KvReplicaHub
from tests.sim.sim_loads import SimExpertCounter, SimLoads
from tests.sim.sim_loop import EXECUTOR_SLOW_S, SimLoop, SimProcess, in_process, kill
from tests.sim.sim_model import HIDDEN, NUM_EXPERTS, NUM_LAYERS, TOP_K, VOCAB, oracle
from tests.sim.sim_network import SimNetwork
from tests.sim.sim_rank import (
    GreenletExecutor,
    HardwareContext,
    SimClock,
    build_cpu_hardware,
    build_rank,
)
from tests.support.memory_store import MemoryEtcd, MemoryStore

if TYPE_CHECKING:
    from tests.sim.sim_card import CardSizes
    from tests.sim.sim_card_rank import SimCards

ETCD = "etcd"
ACCESS = Access("sim", b"a secret of thirty-two characters")
LEASE_TTL_S = 5.0
LOAD_TIME_CONSTANT_S = 2.0
SETTLE_S = 20.0
"""After the last fault: an expiry, its patience, and a formation."""
SEEDS_PER_TENANTS = 4
"""In one schedule of so many, on CPUs, clients are of two tenants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimClusterSizes:
    num_ranks: int = 4
    slots_per_rank: int = 4
    redundant_experts: int = 6
    num_spare_hosts: int = 0  # their agents run what is added or moved
    num_control_planes: int = 2
    slow: bool = False  # loads and first contacts take seconds
    heal_after_s: float = 0.3
    suspicion_window_s: float = 0.0  # 0: learnt
    cards: CardSizes | None = None  # None: ranks on CPUs
    has_loads: bool = False  # tokens prefer some experts, and CPU ranks compute on demand
    drafts: bool = False  # CPU ranks decode speculatively

    @property
    def num_hosts(self) -> int:
        """Of ranks. No more ranks than these ever run."""
        return self.num_ranks + self.num_spare_hosts

    @property
    def settle_s(self) -> float:
        """How long the instance may take to be whole and idle after the last fault."""
        return SETTLE_S if self.cards is None else self.cards.settle_s


@dataclass(slots=True)
class ClientSession:
    """One client's request and what it has seen of it."""

    prompt: tuple[int, ...]
    num_tokens: int
    session: StreamSession | None = None
    longest_gap_s: float = 0.0
    cancelled: bool = False

    @property
    def expected(self) -> tuple[int, ...]:
        return oracle(self.prompt, self.num_tokens)


def scheduling_of(number: int) -> SchedulingParams:
    """By turns of two tenants, which share no KV blocks, and of three priorities."""
    tenant = number % 2
    return SchedulingParams(
        tenant="ab"[tenant],
        weight=1.0 + tenant,
        priority=number % 3 - 1,
        cache_salt=bytes([tenant]) * 32,
    )


@dataclass(slots=True)
class WatchedLoader:
    """Implements `membership_driver.SlotLoader`: says what is loaded, and loads it."""

    member: Member
    loader: SlotLoader
    contents: Placement
    on_load: Callable[[Member, Placement, Placement], None]

    def load(self, wanted: Placement) -> Placement:
        """Of one at a time, as membership does."""
        self.on_load(self.member, wanted, self.contents)
        self.contents = self.loader.load(wanted)
        return self.contents


@dataclass
class SimCluster:
    """Build it, `await start()`, send sessions, break things, `await quiet()`."""

    seed: int
    loop: SimLoop
    sizes: SimClusterSizes = field(default_factory=SimClusterSizes)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        random.seed(self.seed)
        self.loop.set_exception_handler(self._on_callback_error)
        self.clock = SimClock(self.loop)
        self.network = SimNetwork(self.loop, random.Random(self.seed + 1))
        self.loop.network = self.network
        if self.sizes.slow:
            self.loop.executor_s = EXECUTOR_SLOW_S
        self.hub = SimHub(self.sizes.num_hosts, HIDDEN, TOP_K, network=self.network)
        self.copies = KvReplicaHub(self.network)
        self.cards = self._build_cards()
        self.etcd = MemoryEtcd(self.clock)
        self.keys = Keys(ACCESS.instance)
        self.loads: SimLoads | None = None
        if self.sizes.has_loads:
            self.loads = SimLoads(self.clock, self.seed, NUM_LAYERS, NUM_EXPERTS)
        self.spec = InstanceSpec(
            model_name="sim",
            model_path="",
            num_moe_layers=NUM_LAYERS + self.sizes.drafts,
            num_experts=NUM_EXPERTS,
            num_ranks=self.sizes.num_ranks,
            slots_per_rank=self.sizes.slots_per_rank,
            redundant_experts=self.sizes.redundant_experts,
            context_tokens_max=256,
            vocab_size=VOCAB,
            ranks_max=self.sizes.num_hosts,
            speculative_tokens=int(self.sizes.drafts),
        )
        self.agents: dict[int, SimAgent] = {}
        self.control_planes: list[SimProcess | None] = [None] * self.sizes.num_control_planes
        self.drivers: dict[SimProcess, Driver] = {}
        self.told_to_leave: dict[SimProcess, float] = {}  # until when each may wait
        self.gateway: SessionDriver
        self.clients: list[ClientSession] = []
        self.crashes: list[BaseException] = []
        self.processes: dict[Member, SimProcess] = {}
        self.agent_processes: dict[int, SimProcess] = {}
        self.ranks: dict[Member, RejoiningRank] = {}
        self.engine_executors: dict[Member, GreenletExecutor] = {}
        self.violations: list[str] = [] if self.cards is None else self.cards.fabric.violations
        self.on_load: Callable[[Member, Placement, Placement], None] = lambda *_: None
        self.on_offer: Callable[[PublishMap], None] = lambda _: None
        self.on_exit: Callable[[Member], None] = lambda _: None
        self._stores: list[tuple[str, MemoryStore]] = []
        self._kept_refs: list[Any] = []  # tasks of dead processes must not be collected half-run
        self._gateway_process = SimProcess("gateway", "host-gateway")
        self._num_gateways_killed = 0

    # Hosts and their way to etcd.

    def host_of_rank(self, rank: int) -> str:
        """Where it runs unless it is moved."""
        return f"host-{rank}"

    def hosts(self) -> list[str]:
        ranks = [self.host_of_rank(r) for r in range(self.sizes.num_hosts)]
        planes = [f"host-plane-{n}" for n in range(self.sizes.num_control_planes)]
        return [*ranks, *planes, "host-gateway", ETCD]

    def store(self, host: str) -> MemoryStore:
        store = self.etcd.client()
        store.reachable = self.network.reachable(host, ETCD)
        self._stores.append((host, store))
        return store

    def sever(self, a: str, b: str) -> None:
        self.network.sever(a, b)
        self._update_store_reachability()

    def heal(self) -> None:
        self.network.heal()
        self.hub.heal()
        self._update_store_reachability()

    def reconnect(self, a: str, b: str) -> None:
        self.network.reconnect(a, b)
        self.hub.heal()
        self._update_store_reachability()

    def _update_store_reachability(self) -> None:
        for host, store in self._stores:
            store.reachable = self.network.reachable(host, ETCD)

    # Processes.

    async def start(self) -> None:
        self.spawn(self._expire_leases(), SimProcess("etcd", ETCD))
        for number in range(self.sizes.num_control_planes):
            self.start_control_plane(number)
        self.spawn(self._run_gateway(), self._gateway_process)
        for rank in range(self.sizes.num_hosts):
            agent = SimProcess(f"agent-{rank}", self.host_of_rank(rank))
            self.agent_processes[rank] = agent
            self.spawn(self._run_agent(rank), agent)
        await self.until(self.all_live, 60.0)

    def spawn(self, work: Coroutine[Any, Any, Any], process: SimProcess) -> asyncio.Task[Any]:
        task = self.loop.create_task(work, context=in_process(process))
        self._kept_refs.append(task)

        def on_done(task: asyncio.Task[Any]) -> None:
            if not process.dead and not task.cancelled() and task.exception() is not None:
                self.crashes.append(task.exception())  # type: ignore[arg-type]

        task.add_done_callback(on_done)
        return task

    def process_of(self, rank: int) -> SimProcess | None:
        """Of the present life of the rank on this host, while it lasts."""
        process = self.agents[rank].process
        return None if process is None or process.dead else process

    def run_in(self, process: SimProcess, work: Callable[[], None]) -> None:
        """As a signal does: at once, in that process."""
        in_process(process).run(work)

    def kill_rank(self, rank: int) -> None:
        process = self.process_of(rank)
        if process is not None:
            kill(process)

    def start_control_plane(self, number: int) -> None:
        process = SimProcess(f"plane-{number}", f"host-plane-{number}")
        self.control_planes[number] = process
        store = self.store(process.host)
        driver = in_process(process).run(
            lambda: Driver(
                store=store,
                keys=self.keys,
                clock=self.clock,
                name=f"plane-{number}-{self.clock.now():.6f}",
                access=ACCESS,
                spec=self.spec,
                policy=MembershipPolicy(
                    bytes_per_expert=1000,
                    first_formation_grace_s=2.0,
                    formation_window_s=5.0,
                    heal_after_s=self.sizes.heal_after_s,
                    drains=DrainPolicy(settle_s=1.0, overdue_s=1.0, leaving_grace_s=1.0),
                    rebalance=RebalancePolicy(time_constant_s=LOAD_TIME_CONSTANT_S),
                ),
                timings=DetectorTimings(
                    silence=SilenceTimings(override_s=self.sizes.suspicion_window_s),
                    reregister_timeout_s=0.4 * LEASE_TTL_S,
                    mass_expiry_grace_s=LEASE_TTL_S,
                    probe_silence_s=1.2,
                ),
                leader_ttl_s=2.0,
                probe_interval_s=0.5,
                urgent_probe_interval_s=0.02,
                counts_interval_s=0.5 if self.loads is not None else 0.0,
                metrics=Metrics(),
            )
        )
        report_offer = driver._reporter.report_offer

        def on_offer(offered: PublishMap) -> None:
            self.on_offer(offered)
            report_offer(offered)

        driver._reporter.report_offer = on_offer  # type: ignore[method-assign]
        self.drivers[process] = driver
        self.spawn(driver.run(asyncio.Event()), process)

    def kill_control_plane(self, number: int) -> None:
        process = self.control_planes[number]
        if process is not None and not process.dead:
            kill(process)

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.etcd.expire()

    async def _run_gateway(self) -> None:
        store = self.store(self._gateway_process.host)
        async with asyncio.TaskGroup() as tasks:
            leased = LeasedKeys(store, ttl_s=LEASE_TTL_S)
            self.gateway = SessionDriver(
                caller=gateway_caller("gateway", self._gateway_key()),
                access=ACCESS,
                clock=self.clock,
                keys=self.keys,
                leased=leased,
                metrics=GatewayMetrics(),
                policy=SessionPolicy(no_rank_timeout_s=120.0, losses_max=20, refusals_max=200),
                routing=PrefixAffinity(),
                tasks=tasks,
            )
            watch = ClusterWatch(store=store, keys=self.keys, listeners=(self.gateway.on_view,))
            tasks.create_task(leased.run())
            tasks.create_task(watch.run())
            tasks.create_task(self.gateway.run_probes())

    def _gateway_key(self) -> bytes:
        return (self.seed + (self._num_gateways_killed << 64)).to_bytes(16)

    async def replace_gateway(self) -> None:
        """Kills the gateway. Returns when another one serves."""
        kill(self._gateway_process)
        self._num_gateways_killed += 1
        self._gateway_process = SimProcess("gateway", "host-gateway")
        del self.gateway
        self.spawn(self._run_gateway(), self._gateway_process)
        await self.until(self.all_live, 10.0)

    async def _run_agent(self, rank: int) -> None:
        host = self.host_of_rank(rank)
        agent = self.agents[rank] = SimAgent(
            ranks=(RankId(rank),) if rank < self.sizes.num_ranks else (),
            node=host,
            store=self.store(host),
            keys=self.keys,
            clock=self.clock,
            lease_ttl_s=LEASE_TTL_S,
            spawn=self._start_rank,
            rng=self.rng,
        )
        await agent.run()

    def _start_rank(self, member: Member, lease_id: int, host: str) -> SimProcess:
        process = SimProcess(f"rank-{member}", host)
        config = RankConfig(
            rank=member.rank,
            incarnation=member.incarnation,
            lease_id=lease_id,
            node=process.host,
            instance=self.keys.instance,
            control_host=process.host,
            kv_tokens=512,
            kv_block_tokens=4,
            step_tokens_max=16,
            prefill_chunk_tokens=8,
            mixed_prefill_tokens=6,
            tenant_step_tokens=-1 if self.sizes.cards else 4,
            tenant_host_rows=2 if self.sizes.cards else -1,
            running_max=8,
            waiting_max=64,
            timings=Timings(lease_ttl_s=LEASE_TTL_S),
            **self._card_options(),
        )
        store = self.store(process.host)

        async def run_rank() -> None:
            await asyncio.sleep(self.rng.uniform(0.01, 0.3))  # reading the model
            rank = build_rank(
                loop=self.loop,
                access=ACCESS,
                process=process,
                copies=self.copies,
                member=member,
                lease_id=lease_id,
                config=config,
                spec=self.spec,
                store=store,
                build_hardware=self._build_hardware,
            )
            self.ranks[member] = rank
            try:
                process.exit_code = await rank.run()
            except Exception:
                if not process.device_failed:
                    raise
                process.exit_code = 1
            else:
                if not process.device_failed:
                    self.on_exit(rank.member)
            self.loop.call_soon(kill, process)

        self.processes[member] = process
        self.spawn(run_rank(), process)
        return process

    def _build_hardware(self, context: HardwareContext) -> Hardware:
        if self.cards is None:
            return self._watched(context, build_cpu_hardware(self.hub, context))
        return self._watched(context, self.cards.build_hardware(context))

    def _watched(self, context: HardwareContext, hardware: Hardware) -> Hardware:
        """Of the incarnation of `context`."""
        self.engine_executors[context.member] = context.host
        loader = WatchedLoader(
            context.member,
            hardware.loader,
            hardware.residents,
            lambda *load: self.on_load(*load),
        )

        def renew(member: Member) -> Hardware:
            """The process of `context` goes on as `member`."""
            assert hardware.renew is not None
            renewed = hardware.renew(member)
            self.on_exit(context.member)
            self.processes[member] = context.process
            self.ranks[member] = self.ranks[context.member]
            return self._watched(replace(context, member=member), renewed)

        counter = None if self.loads is None else SimExpertCounter(self.loads, context.clock)
        return replace(
            hardware,
            loader=loader,
            renew=renew,
            expert_counter=counter,
            computes_on_demand=self.loads is not None and self.cards is None,
        )

    def _build_cards(self) -> SimCards | None:
        if self.sizes.cards is None:
            return None
        from tests.sim.sim_card_rank import SimCards  # imports torch

        return SimCards(self.loop, self.sizes.cards, self.sizes.num_hosts, self.seed)

    def _card_options(self) -> dict[str, Any]:
        return {} if self.cards is None else self.cards.options()

    def _on_callback_error(self, _: object, context: dict[str, Any]) -> None:
        """What a device or a link raised: nobody awaits it."""
        if "Exception in callback" in context["message"]:
            self.crashes.append(context["exception"])

    # Clients.

    def send(self, prompt: tuple[int, ...], num_tokens: int) -> ClientSession:
        client = ClientSession(prompt=prompt, num_tokens=num_tokens)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        scheduling = DEFAULT_SCHEDULING
        if self.cards is None and self.seed % SEEDS_PER_TENANTS == 1:
            scheduling = scheduling_of(len(self.clients))
        client.session = in_process(self._gateway_process).run(
            lambda: self.gateway.open(prompt, sampling, lambda *_: None, scheduling=scheduling)
        )
        self.clients.append(client)
        return client

    def open(
        self, prompt: tuple[int, ...], sampling: SamplingParams, **fields: Any
    ) -> StreamSession:
        """A session that is not among the `clients`. `fields` are those of `SessionDriver.open`."""
        return in_process(self._gateway_process).run(
            lambda: self.gateway.open(prompt, sampling, lambda *_: None, **fields)
        )

    def cancel(self, client: ClientSession) -> None:
        assert client.session is not None
        client.cancelled = True
        in_process(self._gateway_process).run(self.gateway.cancel, client.session)

    # Waiting.

    def all_live(self) -> bool:
        """Every rank's present life is a member, as the gateway sees it."""
        if not hasattr(self, "gateway"):
            return False
        members = set(self.gateway.view.members)
        ranks = range(self.sizes.num_ranks)
        return len(self.agents) == self.sizes.num_hosts and all(
            self.agents[rank].member in members for rank in ranks
        )

    def all_ended(self) -> bool:
        return all(c.session is not None and c.session.ended for c in self.clients)

    def map_revision(self) -> int:
        """Of the map that stands in etcd, whoever has seen it."""
        found = self.etcd.values.get(self.keys.map)
        return found.mod_revision if found else 0

    def check(self) -> None:
        """Raises what a service raised that should not have, or AssertionError if an invariant has
        fallen: nothing that comes later can mend that."""
        if self.crashes:
            raise self.crashes[0]
        assert not self.violations, self.violations[0]

    async def until(self, condition: Any, timeout_s: float) -> None:
        deadline = self.clock.now() + timeout_s
        while not condition():
            self.check()
            if self.clock.now() > deadline:
                raise TimeoutError(f"{condition.__name__} does not come true: {self.describe()}")
            await asyncio.sleep(0.02)
        self.check()

    def describe(self) -> str:
        sessions = [
            f"{c.session.id}:{c.session.state.value}:{len(c.session.emitted)}/{c.num_tokens}"
            f"@{c.session.member}"
            for c in self.clients
            if c.session is not None and not c.session.ended
        ]
        view = self.gateway.view
        lives = [
            f"{agent.member}{'' if self.process_of(rank) else '†'}"
            for rank, agent in self.agents.items()
        ]
        members = [str(m) for m in view.members]
        return f"epoch {view.epoch} members {members} processes {lives} open {sessions}"
