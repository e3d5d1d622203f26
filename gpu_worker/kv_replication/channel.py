"""The channel to one incarnation of a backup rank, shared by three threads: the engine's queues
what is to be sent and dropped, the sender's writes, and the event loop's link sends the messages.
Each takes from queues what the others have put there. A channel that has failed stays failed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.kv_replication.staging_buffer import StagingBuffers
from shared.types import Member

T = TypeVar("T")

CHANNEL_STAGING_BUFFERS_MAX = 8
"""Staging buffers that one channel may hold: a target that hangs must leave some to the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSlots:
    """The slots that the target has given: slot i begins at `address + i * block_bytes`."""

    target: Member
    is_on_other_node: bool
    generation: int
    transfer_name: str
    address: int
    num_slots: int
    block_bytes: int


class SendRequest(NamedTuple):
    staging_buffer: Bytes
    slot: int
    name: bytes
    is_saved: Callable[[], bool]


class StoredBlock(NamedTuple):
    """A block whose write to its slot has completed. `tag` is `block_tags`'s."""

    slot: int
    name: bytes
    tag: bytes


class Channel:
    """Implements `engine.kv_replication.ReplicaChannel`. `notify_sender` and `notify_link` are
    called from any thread, when the sender or the link has something to take."""

    def __init__(
        self,
        remote: RemoteSlots,
        staging_buffers: StagingBuffers,
        *,
        notify_sender: Callable[[Channel], None],
        notify_link: Callable[[], None],
    ) -> None:
        self.remote = remote
        self.sends: deque[SendRequest] = deque()
        """In order. The sender takes them."""
        self.failure = ""
        self._staging_buffers = staging_buffers
        self._notify_sender = notify_sender
        self._notify_link = notify_link
        self._lock = threading.Lock()
        self._num_staging_buffers = 0
        self._written: deque[StoredBlock] = deque()
        self._to_drop: deque[int] = deque()
        self._sent: deque[bytes] = deque()
        self._dropped: deque[int] = deque()

    # Called by the engine.

    @property
    def target(self) -> Member:
        return self.remote.target

    @property
    def is_on_other_node(self) -> bool:
        return self.remote.is_on_other_node

    @property
    def num_slots(self) -> int:
        return self.remote.num_slots

    @property
    def is_open(self) -> bool:
        return not self.failure

    def take_staging_buffer(self) -> Bytes | None:
        with self._lock:
            if self.failure or self._num_staging_buffers == CHANNEL_STAGING_BUFFERS_MAX:
                return None
            staging_buffer = self._staging_buffers.take()
            self._num_staging_buffers += staging_buffer is not None
            return staging_buffer

    def send(
        self, staging_buffer: Bytes, slot: int, name: bytes, is_saved: Callable[[], bool]
    ) -> None:
        assert 0 <= slot < self.remote.num_slots, "no such slot"
        self.sends.append(SendRequest(staging_buffer, slot, name, is_saved))
        self._notify_sender(self)

    @property
    def has_confirmations(self) -> bool:
        return bool(self._sent or self._dropped)

    def take_sent(self) -> Sequence[bytes]:
        return _take_all(self._sent)

    def drop(self, slots: Sequence[int]) -> None:
        self._to_drop.extend(slots)
        self._notify_link()

    def take_dropped(self) -> Sequence[int]:
        return _take_all(self._dropped)

    # Called by the sender.

    def give_back(self, staging_buffer: Bytes) -> None:
        """No write reads it any more."""
        with self._lock:
            self._num_staging_buffers -= 1
        self._staging_buffers.give_back(staging_buffer)

    def lose_staging_buffer(self) -> None:
        """A write that has timed out may still read the buffer. Fails the channel."""
        self._staging_buffers.lose()
        self.fail("a write timed out")

    def wrote(self, blocks: Sequence[StoredBlock]) -> None:
        self._written.extend(blocks)
        self._notify_link()

    # Called by the link.

    @property
    def num_pending_notifications(self) -> int:
        """The number of slots that the target must be notified of."""
        return len(self._written) + len(self._to_drop)

    def take_written(self) -> Sequence[StoredBlock]:
        return _take_all(self._written)

    def take_drops(self) -> Sequence[int]:
        return _take_all(self._to_drop)

    def confirm_sent(self, names: Sequence[bytes]) -> None:
        self._sent.extend(names)

    def confirm_dropped(self, slots: Sequence[int]) -> None:
        self._dropped.extend(slots)

    # Called by any of them.

    def fail(self, why: str) -> None:
        """Fails the channel for good. The first reason is kept."""
        with self._lock:
            self.failure = self.failure or why
        self._notify_link()


def _take_all(queue: deque[T]) -> list[T]:
    """Removes what the queue holds now. Items that are appended meanwhile stay for the next
    call."""
    return [queue.popleft() for _ in range(len(queue))]
