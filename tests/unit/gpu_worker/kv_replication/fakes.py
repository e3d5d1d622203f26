"""Other ranks' host memory, and the way there: every stage of a write and of a drop is taken when a
test says so. A write into a slot that is known by a name fails the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gpu_worker.engine.kv_replication import Bytes, ReplicaChannel
from shared.types import Incarnation, Member, RankId

BLOCK_BYTES = 8


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def content_of(name: bytes) -> list[int]:
    return list(name.ljust(BLOCK_BYTES, b"."))


class ArrayCache:
    """Blocks are the rows of one array."""

    layout = "array"

    def __init__(self, rows: Bytes) -> None:
        self.rows = rows
        self.block_bytes = rows.shape[1]

    def staging_buffer(self) -> Bytes:
        return np.zeros(self.block_bytes, dtype=np.uint8)

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        into[:] = self.rows[block]
        return lambda: True

    def load(self, block: int, content: Bytes) -> None:
        self.rows[block] = content


class Store:
    """What a rank keeps for others. Hides what `is_lost` says."""

    def __init__(self, is_lost: Callable[[bytes], bool] = lambda name: False) -> None:
        self.regions: list[Region] = []
        self._is_lost = is_lost

    num_rejected = 0

    def find(self, name: bytes) -> Bytes | None:
        if self._is_lost(name):
            return None
        found = (region.content(name) for region in self.regions)
        return next((content for content in found if content is not None), None)


class Region:
    """Of one channel."""

    def __init__(self) -> None:
        self.slots: dict[int, Bytes] = {}
        self.known: dict[int, bytes] = {}

    def content(self, name: bytes) -> Bytes | None:
        slots = [slot for slot, known in self.known.items() if known == name]
        assert len(slots) <= 1, "a name is in one slot"
        return self.slots[slots[0]] if slots else None


class Channel:
    """To a region in the store of its target. What is under way is in `pending`."""

    def __init__(
        self,
        target: Member,
        store: Store | None = None,
        *,
        num_slots: int = 16,
        num_staging_buffers: int = 16,
        is_on_other_node: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.target = target
        self.block_bytes = block_bytes
        self.is_on_other_node = is_on_other_node
        self.num_slots = num_slots
        self.is_open = True
        self.region = Region()
        (store or Store()).regions.append(self.region)
        self.num_staging_buffers = num_staging_buffers
        self.sent: list[bytes] = []  # in order
        self.pending: list[Callable[[], None]] = []
        self._news_sent: list[bytes] = []
        self._news_dropped: list[int] = []

    @property
    def known(self) -> list[bytes]:
        """In the order in which they became so."""
        return list(self.region.known.values())

    def take_staging_buffer(self) -> Bytes | None:
        if not self.num_staging_buffers:
            return None
        self.num_staging_buffers -= 1
        return np.zeros(self.block_bytes, dtype=np.uint8)

    def send(
        self, staging_buffer: Bytes, slot: int, name: bytes, is_saved: Callable[[], bool]
    ) -> None:
        assert self.is_open
        assert 0 <= slot < self.num_slots
        assert is_saved()
        self.sent.append(name)
        self.pending.append(lambda: self._write_half(staging_buffer, slot, name))

    @property
    def has_confirmations(self) -> bool:
        return bool(self._news_sent or self._news_dropped)

    def take_sent(self) -> Sequence[bytes]:
        news, self._news_sent = self._news_sent, []
        return news

    def drop(self, slots: Sequence[int]) -> None:
        self.pending.append(lambda: self._forget(slots))

    def take_dropped(self) -> Sequence[int]:
        news, self._news_dropped = self._news_dropped, []
        return news

    def deliver(self, number: int = 0) -> None:
        """One stage of something that is under way."""
        if self.pending:
            self.pending.pop(number % len(self.pending))()

    def deliver_all(self) -> None:
        while self.pending:
            self.deliver()

    def close(self) -> None:
        self.is_open = False
        self.pending.clear()

    def _write_half(self, staging_buffer: Bytes, slot: int, name: bytes) -> None:
        assert slot not in self.region.known, "a slot is written that is known by a name"
        content = self.region.slots.setdefault(slot, np.zeros_like(staging_buffer))
        content[: len(staging_buffer) // 2] = staging_buffer[: len(staging_buffer) // 2]
        self.pending.append(lambda: self._write_rest(staging_buffer, slot, name))

    def _write_rest(self, staging_buffer: Bytes, slot: int, name: bytes) -> None:
        assert slot not in self.region.known, "a slot is written that is known by a name"
        self.region.slots[slot][:] = staging_buffer
        self.num_staging_buffers += 1
        self.pending.append(lambda: self._know(slot, name))

    def _know(self, slot: int, name: bytes) -> None:
        self.region.known[slot] = name
        self.pending.append(lambda: self._news_sent.append(name))

    def _forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self.region.known[slot]
        self.pending.append(lambda: self._news_dropped.extend(slots))


class Endpoint:
    def __init__(self, *channels: Channel, store: Store | None = None) -> None:
        self.store = store or Store()
        self.all = list(channels)

    def channels(self) -> Mapping[RankId, ReplicaChannel]:
        return {channel.target.rank: channel for channel in self.all if channel.is_open}
