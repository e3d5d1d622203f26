"""The memory layout of a dispatch or combine message, in the receiver's region and, if a network is
between, in the sender's buffer before. No content of a message can make the reader crash or index
out of range.

    header 64 B │ pairs: (row, slot) int32 each │ rows: float32 [n, H] │ pad │ tail stamp 8 B

A combine message has no pairs; its rows are the outputs of the pairs, in the order of the dispatch.
A stamp is used for one message of one sender only. It is written at both ends, so a message is
complete when both stamps are the expected one. What a late or foreign write left has other stamps.
A sender that shares the region's memory clears the head stamp before it writes anything else, and
sets it last.

A region has one message buffer for each phase and each parity of the exchange's ordinal. Two
suffice: a peer sends exchange n+2 only after it has received n+1 from everybody, and nobody sends
n+1 before it is done with n."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from shared.types import Epoch, Step

SCRATCH_BYTES = 4096
"""Bytes at the head of every region, for the write that opens the link over a network."""
BELL_OFFSET = 0
"""Where, in the scratch of a region, a source that shares its memory rings after each message."""
MAPPED_OFFSET = 64
"""Where such a source writes that it does: a word that is not 0."""

HEADER_BYTES = 64
STAMP_BYTES = 8
TAIL_BYTES = STAMP_BYTES
PAIR_BYTES = 8
HEADER_WORDS = HEADER_BYTES // 4
_EPOCH_BITS, _STEP_BITS, _LAYER_BITS = 21, 32, 9
LAYERS_MAX = (1 << _LAYER_BITS) - 1


class ExchangePhase(IntEnum):
    DISPATCH = 0
    COMBINE = 1


NUM_MESSAGE_BUFFERS = 4
FIRST_DISPATCH_BUFFER = 0
"""The message buffer of an epoch's first dispatch, which shows that a peer has moved on."""


def message_buffer_index(phase: ExchangePhase, ordinal: int) -> int:
    return 2 * phase + (ordinal & 1)


def make_stamp(epoch: Epoch, step: Step, layer: int, phase: ExchangePhase) -> int:
    """Positive, never 0. It is not used again before 2^21 epochs or 2^32 steps have passed."""
    assert 0 <= layer < LAYERS_MAX, f"layer {layer} does not fit a stamp"
    high = (epoch & ((1 << _EPOCH_BITS) - 1)) << _STEP_BITS | (step & ((1 << _STEP_BITS) - 1))
    return (high << _LAYER_BITS | (layer + 1)) << 1 | phase


def is_of_later_epoch(stamp: int, epoch: Epoch) -> bool:
    ahead = (stamp >> (_STEP_BITS + _LAYER_BITS + 1)) - epoch
    return 0 < ahead & ((1 << _EPOCH_BITS) - 1) < 1 << (_EPOCH_BITS - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLayout:
    """Sizes that sender and receiver share: both derive them from the instance's model and
    limits."""

    hidden_size: int
    top_k: int
    step_tokens_max: int

    def message_bytes(self, phase: ExchangePhase, num_rows: int, num_pairs: int) -> int:
        pairs = num_pairs if phase is ExchangePhase.DISPATCH else 0
        body = HEADER_BYTES + PAIR_BYTES * pairs + 4 * self.hidden_size * num_rows
        return (body + 7) // 8 * 8 + TAIL_BYTES

    @property
    def pairs_max(self) -> int:
        return self.step_tokens_max * self.top_k

    def message_buffer(self, index: int) -> tuple[int, int]:
        """Offset and size in bytes of a message buffer within the region."""
        sizes = [
            _round_up(self.message_bytes(phase, rows, self.pairs_max))
            for phase, rows in (
                (ExchangePhase.DISPATCH, self.step_tokens_max),
                (ExchangePhase.COMBINE, self.pairs_max),
            )
            for _ in range(2)
        ]
        return SCRATCH_BYTES + sum(sizes[:index]), sizes[index]

    @property
    def region_bytes(self) -> int:
        offset, size = self.message_buffer(NUM_MESSAGE_BUFFERS - 1)
        return offset + size


def _round_up(nbytes: int) -> int:
    return (nbytes + 4095) // 4096 * 4096


class MessageBuffer:
    """The memory of one message. `head` is its address, where its head stamp is."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.bytes = memory
        self.head = int(memory.ctypes.data)
        self._stamps = memory.view(np.int64)

    @property
    def head_stamp(self) -> int:
        return int(self._stamps[0])


def message_buffers_of(
    memory: NDArray[np.uint8], layout: MessageLayout
) -> tuple[MessageBuffer, ...]:
    spans = [layout.message_buffer(index) for index in range(NUM_MESSAGE_BUFFERS)]
    return tuple(MessageBuffer(memory[offset : offset + size]) for offset, size in spans)
