"""The exchange over Mooncake: one-sided writes to the peers' regions, and polling of this rank's
own.

Messages to peers are sent before the rank copies its own part. A write that fails raises one
suspicion. The rank then waits on: for a newer epoch, or until the link is open again, when it sends
the message once more, to the new region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange import packing
from gpu_worker.exchange.backoff import Backoff, reduce_timer_slack
from gpu_worker.exchange.expert_counter import HostExpertCounter
from gpu_worker.exchange.interface import Dispatched, StepMonitor
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import (
    ExchangePhase,
    Header,
    combine_rows,
    make_stamp,
    message_buffer_index,
    seal,
)
from gpu_worker.exchange.outbox import Outbox, WriteStatus
from gpu_worker.exchange.peer import Peer
from gpu_worker.exchange.replica_policy import ReplicaChoice, choose_replicas
from gpu_worker.exchange.wait_policy import WaitPolicy
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, Step, SuspicionReason


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
        self._order: list[Peer | None] = []  # all members by rank; None is this rank
        self._choice: ReplicaChoice | None = None
        self._routes = packing.Routes(1, 0, 1)
        self._counts: list[list[int]] = []  # per rank: rows and pairs sent to it
        self._num_slots = 0
        self._epoch = Epoch(0)
        self._step = Step(0)
        self._num_tokens = 0
        self._has_work = False
        self._ordinal = -1
        self._x_MH = np.empty((0, layout.hidden_size), dtype=np.float32)
        self._rows_N = np.empty(0, dtype=np.int32)
        self._slots_N = np.empty(0, dtype=np.int32)
        shape = (layout.step_tokens_max, layout.top_k, layout.hidden_size)
        self._y_TKH = np.empty(shape, dtype=np.float32)
        packing.compile_all(layout.hidden_size, layout.top_k)

    def adopt(self, expert_map: ExpertMap) -> None:
        """Waits until no write of an earlier epoch is pending to a member, and until every member's
        link is open. Raises StepAbandoned if a newer map arrives meanwhile."""
        assert expert_map.has(self._member), f"{self._member} is no member of the map"
        reduce_timer_slack()
        for member in [m for m in self._peers if not expert_map.has(m)]:
            self._peers.pop(member).close()
        others = [m for m in sorted(expert_map.members) if m != self._member]
        peers = {m: self._peers.get(m) or Peer(self._endpoint, m) for m in others}
        self._peers = peers
        self._epoch = expert_map.epoch
        self._wait_policy.begin_step(expert_map.epoch, Step(0))
        self._wait(list(peers.values()), Peer.drain)
        self._order = [peers.get(m) for m in sorted(expert_map.members)]
        self._choice = choose_replicas(expert_map, self._member.rank, self._endpoint.replica_policy)
        self._num_slots = expert_map.computed.shape[2]
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

    def begin_step(self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool) -> None:
        assert epoch == self._epoch, f"step of epoch {epoch} under the map of {self._epoch}"
        if num_tokens > self._layout.step_tokens_max:
            raise ValueError(f"{num_tokens} tokens exceed {self._layout.step_tokens_max} a step")
        self._step = step
        self._num_tokens = num_tokens
        self._has_work = has_work
        self._wait_policy.begin_step(epoch, step)

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        self._wait_policy.check_epoch()
        self._ordinal += 1
        x_TH = np.ascontiguousarray(x_TH)
        self._route(layer, np.ascontiguousarray(experts_TK))
        stamp = make_stamp(self._epoch, self._step, layer, ExchangePhase.DISPATCH)
        index = message_buffer_index(ExchangePhase.DISPATCH, self._ordinal)
        for peer in self._peers.values():
            self._send_dispatch(peer, index, stamp, x_TH)
        self._receive(list(self._peers.values()), lambda peer: peer.find_dispatch(index, stamp))
        dispatched = self._gather(x_TH)
        assert self._expert_counter is not None, "dispatch before adopt"
        self._expert_counter.computed_L[layer] += dispatched.slots_N.shape[0]
        return dispatched

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        self._wait_policy.check_epoch()
        stamp = make_stamp(self._epoch, self._step, layer, ExchangePhase.COMBINE)
        index = message_buffer_index(ExchangePhase.COMBINE, self._ordinal)
        first, own = 0, slice(0, 0)
        for peer in self._order:
            count = self._counts[self._member.rank][1] if peer is None else peer.header.num_pairs
            rows = slice(first, first + count)
            first += count
            if peer is None:
                own = rows
            elif count:
                self._send_combine(peer, index, stamp, y_NH[rows])
        y_TKH = self._y_TKH[: self._num_tokens]
        y_PH = y_TKH.reshape(-1, self._layout.hidden_size)
        own_NH = np.ascontiguousarray(y_NH[own])
        packing.scatter_rows(own_NH, self._routes.flat_RN, self._member.rank, y_PH)
        helpers = [p for p in self._peers.values() if self._counts[p.rank][1]]
        sent = self._counts
        self._receive(helpers, lambda p: p.find_combine(index, stamp, sent[p.rank][1]))
        for peer in helpers:
            rows_NH = combine_rows(peer.message_buffer, self._layout, self._counts[peer.rank][1])
            packing.scatter_rows(rows_NH, self._routes.flat_RN, peer.rank, y_PH)
        return y_TKH

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
        self._counts = r.counts_R2.tolist()

    def _send_dispatch(self, peer: Peer, index: int, stamp: int, x_TH: NDArray[np.float32]) -> None:
        outbox = self._claim(peer, index)
        message_buffer = outbox.message_buffer(index)
        rows, pairs = self._counts[peer.rank]
        r = self._routes
        if pairs:
            packing.write_dispatch(
                message_buffer.words,
                message_buffer.floats,
                x_TH,
                r.row_RN,
                r.slot_RN,
                r.token_RM,
                peer.rank,
                rows,
                pairs,
            )
        header = Header(self._num_tokens, rows, pairs, self._has_work)
        outbox.commit(
            index,
            seal(message_buffer, self._layout, ExchangePhase.DISPATCH, stamp, self._member, header),
        )
        self._check(peer)

    def _send_combine(self, peer: Peer, index: int, stamp: int, y_NH: NDArray[np.float32]) -> None:
        outbox = self._claim(peer, index)
        message_buffer = outbox.message_buffer(index)
        count = y_NH.shape[0]
        combine_rows(message_buffer, self._layout, count)[:] = y_NH
        header = Header(self._num_tokens, count, count, self._has_work)
        outbox.commit(
            index,
            seal(message_buffer, self._layout, ExchangePhase.COMBINE, stamp, self._member, header),
        )
        self._check(peer)

    def _claim(self, peer: Peer, index: int) -> Outbox:
        """The outbox, once its buffer `index` may be written: at once, unless the peer hangs."""
        outbox = peer.outbox
        if outbox.poll_write(index) is WriteStatus.PENDING:
            self._wait([peer], lambda _: outbox.poll_write(index) is not WriteStatus.PENDING)
        return outbox

    def _check(self, peer: Peer) -> None:
        if failure := peer.report_failure():
            self._wait_policy.suspect(peer.rank, SuspicionReason.LINK, failure)

    def _receive(self, peers: Sequence[Peer], is_there: Callable[[Peer], bool]) -> None:
        """Waits for a message from each peer. Raises StepAbandoned."""
        self._wait(peers, is_there, self._maintain)

    def _wait(
        self,
        peers: Sequence[Peer],
        is_done: Callable[[Peer], bool],
        maintain: Callable[[], None] | None = None,
    ) -> None:
        missing = [peer for peer in peers if not is_done(peer)]
        if not missing:
            return
        self._wait_policy.begin_wait()
        backoff = Backoff(self._clock)
        while missing:
            self._wait_policy.watch([peer.rank for peer in missing])
            if backoff.wait_once() and maintain is not None:
                maintain()
            missing = [peer for peer in missing if not is_done(peer)]
        self._wait_policy.end_wait()

    def _maintain(self) -> None:
        for peer in self._peers.values():
            peer.maintain()
            self._check(peer)
            if peer.has_left(self._epoch):
                raise StepAbandoned(f"rank {peer.rank} has left epoch {self._epoch}")

    def _gather(self, x_TH: NDArray[np.float32]) -> Dispatched:
        """All rows and pairs that arrived, in the order of ranks. Raises StepAbandoned if a message
        was overwritten meanwhile, which only a peer in a later epoch does."""
        own_rows, own_pairs = self._counts[self._member.rank]
        headers = [p.header for p in self._order if p is not None]
        num_rows = own_rows + sum(h.num_rows for h in headers)
        num_pairs = own_pairs + sum(h.num_pairs for h in headers)
        self._reserve(num_rows, num_pairs)
        row = pair = 0
        for peer in self._order:
            if peer is None:
                self._take_own(x_TH, row, pair)
                row, pair = row + own_rows, pair + own_pairs
            else:
                self._take(peer, row, pair)
                row, pair = row + peer.header.num_rows, pair + peer.header.num_pairs
        return Dispatched(
            x_MH=self._x_MH[:num_rows],
            rows_N=self._rows_N[:num_pairs],
            slots_N=self._slots_N[:num_pairs],
            any_tokens=self._num_tokens > 0 or any(h.num_tokens > 0 for h in headers),
            any_work=self._has_work or any(h.has_work for h in headers),
        )

    def _reserve(self, num_rows: int, num_pairs: int) -> None:
        if num_rows > self._x_MH.shape[0]:
            self._x_MH = np.empty((2 * num_rows, self._layout.hidden_size), dtype=np.float32)
        if num_pairs > self._rows_N.shape[0]:
            self._rows_N = np.empty(2 * num_pairs, dtype=np.int32)
            self._slots_N = np.empty(2 * num_pairs, dtype=np.int32)

    def _take_own(self, x_TH: NDArray[np.float32], row: int, pair: int) -> None:
        r = self._routes
        rank = self._member.rank
        rows, pairs = self._counts[rank]
        if pairs:
            packing.take_own(
                x_TH,
                r.row_RN,
                r.slot_RN,
                r.token_RM,
                rank,
                rows,
                pairs,
                self._x_MH,
                self._rows_N,
                self._slots_N,
                row,
                pair,
            )

    def _take(self, peer: Peer, row: int, pair: int) -> None:
        message_buffer, header = peer.message_buffer, peer.header
        if not header.num_pairs:
            return
        stamp = message_buffer.stamps[0]
        intact = packing.read_dispatch(
            message_buffer.words,
            message_buffer.floats,
            header.num_rows,
            header.num_pairs,
            self._num_slots,
            self._x_MH,
            self._rows_N,
            self._slots_N,
            row,
            pair,
        )
        if not intact or message_buffer.stamps[0] != stamp:
            detail = "its dispatch was malformed, or overwritten while it was read"
            self._wait_policy.suspect(peer.rank, SuspicionReason.EXCHANGE, detail)
            raise StepAbandoned(f"rank {peer.rank}: {detail}")
