"""Writing and checking the header of a message, compiled. What it means is in `message`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gpu_worker.exchange.message import (
    HEADER_BYTES,
    PAIR_BYTES,
    STAMP_BYTES,
    TAIL_BYTES,
    ExchangePhase,
    MessageBuffer,
    MessageLayout,
)
from gpu_worker.exchange.shared_words import has_stamp, ints_at, publish, words_at
from shared.types import Member

_DISPATCH = int(ExchangePhase.DISPATCH)
_HAS_WORK, _KNOWS_NEXT = 1, 2
_INCARNATION = 1  # in words of 8 bytes; the others in words of 4
_RANK, _TOKENS, _ROWS, _PAIRS, _FLAGS, _HIDDEN = 4, 5, 6, 7, 8, 9

OWN = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("rank", "incarnation", "hidden_size", "step_tokens_max", "pairs_max", "num_slots"),
            *("num_tokens", "has_work", "knows_next"),  # of the present step
        )
    ]
)
"""What a rank knows of itself, and all ranks of the layout of messages."""


class Header(NamedTuple):
    num_tokens: int  # of the sender's step
    num_rows: int
    num_pairs: int
    has_work: bool
    knows_next: bool


def own_record(member: Member, layout: MessageLayout) -> NDArray[np.void]:
    """An array of one record. The slots and the step are not known yet."""
    own = np.zeros(1, dtype=OWN)
    own[0]["rank"], own[0]["incarnation"] = member.rank, member.incarnation
    own[0]["hidden_size"], own[0]["pairs_max"] = layout.hidden_size, layout.pairs_max
    own[0]["step_tokens_max"] = layout.step_tokens_max
    return own


@njit(nogil=True, cache=True)
def message_bytes(phase: int, hidden_size: int, num_rows: int, num_pairs: int) -> int:
    """As `MessageLayout.message_bytes`."""
    pairs = num_pairs if phase == _DISPATCH else 0
    body = HEADER_BYTES + PAIR_BYTES * pairs + 4 * hidden_size * num_rows
    return (body + 7) // 8 * 8 + TAIL_BYTES


@njit(nogil=True, cache=True)
def seal(
    head: int, own_1: NDArray[np.void], phase: int, stamp: int, num_rows: int, num_pairs: int
) -> int:
    """Writes the header and both stamps around the finished body behind `head`, the head stamp
    last. Returns the message's bytes."""
    own = own_1[0]
    nbytes = message_bytes(phase, own.hidden_size, num_rows, num_pairs)
    words = words_at(head, nbytes // STAMP_BYTES)
    ints = ints_at(head, HEADER_BYTES // 4)
    words[_INCARNATION] = own.incarnation
    ints[_RANK] = own.rank
    ints[_TOKENS] = own.num_tokens
    ints[_ROWS] = num_rows
    ints[_PAIRS] = num_pairs
    ints[_FLAGS] = (_HAS_WORK if own.has_work else 0) | (_KNOWS_NEXT if own.knows_next else 0)
    ints[_HIDDEN] = own.hidden_size
    words[nbytes // STAMP_BYTES - 1] = stamp
    publish(head, stamp)
    return nbytes


@njit(nogil=True, cache=True)
def find_header(
    head: int, own_1: NDArray[np.void], phase: int, stamp: int, rank: int, incarnation: int
) -> tuple[bool, int, int, int, bool, bool]:
    """Whether the message at `head` is complete and this sender wrote it under `stamp`; if so, the
    fields of its header, within their bounds."""
    nothing = (False, 0, 0, 0, False, False)
    if not has_stamp(head, stamp):
        return nothing
    own = own_1[0]
    ints = ints_at(head, HEADER_BYTES // 4)
    num_tokens, num_rows, num_pairs = ints[_TOKENS], ints[_ROWS], ints[_PAIRS]
    has_work = ints[_FLAGS] & _HAS_WORK != 0
    knows_next = ints[_FLAGS] & _KNOWS_NEXT != 0
    if ints[_RANK] != rank or words_at(head, 2)[_INCARNATION] != incarnation:
        return nothing
    if ints[_HIDDEN] != own.hidden_size or not 0 <= num_tokens <= own.step_tokens_max:
        return nothing
    rows_max = min(num_tokens, num_pairs) if phase == _DISPATCH else num_pairs
    if not (0 <= num_pairs <= own.pairs_max and 0 <= num_rows <= rows_max):
        return nothing
    nbytes = message_bytes(phase, own.hidden_size, num_rows, num_pairs)
    if not has_stamp(head + nbytes - TAIL_BYTES, stamp):
        return nothing
    return True, num_tokens, num_rows, num_pairs, has_work, knows_next


def read_header(
    message_buffer: MessageBuffer,
    own_1: NDArray[np.void],
    phase: ExchangePhase,
    stamp: int,
    sender: Member,
) -> Header | None:
    """None if the message is not complete, or not this sender's under `stamp`."""
    found, num_tokens, num_rows, num_pairs, has_work, knows_next = find_header(
        message_buffer.head, own_1, int(phase), stamp, sender.rank, sender.incarnation
    )
    return Header(num_tokens, num_rows, num_pairs, has_work, knows_next) if found else None
