"""The compiled loops over the tokens of one message: they choose which pair goes to which rank, and
copy rows and pairs to and from its body. They release the GIL and check everything that a peer
wrote."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Ints = NDArray[np.int32]
_Floats = NDArray[np.float32]


class Routes:
    """Buffers for one layer's routes. For each of R ranks: its N pairs (token and k, row of the
    message, slot) and its M rows (token)."""

    def __init__(self, num_ranks: int, tokens_max: int, top_k: int) -> None:
        pairs = (num_ranks, max(1, tokens_max * top_k))
        self.flat_RN = np.zeros(pairs, dtype=np.int64)  # token * K + k
        self.row_RN = np.zeros(pairs, dtype=np.int32)
        self.slot_RN = np.zeros(pairs, dtype=np.int32)
        self.token_RM = np.zeros((num_ranks, max(1, tokens_max)), dtype=np.int32)
        self.counts_R2 = np.zeros((num_ranks, 2), dtype=np.int32)  # rows, pairs


@njit(nogil=True, cache=True)
def route(
    experts_TK: _Ints,
    rank_UE: _Ints,
    slot_UE: _Ints,
    chosen_E: NDArray[np.int64],
    flat_RN: NDArray[np.int64],
    row_RN: _Ints,
    slot_RN: _Ints,
    token_RM: _Ints,
    counts_R2: _Ints,
) -> bool:
    """Fills the routes in the order of tokens, then k, and adds each pair to `chosen_E`. False if
    an expert has no replica."""
    counts_R2[:] = 0
    num_tokens, top_k = experts_TK.shape
    num_turns, num_experts = rank_UE.shape
    turn = 0
    for t in range(num_tokens):
        for k in range(top_k):
            expert = experts_TK[t, k]
            if expert < 0 or expert >= num_experts:
                return False
            rank = rank_UE[turn, expert]
            if rank < 0:
                return False
            chosen_E[expert] += 1
            rows, pairs = counts_R2[rank, 0], counts_R2[rank, 1]
            if rows == 0 or token_RM[rank, rows - 1] != t:
                token_RM[rank, rows] = t
                rows += 1
                counts_R2[rank, 0] = rows
            flat_RN[rank, pairs] = t * top_k + k
            row_RN[rank, pairs] = rows - 1
            slot_RN[rank, pairs] = slot_UE[turn, expert]
            counts_R2[rank, 1] = pairs + 1
        turn = turn + 1 if turn + 1 < num_turns else 0
    return True


@njit(nogil=True, cache=True)
def write_dispatch(
    pairs_2N: _Ints,
    rows_MH: _Floats,
    x_TH: _Floats,
    row_RN: _Ints,
    slot_RN: _Ints,
    token_RM: _Ints,
    rank: int,
    num_rows: int,
    num_pairs: int,
) -> None:
    """Writes the body of a dispatch message to `rank`: row and slot of each pair, and the rows."""
    for i in range(num_pairs):
        pairs_2N[2 * i] = row_RN[rank, i]
        pairs_2N[2 * i + 1] = slot_RN[rank, i]
    for i in range(num_rows):
        rows_MH[i] = x_TH[token_RM[rank, i]]


@njit(nogil=True, cache=True)
def take_own(
    x_TH: _Floats,
    row_RN: _Ints,
    slot_RN: _Ints,
    token_RM: _Ints,
    rank: int,
    num_rows: int,
    num_pairs: int,
    x_MH: _Floats,
    rows_N: _Ints,
    slots_N: _Ints,
    first_row: int,
    first_pair: int,
) -> None:
    """Copies what `rank` would have sent to itself, from `first_row` and `first_pair` on."""
    for i in range(num_rows):
        x_MH[first_row + i] = x_TH[token_RM[rank, i]]
    for i in range(num_pairs):
        rows_N[first_pair + i] = first_row + row_RN[rank, i]
        slots_N[first_pair + i] = slot_RN[rank, i]


@njit(nogil=True, cache=True)
def read_dispatch(
    pairs_2N: _Ints,
    sent_MH: _Floats,
    num_rows: int,
    num_pairs: int,
    num_slots: int,
    x_MH: _Floats,
    rows_N: _Ints,
    slots_N: _Ints,
    first_row: int,
    first_pair: int,
) -> bool:
    """Copies a body out. False if a pair names a row or a slot that does not exist."""
    for i in range(num_pairs):
        row, slot = pairs_2N[2 * i], pairs_2N[2 * i + 1]
        if row < 0 or row >= num_rows or slot < 0 or slot >= num_slots:
            return False
        rows_N[first_pair + i] = first_row + row
        slots_N[first_pair + i] = slot
    for i in range(num_rows):
        x_MH[first_row + i] = sent_MH[i]
    return True


@njit(nogil=True, cache=True)
def scatter_rows(y_NH: _Floats, flat_RN: NDArray[np.int64], rank: int, y_PH: _Floats) -> None:
    """Row n of `y_NH` is the output of the n-th pair sent to `rank`; P counts token * K + k."""
    for i in range(y_NH.shape[0]):
        y_PH[flat_RN[rank, i]] = y_NH[i]


def compile_route(top_k: int) -> None:
    """Compiles `route`, or loads it from the cache."""
    r = Routes(1, 1, top_k)
    experts_TK = np.zeros((1, top_k), dtype=np.int32)
    zero_UE = np.zeros((1, 1), dtype=np.int32)
    chosen_E = np.zeros(1, dtype=np.int64)
    buffers = (r.flat_RN, r.row_RN, r.slot_RN, r.token_RM, r.counts_R2)
    route(experts_TK, zero_UE, zero_UE, chosen_E, *buffers)
