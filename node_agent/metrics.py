"""A node agent's Prometheus metrics: of its own work, and of its host's ranks, which have no HTTP
port. It asks them over their control ports when somebody reads the metrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.exit_codes import EXIT_DEVICE_LOST, EXIT_FENCED
from shared.handshake import Access
from shared.rank_query import query_ranks
from shared.records import RankRecord
from shared.types import Epoch, Incarnation, NodeId, RankId
from shared.version import starfish_version
from shared.wire import StatusReply

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_EXITS = {EXIT_FENCED: "fenced", EXIT_DEVICE_LOST: "device_lost", 0: "stopped", None: "unknown"}


class _RankValue(NamedTuple):
    name: str
    text: str
    read: Callable[[StatusReply], float]


_GAUGES = (
    _RankValue("epoch", "Epoch of the map it runs under", lambda r: r.epoch),
    _RankValue("incarnation", "Number of its incarnation", lambda r: r.incarnation),
    _RankValue("requests_running", "Sequences in its batch", lambda r: r.load.running),
    _RankValue("requests_waiting", "Sequences in its queue", lambda r: r.load.waiting),
    _RankValue("kv_blocks", "KV blocks that it has", lambda r: r.load.kv_blocks),
    _RankValue(
        "kv_blocks_used", "KV blocks in use", lambda r: r.load.kv_blocks - r.load.kv_blocks_free
    ),
    _RankValue(
        "kv_blocks_cached",
        "KV blocks that a later prompt with the same prefix can use",
        lambda r: r.load.kv_blocks_cached,
    ),
    _RankValue(
        "engine_age_seconds",
        "Since its engine last made progress; 0 while it sleeps",
        lambda r: r.engine_age_ms / 1000,
    ),
)
_COUNTERS = (
    _RankValue("steps_committed", "Steps that counted", lambda r: r.steps_committed),
    _RankValue(
        "steps_abandoned",
        "Steps thrown away because a member was lost",
        lambda r: r.steps_abandoned,
    ),
    _RankValue("generated_tokens", "Tokens generated", lambda r: r.tokens_generated),
    _RankValue(
        "drafted_tokens",
        "Tokens drafted by speculative decoding that a step has verified",
        lambda r: r.tokens_drafted,
    ),
    _RankValue("accepted_tokens", "Those that were right", lambda r: r.drafts_accepted),
    _RankValue(
        "prefix_tokens", "Tokens of sequences when they began", lambda r: r.load.prefix_tokens
    ),
    _RankValue(
        "prefix_tokens_cached",
        "Those that the KV cache held",
        lambda r: r.load.prefix_tokens_cached,
    ),
    _RankValue("kv_blocks_restored", "KV blocks filled from replicas", lambda r: r.blocks_restored),
    _RankValue(
        "kv_replicas_rejected",
        "KV replicas kept here that were not what their source had written",
        lambda r: r.load.kv_replicas_rejected,
    ),
)


class AgentMetrics:
    """Its methods are called on the event loop. `access` is what the ranks ask for."""

    def __init__(self, node: NodeId, instance: str, access: Access) -> None:
        self.registry = CollectorRegistry()
        info = Info("starfish_agent", "What this node agent is", registry=self.registry)
        info.info({"node": node, "starfish_instance": instance, "version": starfish_version()})
        self._started = Counter(
            "starfish_agent_ranks_started",
            "Rank processes started; forked: as copies of the fork server",
            ["forked"],
            registry=self.registry,
        )
        self._exits = Counter(
            "starfish_agent_rank_exits",
            "Rank processes that ended",
            ["how"],
            registry=self.registry,
        )
        for how in (*_EXITS.values(), "signal", "error"):
            self._exits.labels(how)
        self._recovery_s = Histogram(
            "starfish_rank_recovery_seconds",
            "of this host's ranks after a death; adopt: from the arrival of the map until they run "
            "under it, replay: from then to the first committed step",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        for phase in ("adopt", "replay"):
            self._recovery_s.labels(phase)
        self._access = access
        self._records: dict[RankId, RankRecord] = {}
        self._counted: dict[RankId, tuple[Incarnation, Epoch]] = {}  # the newest recovery
        self._ranks = RankCollector(node)
        self.registry.register(self._ranks)

    def on_record(self, record: RankRecord) -> None:
        """One of this host's ranks has registered."""
        known = self._records.get(record.rank)
        if known is None or record.incarnation >= known.incarnation:
            self._records[record.rank] = record

    def on_started(self, *, is_forked: bool) -> None:
        self._started.labels(str(is_forked).lower()).inc()

    def on_exit(self, exit_code: int | None) -> None:
        """A code below 0 is a signal's."""
        how = "signal" if exit_code is not None and exit_code < 0 else "error"
        self._exits.labels(_EXITS.get(exit_code, how)).inc()

    async def update(self) -> None:
        """Asks the ranks. One that does not answer within a second is down."""
        records = list(self._records.values())
        replies = await query_ranks(records, self._access, asker="agent")
        self._ranks.replies = replies
        self._ranks.pids = {record.rank: record.pid for record in records}
        for rank, reply in replies.items():
            if reply is not None:
                self.count_recoveries(rank, reply)

    def count_recoveries(self, rank: RankId, reply: StatusReply) -> None:
        """Each once, when it is over. A rank remembers its last few changes of epoch; it has
        recovered in those for which it threw a step away."""
        newest = self._counted.get(rank, (Incarnation(0), Epoch(0)))
        for adoption in reply.adoptions:
            at = reply.incarnation, adoption.epoch
            if at <= newest or not adoption.replayed_at:
                continue
            newest = at
            if adoption.abandoned:
                adopt_s = adoption.adopted_at - adoption.seen_at
                self._recovery_s.labels("adopt").observe(adopt_s)
                replay_s = adoption.replayed_at - adoption.adopted_at
                self._recovery_s.labels("replay").observe(replay_s)
        self._counted[rank] = newest


class RankCollector(Collector):
    """What the ranks answered last."""

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self.replies: Mapping[RankId, StatusReply | None] = {}
        self.pids: Mapping[RankId, int] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        answers = {rank: reply for rank, reply in self.replies.items() if reply is not None}
        up = self._gauge("up", "1 if the rank answers")
        for rank in self.replies:
            up.add_metric(self._labels(rank), rank in answers)
        yield up
        memory = self._gauge("resident_bytes", "Memory of its process that is in RAM")
        descriptors = self._gauge("open_descriptors", "Open files and sockets of its process")
        for rank, pid in self.pids.items():
            if (found := _process_use(pid)) is not None:
                memory.add_metric(self._labels(rank), found[0])
                descriptors.add_metric(self._labels(rank), found[1])
        yield from (memory, descriptors)
        for value in _GAUGES:
            gauge = self._gauge(value.name, value.text)
            for rank, reply in answers.items():
                gauge.add_metric(self._labels(rank), value.read(reply))
            yield gauge
        for value in _COUNTERS:
            counter = CounterMetricFamily(
                "starfish_rank_" + value.name, value.text, labels=["rank", "node"]
            )
            for rank, reply in answers.items():
                counter.add_metric(self._labels(rank), value.read(reply))
            yield counter

    def _gauge(self, name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily("starfish_rank_" + name, text, labels=["rank", "node"])

    def _labels(self, rank: RankId) -> list[str]:
        return [str(rank), self._node]


def _process_use(pid: int) -> tuple[int, int] | None:
    """(resident bytes, open descriptors); None if there is no such process of ours."""
    process = Path("/proc") / str(pid)
    try:
        pages = int((process / "statm").read_text().split()[1])
        return pages * _PAGE_BYTES, len(os.listdir(process / "fd"))
    except (OSError, ValueError, IndexError):
        return None
