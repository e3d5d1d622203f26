"""The exchange between CPU ranks: messages are written to the peers' regions, over Mooncake or
through memory that both ranks map, and this rank waits for those in its own.

Messages to peers are sent before the rank copies its own part. A write that fails raises one
suspicion. The rank then waits on: for a newer epoch, or until the link is open again, when it sends
the message once more, to the new region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange import packing, traffic
from gpu_worker.exchange.backoff import Backoff, reduce_timer_slack
from gpu_worker.exchange.expert_counter import HostExpertCounter
from gpu_worker.exchange.header import own_record
from gpu_worker.exchange.interface import Dispatched, StepMonitor
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import ExchangePhase, make_stamp, message_buffer_index
from gpu_worker.exchange.outbox import WriteStatus
from gpu_worker.exchange.peer import Peer
from gpu_worker.exchange.peer_table import PeerTable
from gpu_worker.exchange.replica_policy import ReplicaChoice, choose_replicas
from gpu_worker.exchange.wait_policy import WaitPolicy
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, Step, SuspicionReason

_SLEEP_NS = 1_000_000
"""A rank that waits for ranks of its host looks around so often, whatever rings."""


class TransferExchange:
    """One rank's end. Implements `interface.Exchange`. A result is valid until the next call of the
    same method."""

    def __init__(
        self,
        endpoint: TransferEndpoint,
        member: Member,
        monitor: StepMonitor,
        clock: Clock,
        exchange_deadline_ms: float,
        counter: HostExpertCounter | None = None,
    ) -> None:
        """At most one for each endpoint. It adds to `counter`, which has the map's sizes."""
        layout = endpoint.layout
        self._endpoint = endpoint
        self._member = member
        self._layout = layout
        self._wait_policy = WaitPolicy(monitor, clock, exchange_deadline_ms)
        self._clock = clock
        self._expert_counter = counter
        self._peers: dict[Member, Peer] = {}
        self._choice: ReplicaChoice | None = None
        self._routes = packing.Routes(1, 0, 1)
        self._own_1 = own_record(member, layout)
        self._table = PeerTable([])
        self._epoch = Epoch(0)
        self._step = Step(0)
        self._num_tokens = 0
        self._ordinal = -1
        self._x_MH = np.empty((0, layout.hidden_size), dtype=np.float32)
        self._rows_N = np.empty(0, dtype=np.int32)
        self._slots_N = np.empty(0, dtype=np.int32)
        shape = (layout.step_tokens_max, layout.top_k, layout.hidden_size)
        self._y_TKH = np.empty(shape, dtype=np.float32)
        traffic.compile_all(layout.hidden_size, layout.top_k)

    def adopt(self, expert_map: ExpertMap) -> None:
        """Waits until no write of an earlier epoch is pending to a member, and until every member's
        link is open. Raises StepAbandoned if a newer map arrives meanwhile."""
        assert expert_map.has(self._member), f"{self._member} is no member of the map"
        reduce_timer_slack()
        for member in [m for m in self._peers if not expert_map.has(m)]:
            self._peers.pop(member).close()
        others = [m for m in sorted(expert_map.members) if m != self._member]
        peers = {m: self._peers.get(m) or Peer(self._endpoint, m, self._own_1) for m in others}
        self._peers = peers
        self._epoch = expert_map.epoch
        self._wait_policy.begin_step(expert_map.epoch, Step(0))
        self._wait(list(peers.values()), Peer.drain)
        self._table = PeerTable(list(peers.values()))
        self._choice = choose_replicas(expert_map, self._member.rank, self._endpoint.replica_policy)
        self._own_1[0]["num_slots"] = expert_map.computed.shape[2]
        if self._expert_counter is None:
            sizes = (expert_map.num_layers, expert_map.num_experts)
            self._expert_counter = HostExpertCounter(*sizes, spread=False)
        limits = self._layout
        self._routes = packing.Routes(expert_map.num_ranks, limits.step_tokens_max, limits.top_k)
        self._ordinal = -1

    def close(self) -> None:
        """Releases the memory of all outboxes. The exchange is not used any more."""
        while self._peers:
            self._peers.popitem()[1].close()

    def begin_step(
        self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool, knows_next: bool = False
    ) -> None:
        assert epoch == self._epoch, f"step of epoch {epoch} under the map of {self._epoch}"
        if num_tokens > self._layout.step_tokens_max:
            raise ValueError(f"{num_tokens} tokens exceed {self._layout.step_tokens_max} a step")
        self._step = step
        self._num_tokens = num_tokens
        own = self._own_1[0]
        own["num_tokens"], own["has_work"], own["knows_next"] = num_tokens, has_work, knows_next
        self._wait_policy.begin_step(epoch, step)

    @property
    def may_change_map(self) -> bool:
        """A new map's first messages go to the buffers of even ordinals."""
        return self._ordinal % 2 == 1

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        self._wait_policy.check_epoch()
        self._ordinal += 1
        x_TH = np.ascontiguousarray(x_TH)
        self._route(layer, np.ascontiguousarray(experts_TK))
        message = self._message(layer, ExchangePhase.DISPATCH)
        self._table.release_regions()
        self._claim(message.buffer)
        r, table = self._routes, self._table
        routes = (x_TH, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
        heads_out_P = table.heads_out_4P[message.buffer]
        traffic.write_dispatches(self._own_1, table.peer_P, heads_out_P, message.stamp, *routes)
        self._commit(message.buffer)
        self._receive(message)
        num_rows, num_pairs, any_tokens, any_work, all_know_next = traffic.sum_dispatches(
            self._own_1, table.peer_P, r.counts_R2
        )
        self._reserve(num_rows, num_pairs)
        arrived = (self._x_MH, self._rows_N, self._slots_N)
        self._require_intact(
            traffic.read_dispatches(self._own_1, table.peer_P, message.stamp, *routes, *arrived)
        )
        assert self._expert_counter is not None, "dispatch before adopt"
        self._expert_counter.computed_L[layer] += num_pairs
        return Dispatched(
            x_MH=self._x_MH[:num_rows],
            rows_N=self._rows_N[:num_pairs],
            slots_N=self._slots_N[:num_pairs],
            any_tokens=any_tokens,
            any_work=any_work,
            all_know_next=all_know_next,
        )

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        self._wait_policy.check_epoch()
        message = self._message(layer, ExchangePhase.COMBINE)
        self._table.release_regions()
        self._claim(message.buffer)
        r, table = self._routes, self._table
        y_TKH = self._y_TKH[: self._num_tokens]
        y_PH = y_TKH.reshape(-1, self._layout.hidden_size)
        heads_out_P = table.heads_out_4P[message.buffer]
        traffic.write_combines(
            self._own_1,
            table.peer_P,
            heads_out_P,
            message.stamp,
            np.ascontiguousarray(y_NH),
            r.counts_R2,
            r.flat_RN,
            y_PH,
        )
        self._commit(message.buffer)
        self._receive(message)
        self._require_intact(
            traffic.read_combines(
                self._own_1, table.peer_P, message.stamp, r.counts_R2, r.flat_RN, y_PH
            )
        )
        return y_TKH

    def _message(self, layer: int, phase: ExchangePhase) -> _Message:
        return _Message(
            int(phase),
            message_buffer_index(phase, self._ordinal),
            make_stamp(self._epoch, self._step, layer, phase),
        )

    def _route(self, layer: int, experts_TK: NDArray[np.int32]) -> None:
        assert self._choice is not None, "dispatch before adopt"
        assert self._expert_counter is not None, "dispatch before adopt"
        assert experts_TK.shape == (self._num_tokens, self._layout.top_k), "not the step's tokens"
        r = self._routes
        if not packing.route(
            experts_TK,
            self._choice.rank_LUE[layer],
            self._choice.slot_LUE[layer],
            self._expert_counter.chosen_LE[layer],
            r.flat_RN,
            r.row_RN,
            r.slot_RN,
            r.token_RM,
            r.counts_R2,
        ):
            raise ValueError(f"a token of layer {layer} asks for an expert that no rank holds")

    def _claim(self, index: int) -> None:
        """Waits until the message buffer may be written for every peer: at once, unless one hangs
        to which messages go over the network."""
        for p in self._table.over_network:
            outbox = self._table.peers[p].outbox
            if outbox.poll_write(index) is WriteStatus.PENDING:
                self._wait([self._table.peers[p]], partial(_is_writable, index))

    def _commit(self, index: int) -> None:
        """Sends what goes over the network."""
        for p in self._table.over_network:
            nbytes = int(self._table.peer_P["sent"][p])
            if nbytes:
                self._table.peers[p].outbox.commit(index, nbytes)
                self._check(self._table.peers[p])

    def _check(self, peer: Peer) -> None:
        if failure := peer.report_failure():
            self._wait_policy.suspect(peer.rank, SuspicionReason.LINK, failure)

    def _receive(self, message: _Message) -> None:
        """Waits for a message from each peer that owes one. Raises StepAbandoned."""
        if self._is_there(message, sleep_ns=0):
            return
        self._wait_policy.begin_wait()
        backoff = Backoff(self._clock)
        while True:
            self._wait_policy.watch(self._missing(message))
            if self._is_there(message, sleep_ns=_SLEEP_NS):
                break
            if self._table.rings or backoff.wait_once():
                self._maintain()
                self._require_present(message)
        self._wait_policy.end_wait()

    def _missing(self, message: _Message) -> list[RankId]:
        ranks = traffic.missing_ranks(message.phase, self._table.peer_P, self._routes.counts_R2)
        return [RankId(rank) for rank in ranks]

    def _require_present(self, message: _Message) -> None:
        """Raises StepAbandoned if a rank that owes a message has moved on. One that has may have
        sent it just before, so it is looked for once more. If another one has, who owes it may only
        be slow, until it is late: then the others will not have waited for it either."""
        left = {peer.rank for peer in self._table.peers if peer.has_left(self._epoch)}
        if not left or self._is_there(message, sleep_ns=0):
            return
        if not self._wait_policy.is_late:
            left.intersection_update(self._missing(message))
        if left:
            raise StepAbandoned(f"rank {min(left)} has left epoch {self._epoch}")

    def _is_there(self, message: _Message, *, sleep_ns: int) -> bool:
        return traffic.receive(
            message.phase,
            self._own_1,
            self._table.peer_P,
            self._table.heads_4PG[message.buffer],
            self._routes.counts_R2,
            message.stamp,
            sleep_ns,
        )

    def _wait(self, peers: Sequence[Peer], is_done: Callable[[Peer], bool]) -> None:
        """Raises StepAbandoned."""
        missing = [peer for peer in peers if not is_done(peer)]
        if not missing:
            return
        self._wait_policy.begin_wait()
        backoff = Backoff(self._clock)
        while missing:
            self._wait_policy.watch([peer.rank for peer in missing])
            backoff.wait_once()
            missing = [peer for peer in missing if not is_done(peer)]
        self._wait_policy.end_wait()

    def _maintain(self) -> None:
        for peer in self._table.peers:
            peer.maintain()
        self._table.update()
        for peer in self._table.peers:
            self._check(peer)

    def _reserve(self, num_rows: int, num_pairs: int) -> None:
        if num_rows > self._x_MH.shape[0]:
            self._x_MH = np.empty((2 * num_rows, self._layout.hidden_size), dtype=np.float32)
        if num_pairs > self._rows_N.shape[0]:
            self._rows_N = np.empty(2 * num_pairs, dtype=np.int32)
            self._slots_N = np.empty(2 * num_pairs, dtype=np.int32)

    def _require_intact(self, rank: int) -> None:
        """`rank` is that of a malformed message. One that was overwritten while it was read is so,
        which only a peer in a later epoch does. Raises StepAbandoned."""
        if rank != traffic.ALL_INTACT:
            detail = "its message was malformed, or overwritten while it was read"
            self._wait_policy.suspect(RankId(rank), SuspicionReason.EXCHANGE, detail)
            raise StepAbandoned(f"rank {rank}: {detail}")


class _Message(NamedTuple):
    """The messages of one exchange: `buffer` is the index of their buffers."""

    phase: int
    buffer: int
    stamp: int


def _is_writable(index: int, peer: Peer) -> bool:
    return peer.outbox.poll_write(index) is not WriteStatus.PENDING
