"""The compiled part of an exchange: one call sends a message to every peer, waits for one from
every peer, or reads them all, whether they travel over Mooncake or through shared memory. Peers and
this rank are records, messages are addresses; what a peer wrote is checked. The GIL is released.

Shape letters: P peers, in the order of ranks; G regions of a peer, the newest first; R ranks. The
others are those of `interface` and `packing`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gpu_worker.exchange import packing, shared_words
from gpu_worker.exchange.header import find_header, own_record, seal
from gpu_worker.exchange.message import HEADER_BYTES, PAIR_BYTES, ExchangePhase, MessageLayout
from gpu_worker.exchange.shared_words import (
    begin_write,
    has_stamp,
    ints_at,
    ring,
    rows_at,
    wait_for_stamp,
)
from shared.types import Incarnation, Member, RankId

_Ints = NDArray[np.int32]
_Longs = NDArray[np.int64]
_Floats = NDArray[np.float32]
_Records = NDArray[np.void]

_DISPATCH, _COMBINE = int(ExchangePhase.DISPATCH), int(ExchangePhase.COMBINE)
ALL_INTACT = -1

PEER = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("rank", "incarnation"),
            "bell",  # where it rings after each message; 0: its messages come over a network
            "bell_out",  # where this rank rings for it; 0: they go over a network
            "sent",  # bytes of the message that was built last, 0: none
            "found",  # address of the message that was found last; 0: none yet
            # Of its last dispatch:
            *("num_tokens", "num_rows", "num_pairs", "has_work", "knows_next"),
        )
    ]
)


@njit(nogil=True, cache=True)
def write_dispatches(
    own_1: _Records,
    peer_P: _Records,
    head_P: _Longs,
    stamp: int,
    x_TH: _Floats,
    row_RN: _Ints,
    slot_RN: _Ints,
    token_RM: _Ints,
    counts_R2: _Ints,
) -> None:
    """Builds each peer's dispatch at its address, and rings. What goes over a network is sent by
    the caller then."""
    hidden_size = own_1[0].hidden_size
    for p in range(peer_P.size):
        peer, head = peer_P[p], head_P[p]
        num_rows, num_pairs = counts_R2[peer.rank, 0], counts_R2[peer.rank, 1]
        begin_write(head)
        if num_pairs:
            body = head + HEADER_BYTES
            pairs_2N = ints_at(body, 2 * num_pairs)
            rows_MH = rows_at(body + PAIR_BYTES * num_pairs, num_rows, hidden_size)
            packing.write_dispatch(
                pairs_2N, rows_MH, x_TH, row_RN, slot_RN, token_RM, peer.rank, num_rows, num_pairs
            )
        peer.sent = seal(head, own_1, _DISPATCH, stamp, num_rows, num_pairs)
        peer.found = 0
    _ring_all(peer_P)


@njit(nogil=True, cache=True)
def write_combines(
    own_1: _Records,
    peer_P: _Records,
    head_P: _Longs,
    stamp: int,
    y_NH: _Floats,
    counts_R2: _Ints,
    flat_RN: _Longs,
    y_PH: _Floats,
) -> None:
    """As `write_dispatches`, to those that sent pairs: what was computed for them. Copies what is
    this rank's own to `y_PH`, where P counts token * K + k."""
    own_rank, hidden_size = own_1[0].rank, own_1[0].hidden_size
    first, first_own = 0, -1
    for p in range(peer_P.size):
        peer, head = peer_P[p], head_P[p]
        if first_own < 0 and peer.rank > own_rank:
            first_own, first = first, first + counts_R2[own_rank, 1]
        num_pairs = peer.num_pairs
        peer.sent = peer.found = 0
        if num_pairs:
            begin_write(head)
            sent_NH = rows_at(head + HEADER_BYTES, num_pairs, hidden_size)
            sent_NH[:] = y_NH[first : first + num_pairs]
            peer.sent = seal(head, own_1, _COMBINE, stamp, num_pairs, num_pairs)
        first += num_pairs
    _ring_all(peer_P)
    if first_own < 0:
        first_own = first
    own_NH = y_NH[first_own : first_own + counts_R2[own_rank, 1]]
    packing.scatter_rows(own_NH, flat_RN, own_rank, y_PH)


@njit(nogil=True, cache=True)
def _ring_all(peer_P: _Records) -> None:
    """After all messages are there: who is woken may take this rank's core at once."""
    for p in range(peer_P.size):
        if peer_P[p].sent and peer_P[p].bell_out:
            ring(peer_P[p].bell_out)


@njit(nogil=True, cache=True)
def receive(
    phase: int,
    own_1: _Records,
    peer_P: _Records,
    head_PG: _Longs,
    counts_R2: _Ints,
    stamp: int,
    sleep_ns: int,
) -> bool:
    """Whether a message is there from every peer that owes one. Sleeps for up to `sleep_ns` if all
    that owe one ring. Notes what was found in `peer_P`."""
    slept_for = -1
    while True:
        missing, num_missing, all_ring = -1, 0, True
        for p in range(peer_P.size):
            if _owes(phase, peer_P, p, counts_R2) and not _find(
                phase, own_1, peer_P, p, head_PG, counts_R2, stamp
            ):
                num_missing += 1
                all_ring &= peer_P[p].bell != 0
                if missing < 0:
                    missing = p
        if num_missing == 0:
            return True
        if not all_ring or sleep_ns == 0 or missing == slept_for:
            return False
        # Who waits for all may sleep until one of them has come.
        if not wait_for_stamp(head_PG[missing, 0], stamp, peer_P[missing].bell, 0, sleep_ns):
            return False
        slept_for = missing


@njit(nogil=True, cache=True)
def _owes(phase: int, peer_P: _Records, p: int, counts_R2: _Ints) -> bool:
    if peer_P[p].found:
        return False
    return phase == _DISPATCH or counts_R2[peer_P[p].rank, 1] > 0


@njit(nogil=True, cache=True)
def _find(
    phase: int,
    own_1: _Records,
    peer_P: _Records,
    p: int,
    head_PG: _Longs,
    counts_R2: _Ints,
    stamp: int,
) -> bool:
    peer = peer_P[p]
    for g in range(head_PG.shape[1]):
        head = head_PG[p, g]
        if head == 0:
            break
        found, num_tokens, num_rows, num_pairs, has_work, knows_next = find_header(
            head, own_1, phase, stamp, peer.rank, peer.incarnation
        )
        if not found:
            continue
        if phase == _DISPATCH:
            peer.num_tokens, peer.has_work = num_tokens, has_work
            peer.knows_next = knows_next
            peer.num_rows, peer.num_pairs = num_rows, num_pairs
        elif num_rows != counts_R2[peer.rank, 1]:
            continue
        peer.found = head
        return True
    return False


@njit(nogil=True, cache=True)
def missing_ranks(phase: int, peer_P: _Records, counts_R2: _Ints) -> list[int]:
    """The ranks of the peers that owe a message."""
    return [peer_P[p].rank for p in range(peer_P.size) if _owes(phase, peer_P, p, counts_R2)]


@njit(nogil=True, cache=True)
def sum_dispatches(
    own_1: _Records, peer_P: _Records, counts_R2: _Ints
) -> tuple[int, int, bool, bool, bool]:
    """Rows and pairs of all dispatches, this rank's own among them, and whether anybody has tokens,
    whether anybody has work, and whether all know of a later map."""
    own = own_1[0]
    num_rows, num_pairs = counts_R2[own.rank, 0], counts_R2[own.rank, 1]
    any_tokens, any_work = own.num_tokens > 0, own.has_work != 0
    all_know_next = own.knows_next != 0
    for p in range(peer_P.size):
        num_rows += peer_P[p].num_rows
        num_pairs += peer_P[p].num_pairs
        any_tokens |= peer_P[p].num_tokens > 0
        any_work |= peer_P[p].has_work != 0
        all_know_next &= peer_P[p].knows_next != 0
    return num_rows, num_pairs, any_tokens, any_work, all_know_next


@njit(nogil=True, cache=True)
def read_dispatches(
    own_1: _Records,
    peer_P: _Records,
    stamp: int,
    x_TH: _Floats,
    row_RN: _Ints,
    slot_RN: _Ints,
    token_RM: _Ints,
    counts_R2: _Ints,
    x_MH: _Floats,
    rows_N: _Ints,
    slots_N: _Ints,
) -> int:
    """Copies all rows and pairs out, in the order of ranks. The rank of a peer whose message is
    malformed, or was overwritten meanwhile, or ALL_INTACT."""
    own = own_1[0]
    row = pair = 0
    own_taken = False
    for p in range(peer_P.size + 1):
        if not own_taken and (p == peer_P.size or peer_P[p].rank > own.rank):
            own_taken = True
            num_rows, num_pairs = counts_R2[own.rank, 0], counts_R2[own.rank, 1]
            packing.take_own(
                x_TH,
                row_RN,
                slot_RN,
                token_RM,
                own.rank,
                num_rows,
                num_pairs,
                x_MH,
                rows_N,
                slots_N,
                row,
                pair,
            )
            row, pair = row + num_rows, pair + num_pairs
        if p == peer_P.size:
            break
        peer = peer_P[p]
        num_rows, num_pairs = peer.num_rows, peer.num_pairs
        if num_pairs:
            body = peer.found + HEADER_BYTES
            intact = packing.read_dispatch(
                ints_at(body, 2 * num_pairs),
                rows_at(body + PAIR_BYTES * num_pairs, num_rows, own.hidden_size),
                num_rows,
                num_pairs,
                own.num_slots,
                x_MH,
                rows_N,
                slots_N,
                row,
                pair,
            )
            if not (intact and has_stamp(peer.found, stamp)):
                return int(peer.rank)
        row, pair = row + num_rows, pair + num_pairs
    return ALL_INTACT


@njit(nogil=True, cache=True)
def read_combines(
    own_1: _Records,
    peer_P: _Records,
    stamp: int,
    counts_R2: _Ints,
    flat_RN: _Longs,
    y_PH: _Floats,
) -> int:
    """Copies the outputs to their places in `y_PH`. As `read_dispatches`."""
    for p in range(peer_P.size):
        peer = peer_P[p]
        if not peer.found:
            continue
        num_rows = counts_R2[peer.rank, 1]
        y_NH = rows_at(peer.found + HEADER_BYTES, num_rows, own_1[0].hidden_size)
        packing.scatter_rows(y_NH, flat_RN, peer.rank, y_PH)
        if not has_stamp(peer.found, stamp):
            return int(peer.rank)
    return ALL_INTACT


def compile_all(hidden_size: int, top_k: int) -> None:
    """Compiles every function, or loads it from the cache, so that no step waits for it."""
    layout = MessageLayout(hidden_size=hidden_size, top_k=top_k, step_tokens_max=1)
    member = Member(rank=RankId(0), incarnation=Incarnation(0))
    own_1, peer_P = own_record(member, layout), np.zeros(0, dtype=PEER)
    head_P, head_PG = np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.int64)
    packing.compile_route(top_k)
    shared_words.compile_all()
    r = packing.Routes(1, 1, top_k)
    x_TH = np.zeros((1, hidden_size), dtype=np.float32)
    y_PH = np.zeros((top_k, hidden_size), dtype=np.float32)
    routes = (x_TH, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
    write_dispatches(own_1, peer_P, head_P, 1, *routes)
    for phase in (_DISPATCH, _COMBINE):
        receive(phase, own_1, peer_P, head_PG, r.counts_R2, 1, 0)
        missing_ranks(phase, peer_P, r.counts_R2)
    sum_dispatches(own_1, peer_P, r.counts_R2)
    pairs_N = np.zeros((2, top_k), dtype=np.int32)
    read_dispatches(own_1, peer_P, 1, *routes, x_TH, pairs_N[0], pairs_N[1])
    write_combines(own_1, peer_P, head_P, 1, y_PH, r.counts_R2, r.flat_RN, y_PH.copy())
    read_combines(own_1, peer_P, 1, r.counts_R2, r.flat_RN, y_PH)
