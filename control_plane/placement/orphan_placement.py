"""Puts the orphans of one layer into slots, one after another: greedily into the slot whose loss
matters least, on ranks that do not yet load more than their target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

import numpy as np

from control_plane.placement.topology import Floats, Ints
from shared.expert_map import Placement
from shared.types import EMPTY_SLOT


class _Candidate(NamedTuple):
    """A surplus replica's slot. The candidate that compares least is overwritten first."""

    num_loaded_after: int
    is_last_spare: bool  # its expert would be left with one replica
    inherited_load: float
    rank_load: float
    rank: int
    slot: int
    expert: int


class _Queue:
    """Candidates, least first: a sorted sequence, merged with those that are pushed later."""

    def __init__(self, ordered: Iterator[_Candidate]) -> None:
        self._ordered, self._next = ordered, next(ordered, None)
        self._pushed: list[_Candidate] = []

    def push(self, candidate: _Candidate) -> None:
        heappush(self._pushed, candidate)

    def pop(self) -> _Candidate | None:
        result = self._next
        if result is not None and (not self._pushed or result < self._pushed[0]):
            self._next = next(self._ordered, None)
            return result
        return heappop(self._pushed) if self._pushed else None


class OrphanPlacement:
    """Edits `rows` (`[num_ranks, slots_per_rank]` int16) and `num_loaded` (what each rank has to
    load so far) in place. `counts` and `loads` are `[num_experts]`, `per_rank` is the load of each
    rank. Ranks that would load more than `num_loaded_target` are chosen last."""

    def __init__(
        self,
        rows: Placement,
        counts: Ints,
        loads: Floats,
        per_rank: Floats,
        num_loaded: list[int],
        num_loaded_target: int,
    ) -> None:
        self._rows, self._num_loaded, self._num_loaded_target = rows, num_loaded, num_loaded_target
        self._counts: list[int] = counts.tolist()
        self._loads: list[float] = loads.tolist()
        self._per_rank: list[float] = per_rank.tolist()

    def fill(self, orphans: Sequence[int]) -> int:
        """Places `orphans` in order while there are slots, empty ones first, and returns how many
        were placed."""
        num_placed = self._into_empty(orphans)
        return num_placed + self._into_surplus(orphans[num_placed:])

    def _into_empty(self, orphans: Sequence[int]) -> int:
        free: defaultdict[int, list[int]] = defaultdict(list)
        for rank, slot in np.argwhere(self._rows == EMPTY_SLOT)[::-1].tolist():
            free[rank].append(slot)
        heap = [(self._num_loaded_after(rank), self._per_rank[rank], rank) for rank in free]
        heapify(heap)
        for num_placed, expert in enumerate(orphans):
            if not heap:
                return num_placed
            rank = heap[0][2]
            self._put(expert, rank, free[rank].pop())
            if free[rank]:
                heapreplace(heap, (self._num_loaded_after(rank), self._per_rank[rank], rank))
            else:
                heappop(heap)
        return len(orphans)

    def _into_surplus(self, orphans: Sequence[int]) -> int:
        if not orphans:
            return 0
        queue = _Queue(self._surplus())
        for num_placed, expert in enumerate(orphans):
            candidate = self._pop_cheapest(queue)
            if candidate is None:
                return num_placed
            load_before = self._per_rank[candidate.rank]
            self._evict(candidate.expert, candidate.rank)
            self._put(expert, candidate.rank, candidate.slot)
            if self._per_rank[candidate.rank] < load_before:
                self._push_row(queue, candidate.rank)
        return len(orphans)

    def _surplus(self) -> Iterator[_Candidate]:
        all_counts = np.array(self._counts, dtype=np.int64)
        ranks, slots = np.nonzero((self._rows >= 0) & (all_counts[np.maximum(self._rows, 0)] > 1))
        experts = self._rows[ranks, slots].astype(np.int64)
        counts = all_counts[experts]
        columns = (
            np.maximum(
                np.array(self._num_loaded, dtype=np.int64)[ranks] + 1, self._num_loaded_target
            ),
            counts == 2,
            np.array(self._loads)[experts] / (counts * (counts - 1)),
            np.array(self._per_rank)[ranks],
            ranks,
            slots,
            experts,
        )
        order = np.lexsort(columns[3::-1])
        return map(_Candidate, *(column[order].tolist() for column in columns))

    def _pop_cheapest(self, queue: _Queue) -> _Candidate | None:
        """The least candidate. Among ranks within the target, experts with three replicas or more
        come before those with two, then the one whose other replicas inherit least (each load /
        (count * (count - 1))), then the idlest rank. None if no surplus replica is left."""
        while (candidate := queue.pop()) is not None:
            if (
                self._rows[candidate.rank, candidate.slot] != candidate.expert
                or self._counts[candidate.expert] == 1
            ):
                continue
            now = self._candidate(candidate.rank, candidate.slot, candidate.expert)
            if now <= candidate:
                return candidate
            queue.push(now)
        return None

    def _push_row(self, queue: _Queue, rank: int) -> None:
        """The rank became less busy, so its candidates now compare less than those in the queue."""
        for slot, expert in enumerate(self._rows[rank].tolist()):
            if expert >= 0 and self._counts[expert] > 1:
                queue.push(self._candidate(rank, slot, expert))

    def _candidate(self, rank: int, slot: int, expert: int) -> _Candidate:
        count = self._counts[expert]
        inherited = self._loads[expert] / (count * (count - 1))
        load = self._per_rank[rank]
        return _Candidate(
            self._num_loaded_after(rank), count == 2, inherited, load, rank, slot, expert
        )

    def _num_loaded_after(self, rank: int) -> int:
        return max(self._num_loaded[rank] + 1, self._num_loaded_target)

    def _evict(self, expert: int, rank: int) -> None:
        count, load = self._counts[expert], self._loads[expert]
        for holder in np.nonzero(self._rows == expert)[0].tolist():
            self._per_rank[holder] += load / (count * (count - 1))
        # `rank` is itself among the holders, and loses its whole share.
        self._per_rank[rank] -= load / (count - 1)
        self._counts[expert] = count - 1

    def _put(self, expert: int, rank: int, slot: int) -> None:
        self._rows[rank, slot] = expert
        self._num_loaded[rank] += 1
        self._per_rank[rank] += self._loads[expert]
