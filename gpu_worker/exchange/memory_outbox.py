"""The outbox to a rank of the same host: messages are built in the peer's region itself, which both
processes map. Nothing is ever pending and nothing fails; a peer that is gone reads it no more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.message import (
    BELL_OFFSET,
    MAPPED_OFFSET,
    STAMP_BYTES,
    MessageLayout,
    message_buffers_of,
)
from gpu_worker.exchange.outbox import Link, Outbox, WriteStatus
from gpu_worker.exchange.shared_words import begin_write, publish, ring


class MemoryOutbox:
    """Implements `outbox.Outbox`."""

    def __init__(self, layout: MessageLayout, link: Link, memory: NDArray[np.uint8]) -> None:
        """`memory` is the peer's region."""
        self.link = link
        self.broken = ""
        self._message_buffers = message_buffers_of(memory, layout)
        self._bell = int(memory.ctypes.data) + BELL_OFFSET

    @property
    def bell(self) -> int:
        return self._bell

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(each.head for each in self._message_buffers)

    def commit(self, index: int, nbytes: int) -> None:
        """It is the peer's since it was sealed."""

    def poll_write(self, index: int) -> WriteStatus:
        return WriteStatus.DONE

    def progress(self) -> bool:
        return False

    def unsent(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        return iter(())

    def take_over(self, old: Outbox) -> None:
        for index, message in old.unsent():
            message_buffer = self._message_buffers[index]
            begin_write(message_buffer.head)
            message_buffer.bytes[STAMP_BYTES : message.size] = message[STAMP_BYTES:]
            publish(message_buffer.head, int(message[:STAMP_BYTES].view(np.int64)[0]))
        ring(self._bell)

    def forget_failed(self) -> None:
        """None failed."""

    def release(self, *, is_overdue: bool) -> bool:
        """The memory is unmapped with the last view of it."""
        return True


def mark_mapped(memory: NDArray[np.uint8]) -> None:
    """Tells the owner of the region that its source writes through shared memory, and rings."""
    memory[MAPPED_OFFSET : MAPPED_OFFSET + 4].view(np.int32)[0] = 1
