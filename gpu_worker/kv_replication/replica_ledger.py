"""The contents of one backup rank's region, slot by slot, as the source sees them. Pure: callers
ask it before they write or drop, and report the results to it.

Theory of operation. A slot is written only while the target knows it by no name, and a name is in
one slot at most.

    slot        take         note_known   use, release              pick_drops    note_dropped
    free        → writing    –            –                         –             –
    writing     –            → known      one user more or less     –             –
    known       –            –            one user more or less,    idle → leaving –
                                          idle where none is left
    leaving     –            –            –                         –             → free

Users are sessions. Each uses a chain from its first block on and releases its last block first, so
idle slots are dropped in an order that keeps the beginning of each chain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpu_worker.engine.prefix_index import PrefixIndex

_SPARE_MAX = 128
"""Slots that are free, or about to be, after a drop. A drop takes a round trip, which begins some
tenths of a second later (`replica_links.NOTIFY_INTERVAL_S`), while more blocks are sent."""


class ReplicaLedger:
    """Starts with all slots free."""

    def __init__(self, num_slots: int) -> None:
        self._num_spare = max(1, min(_SPARE_MAX, num_slots // 8))
        self._free = list(range(num_slots - 1, -1, -1))
        self._index = PrefixIndex()  # of slots that are being written or known
        self._num_users = [0] * num_slots
        self._writing: set[int] = set()
        self._leaving: dict[int, bytes] = {}

    @property
    def is_settled(self) -> bool:
        """Whether no write and no drop is pending."""
        return not self._writing and not self._leaving

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def is_full(self) -> bool:
        """Whether no slot is free or about to be."""
        return not self._free and not self._leaving and not self._index.num_idle

    def has(self, name: bytes) -> bool:
        """Whether the block is known at the target, or being written."""
        return self._index.block_of(name) is not None

    def is_known(self, name: bytes) -> bool:
        slot = self._index.block_of(name)
        return slot is not None and slot not in self._writing

    def may_take(self, name: bytes) -> bool:
        """Whether a slot may be taken for this name. It may not while the target may still know the
        name in a slot that it was asked to drop."""
        return bool(self._free) and not self.has(name) and name not in self._leaving.values()

    def take(self, name: bytes) -> int:
        """The slot to write the block to now. The caller is its one user."""
        assert self.may_take(name), "a slot is taken for a new name, while one is free"
        slot = self._free.pop()
        self._index.add(name, slot)
        self._num_users[slot] = 1
        self._writing.add(slot)
        return slot

    def use(self, name: bytes) -> None:
        slot = self._slot_of(name)
        if not self._num_users[slot]:
            self._index.mark_used(slot)
        self._num_users[slot] += 1

    def release(self, chain: Sequence[bytes]) -> None:
        """Each block of the chain has one user less."""
        for name in reversed(chain):
            slot = self._slot_of(name)
            self._num_users[slot] -= 1
            assert self._num_users[slot] >= 0, "a replica is released more often than it was used"
            if not self._num_users[slot]:
                self._index.mark_idle(slot)

    def note_known(self, names: Iterable[bytes]) -> None:
        """The target has stored these blocks."""
        for name in names:
            self._writing.remove(self._slot_of(name))

    def pick_drops(self) -> list[int]:
        """Slots that the target is to drop, so that some are free in time: many at once, now and
        then. A slot that is still being written stays, and so do those that became idle after
        it."""
        picked: list[int] = []
        if len(self._free) + len(self._leaving) > self._num_spare // 2:
            return picked
        while len(self._free) + len(self._leaving) < self._num_spare:
            slot = self._index.next_to_evict()
            if slot is None or slot in self._writing:
                break
            name = self._index.name_of(slot)
            assert name is not None
            self._leaving[self._index.evict()] = name
            picked.append(slot)
        return picked

    def note_dropped(self, slots: Iterable[int]) -> None:
        """The target no longer knows these slots."""
        for slot in slots:
            del self._leaving[slot]
            self._free.append(slot)

    def _slot_of(self, name: bytes) -> int:
        slot = self._index.block_of(name)
        assert slot is not None, "the target was not sent this block"
        return slot
