"""The exchange over Mooncake: one-sided writes into the peers' areas, and polling of our own.

Peers are served first, then the rank's own part. While a rank waits it yields the CPU, later it
sleeps, so that a dead peer does not cost a core. A write that fails raises one suspicion; the rank
goes on waiting, for a newer epoch or for the link to be opened anew, and then sends the message
again into the fresh area.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange import packing
from gpu_worker.exchange.areas import Area
from gpu_worker.exchange.message import (
    FIRST_OF_EPOCH,
    Header,
    Layout,
    Phase,
    Region,
    combine_rows,
    is_of_later_epoch,
    make_stamp,
    read_header,
    region_index,
    seal,
)
from gpu_worker.exchange.outbox import Link, Outbox, Write
from gpu_worker.exchange.replica_choice import ReplicaChoice, choose_replicas
from gpu_worker.exchange.seam import Dispatched
from gpu_worker.exchange.vigil import Vigil
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, Step, SuspicionReason

_YIELD_S = 100e-6
"""How long a wait yields the CPU before it starts to sleep. Longer is quicker on idle cores only:
where ranks share cores, a waiting rank takes them from those it waits for."""
_NAP_S_MIN, _NAP_S_MAX, _NAP_GROWTH = 30e-6, 200e-6, 1.1
_PR_SET_TIMERSLACK, _TIMER_SLACK_NS = 29, 1000
_UPKEEP_S = 0.001
"""How often a wait looks at its own writes and at links opened anew."""


class Endpoint(Protocol):
    """What the exchange needs of the rank's endpoint."""

    def link(self, target: Member) -> Link | None: ...

    def areas_of(self, source: Member) -> tuple[Area, ...]: ...

    def mark_broken(self, link: Link) -> None: ...

    def outbox(self, link: Link) -> Outbox: ...

    def discard(self, outbox: Outbox) -> None: ...


class _Peer:
    """Both directions of the traffic with one peer."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.rank = member.rank
        self.outbox: Outbox | None = None
        self.areas: tuple[Area, ...] = ()
        self.region: Region | None = None  # of the message found last
        self.header = Header(0, 0, 0, False)


class _Pause:
    """One wait's way of passing time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sleep_from = clock.now() + _YIELD_S
        self._upkeep_from = 0.0
        self._nap_s = _NAP_S_MIN

    def rest(self) -> bool:
        """Whether upkeep is due."""
        now = self._clock.now()
        if now < self._sleep_from:
            os.sched_yield()
        else:
            time.sleep(self._nap_s)
            self._nap_s = min(self._nap_s * _NAP_GROWTH, _NAP_S_MAX)
        if now < self._upkeep_from:
            return False
        self._upkeep_from = now + _UPKEEP_S
        return True


def _sharpen_naps() -> None:
    """Linux may prolong each sleep of a thread by 50 µs, more than most of ours last."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


class TransferExchange:
    """One rank's end. See `seam.Exchange`; results are valid until the next call of their kind."""

    def __init__(
        self, endpoint: Endpoint, member: Member, layout: Layout, vigil: Vigil, clock: Clock
    ) -> None:
        self._endpoint = endpoint
        self._member = member
        self._layout = layout
        self._vigil = vigil
        self._clock = clock
        self._peers: dict[Member, _Peer] = {}
        self._order: list[_Peer | None] = []  # all members by rank; None is this rank
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
        """Waits until nothing of an earlier epoch is under way to a peer that stays, and until
        every member's link is open. Raises StepAbandoned where a newer map arrives meanwhile."""
        assert expert_map.has(self._member), f"{self._member} is no member of the map"
        _sharpen_naps()
        for member in [m for m in self._peers if not expert_map.has(m)]:
            outbox = self._peers.pop(member).outbox
            if outbox is not None:
                self._endpoint.discard(outbox)
        others = [m for m in sorted(expert_map.members) if m != self._member]
        peers = {m: self._peers.get(m) or _Peer(m) for m in others}
        self._peers = peers
        self._epoch = expert_map.epoch
        self._vigil.begin_step(expert_map.epoch, Step(0))
        self._settle(list(peers.values()))
        self._order = [peers.get(m) for m in sorted(expert_map.members)]
        self._choice = choose_replicas(expert_map, self._member.rank)
        self._num_slots = expert_map.slots_per_rank
        limits = self._layout
        self._routes = packing.Routes(expert_map.num_ranks, limits.step_tokens_max, limits.top_k)
        self._ordinal = -1

    def begin_step(self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool) -> None:
        assert epoch == self._epoch, f"step of epoch {epoch} under the map of {self._epoch}"
        if num_tokens > self._layout.step_tokens_max:
            raise ValueError(f"{num_tokens} tokens exceed {self._layout.step_tokens_max} a step")
        self._step = step
        self._num_tokens = num_tokens
        self._has_work = has_work
        self._vigil.begin_step(epoch, step)

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        self._vigil.check_epoch()
        self._ordinal += 1
        x_TH = np.ascontiguousarray(x_TH)
        self._route(layer, np.ascontiguousarray(experts_TK))
        stamp = make_stamp(self._epoch, self._step, layer, Phase.DISPATCH)
        index = region_index(Phase.DISPATCH, self._ordinal)
        for peer in self._peers.values():
            self._send_dispatch(peer, index, stamp, x_TH)
        self._receive(list(self._peers.values()), Phase.DISPATCH, stamp)
        return self._gather(x_TH)

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        self._vigil.check_epoch()
        stamp = make_stamp(self._epoch, self._step, layer, Phase.COMBINE)
        index = region_index(Phase.COMBINE, self._ordinal)
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
        self._receive(helpers, Phase.COMBINE, stamp)
        for peer in helpers:
            assert peer.region is not None
            rows_NH = combine_rows(peer.region, self._layout, self._counts[peer.rank][1])
            packing.scatter_rows(rows_NH, self._routes.flat_RN, peer.rank, y_PH)
        return y_TKH

    def close(self) -> None:
        for peer in self._peers.values():
            if peer.outbox is not None:
                self._endpoint.discard(peer.outbox)
        self._peers = {}
        self._order = []

    def _route(self, layer: int, experts_TK: NDArray[np.int32]) -> None:
        assert self._choice is not None, "dispatch before adopt"
        assert experts_TK.shape == (self._num_tokens, self._layout.top_k), "not the step's tokens"
        r = self._routes
        if not packing.route(
            experts_TK,
            self._choice.rank_LE[layer],
            self._choice.slot_LE[layer],
            r.flat_RN,
            r.row_RN,
            r.slot_RN,
            r.token_RM,
            r.counts_R2,
        ):
            raise ValueError(f"a token of layer {layer} asks for an expert that no rank holds")
        self._counts = r.counts_R2.tolist()

    def _send_dispatch(
        self, peer: _Peer, index: int, stamp: int, x_TH: NDArray[np.float32]
    ) -> None:
        outbox = self._claim(peer, index)
        region = outbox.region(index)
        rows, pairs = self._counts[peer.rank]
        r = self._routes
        if pairs:
            packing.write_dispatch(
                region.words,
                region.floats,
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
            index, seal(region, self._layout, Phase.DISPATCH, stamp, self._member, header)
        )
        self._check(peer)

    def _send_combine(self, peer: _Peer, index: int, stamp: int, y_NH: NDArray[np.float32]) -> None:
        outbox = self._claim(peer, index)
        region = outbox.region(index)
        count = y_NH.shape[0]
        combine_rows(region, self._layout, count)[:] = y_NH
        header = Header(self._num_tokens, count, count, self._has_work)
        outbox.commit(index, seal(region, self._layout, Phase.COMBINE, stamp, self._member, header))
        self._check(peer)

    def _claim(self, peer: _Peer, index: int) -> Outbox:
        """The outbox, with the part free to be written: it is at once, unless the peer hangs."""
        assert peer.outbox is not None
        if peer.outbox.state(index) is Write.PENDING:
            self._vigil.begin_wait()
            pause = _Pause(self._clock)
            while peer.outbox.state(index) is Write.PENDING:
                self._vigil.watch((peer.rank,))
                pause.rest()
        return peer.outbox

    def _receive(self, missing: list[_Peer], phase: Phase, stamp: int) -> None:
        """Finds each peer's message. Raises StepAbandoned."""
        index = region_index(phase, self._ordinal)
        missing = [p for p in missing if not self._find(p, index, phase, stamp)]
        if not missing:
            return
        self._vigil.begin_wait()
        pause = _Pause(self._clock)
        while missing:
            self._vigil.watch([p.rank for p in missing])
            if pause.rest():
                self._upkeep()
            missing = [p for p in missing if not self._find(p, index, phase, stamp)]
        self._vigil.end_wait()

    def _find(self, peer: _Peer, index: int, phase: Phase, stamp: int) -> bool:
        for area in peer.areas:
            region = area.regions[index]
            if region.stamps[0] != stamp:
                continue
            header = read_header(region, self._layout, phase, stamp, peer.member)
            if header is None or not self._is_expected(peer, phase, header):
                continue
            peer.region, peer.header = region, header if phase is Phase.DISPATCH else peer.header
            return True
        return False

    def _is_expected(self, peer: _Peer, phase: Phase, header: Header) -> bool:
        return phase is Phase.DISPATCH or header.num_rows == self._counts[peer.rank][1]

    def _upkeep(self) -> None:
        """Moves own writes on, sends again over links opened anew, and learns of peers that have
        moved on. Raises StepAbandoned."""
        for peer in self._peers.values():
            if peer.outbox is not None:
                peer.outbox.progress()
                self._check(peer)
            self._renew(peer, send_again=True)
            for area in peer.areas:
                region = area.regions[FIRST_OF_EPOCH]
                head = region.stamps[0]
                if is_of_later_epoch(head, self._epoch) and read_header(
                    region, self._layout, Phase.DISPATCH, head, peer.member
                ):
                    raise StepAbandoned(f"rank {peer.rank} has left epoch {self._epoch}")

    def _check(self, peer: _Peer) -> None:
        if peer.outbox is not None and peer.outbox.broken:
            self._endpoint.mark_broken(peer.outbox.link)
            self._vigil.suspect(peer.rank, SuspicionReason.LINK, peer.outbox.broken)

    def _renew(self, peer: _Peer, *, send_again: bool) -> None:
        """Takes up what the endpoint has opened since: the peer's areas here, our link there."""
        peer.areas = self._endpoint.areas_of(peer.member)
        old = peer.outbox
        link = self._endpoint.link(peer.member)
        if link is None or (old is not None and old.link == link):
            return
        if old is not None and old.progress():
            return
        peer.outbox = self._endpoint.outbox(link)
        if old is not None:
            if send_again:
                peer.outbox.take_over(old)
            self._endpoint.discard(old)

    def _settle(self, peers: Sequence[_Peer]) -> None:
        self._vigil.begin_wait()
        pause = _Pause(self._clock)
        waiting = [p for p in peers if not self._is_settled(p)]
        while waiting:
            self._vigil.watch([p.rank for p in waiting])
            pause.rest()
            waiting = [p for p in waiting if not self._is_settled(p)]
        self._vigil.end_wait()

    def _is_settled(self, peer: _Peer) -> bool:
        if peer.outbox is not None:
            if peer.outbox.progress():
                return False
            peer.outbox.forget_failed()
            self._check(peer)
        self._renew(peer, send_again=False)
        return bool(peer.areas) and peer.outbox is not None and not peer.outbox.broken

    def _gather(self, x_TH: NDArray[np.float32]) -> Dispatched:
        """Everything that arrived, by rank. Raises StepAbandoned where a message was overwritten
        meanwhile: only a peer of a later epoch does that."""
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
        rank: RankId = self._member.rank
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

    def _take(self, peer: _Peer, row: int, pair: int) -> None:
        region, header = peer.region, peer.header
        assert region is not None
        if not header.num_pairs:
            return
        stamp = region.stamps[0]
        intact = packing.read_dispatch(
            region.words,
            region.floats,
            header.num_rows,
            header.num_pairs,
            self._num_slots,
            self._x_MH,
            self._rows_N,
            self._slots_N,
            row,
            pair,
        )
        if not intact or region.stamps[0] != stamp:
            detail = "its dispatch was malformed, or overwritten while it was read"
            self._vigil.suspect(peer.rank, SuspicionReason.EXCHANGE, detail)
            raise StepAbandoned(f"rank {peer.rank}: {detail}")
