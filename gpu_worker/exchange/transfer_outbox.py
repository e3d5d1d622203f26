"""The outbox over Mooncake: a registered copy of the peer's region, written one message buffer at a
time.

The memory of a message buffer is not touched while a write from it is pending. A write that timed
out may still read its memory at any later time. So an outbox is broken for good once one of its
writes has failed or timed out. The owner of the link then opens it again, and a new outbox takes
over the unsent messages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.message import (
    NUM_MESSAGE_BUFFERS,
    SCRATCH_BYTES,
    TAIL_BYTES,
    MessageLayout,
)
from gpu_worker.exchange.mooncake_engine import Protocols, TransferEngine
from gpu_worker.exchange.outbox import Link, Outbox, WriteStatus
from gpu_worker.exchange.regions import Region


class TransferOutbox:
    """Implements `outbox.Outbox`."""

    def __init__(
        self, engine: TransferEngine, layout: MessageLayout, link: Link, protocol: Protocols
    ) -> None:
        self.link = link
        self.broken = ""
        self._engine = engine
        self._layout = layout
        self._buffer = Region(engine, layout, link.generation)
        self._offsets = [layout.message_buffer(index)[0] for index in range(NUM_MESSAGE_BUFFERS)]
        self._sends_tail_separately = protocol is Protocols.RDMA
        self._batches = [0] * NUM_MESSAGE_BUFFERS
        # The offset of a tail that waits for the completion of its payload's write; -1: none.
        self._tails = [-1] * NUM_MESSAGE_BUFFERS
        self._sizes = [0] * NUM_MESSAGE_BUFFERS
        self._failed = [False] * NUM_MESSAGE_BUFFERS
        self._timed_out = False

    @property
    def bell(self) -> int:
        return 0

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(each.head for each in self._buffer.message_buffers)

    def commit(self, index: int, nbytes: int) -> None:
        """Sends the message of `nbytes` in the message buffer. The peer sees all of it or
        nothing."""
        assert not self._batches[index], "the buffer of a pending write must not be touched"
        self._sizes[index] = nbytes
        self._failed[index] = False
        if self.broken:
            self._failed[index] = True
            return
        start = self._offsets[index]
        if self._sends_tail_separately:
            # RDMA keeps no order within a write: the tail is sent after the payload has arrived.
            self._tails[index] = start + nbytes - TAIL_BYTES
            nbytes -= TAIL_BYTES
        self._submit(index, start, nbytes)

    def poll_write(self, index: int) -> WriteStatus:
        batch = self._batches[index]
        if batch:
            status = self._engine.transfer_check_status(batch)
            if status == 0:
                return WriteStatus.PENDING
            self._batches[index] = 0
            if status < 0:
                self._timed_out |= status == -2
                self._break(index, "a write timed out" if status == -2 else "a write failed")
            elif self._tails[index] >= 0:
                offset, self._tails[index] = self._tails[index], -1
                self._submit(index, offset, TAIL_BYTES)
                return self.poll_write(index)
        return WriteStatus.FAILED if self._failed[index] else WriteStatus.DONE

    def progress(self) -> bool:
        """Advances every write. Whether one is still pending."""
        pending = False
        for index in range(NUM_MESSAGE_BUFFERS):
            if self._batches[index] and self.poll_write(index) is WriteStatus.PENDING:
                pending = True
        return pending

    def unsent(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for index in range(NUM_MESSAGE_BUFFERS):
            if self._failed[index]:
                message_buffer = self._buffer.message_buffers[index]
                yield index, message_buffer.bytes[: self._sizes[index]]

    def take_over(self, old: Outbox) -> None:
        for index, message in old.unsent():
            self._buffer.message_buffers[index].bytes[: message.size] = message
            self.commit(index, message.size)

    def forget_failed(self) -> None:
        """Drops unsent messages: after the end of their epoch nobody needs them."""
        self._failed = [False] * NUM_MESSAGE_BUFFERS

    def release(self, *, is_overdue: bool) -> bool:
        """Implements `regions.RegisteredMemory`. After it was called only it may be called."""
        if (self.progress() or self._timed_out) and not is_overdue:
            return False
        self._buffer.unregister()
        return True

    def _submit(self, index: int, offset: int, nbytes: int) -> None:
        batch = self._engine.transfer_submit_write(
            self.link.transfer_name,
            self._buffer.address + offset,
            self.link.address + offset,
            nbytes,
        )
        if batch:
            self._batches[index] = batch
        else:
            self._break(index, "a write could not start")

    def _break(self, index: int, why: str) -> None:
        self._tails[index] = -1
        self._failed[index] = True
        self.broken = self.broken or why


def submit_connect_write(engine: TransferEngine, buffer: Region, link: Link) -> int:
    """Submits the small write that makes Mooncake connect; returns its batch, or 0."""
    return engine.transfer_submit_write(
        link.transfer_name, buffer.address, link.address, SCRATCH_BYTES
    )
