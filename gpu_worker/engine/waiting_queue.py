"""The sequences that wait for their turn: who comes first, and who is refused because too many do.
When one may run, the scheduler decides."""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.tenant_shares import TenantShares
from shared.fair_share import fits_share


class WaitingQueue:
    """One line for each tenant. Within a line those in mid-stream come first, then by priority,
    deadline and arrival. Between the heads of the lines `TenantShares` decides."""

    def __init__(self, shares: TenantShares) -> None:
        self._shares = shares
        self._lines: dict[str, list[Sequence]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, sequence: Sequence) -> None:
        line = self._lines.setdefault(sequence.scheduling.tenant, [])
        insort(line, sequence, key=_place_in_line)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.scheduling.tenant
        line = self._lines[tenant]
        line.remove(sequence)
        self._length -= 1
        if not line:
            del self._lines[tenant]

    def heads(self) -> list[Sequence]:
        """The first of each tenant."""
        return [line[0] for line in self._lines.values()]

    def first(self) -> Sequence | None:
        return next(self.in_order(), None)

    def in_order(self, left_out: Collection[str] = ()) -> Iterator[Sequence]:
        """Everybody, as if nothing was served meanwhile. `left_out` are tenants; the caller may add
        to it on the way, and nothing more of these comes. The queue must not change on the way."""
        order = self._shares.order
        heads = [(order(line[0]), tenant, 0) for tenant, line in self._lines.items()]
        heapq.heapify(heads)
        while heads:
            _, tenant, place = heads[0]
            line = self._lines[tenant]
            if tenant not in left_out:
                yield line[place]
            if tenant in left_out or place + 1 == len(line):
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (order(line[place + 1]), tenant, place + 1))

    def has_room_for(
        self, sequence: Sequence, waiting_max: int, *, compiling: Iterable[Sequence] = ()
    ) -> bool:
        """`waiting_max` bounds new sequences and those in mid-stream separately. A tenant with a
        name leaves some of the room to others. `compiling` wait for their grammars, in no line
        yet."""
        is_new, tenant = sequence.num_emitted == 0, sequence.scheduling.tenant
        waiting = chain(*self._lines.values(), compiling)
        alike = [s.scheduling.tenant for s in waiting if (s.num_emitted == 0) == is_new]
        num_waiting = len(alike)
        if not tenant or not is_new:
            return num_waiting < waiting_max
        return fits_share(
            used=alike.count(tenant),
            added=1,
            free=waiting_max - num_waiting,
            weight=sequence.scheduling.weight,
        )


def _place_in_line(sequence: Sequence) -> tuple[bool, int, float, int]:
    is_new, priority, arrival = sequence.priority
    return (is_new, priority, sequence.scheduling.deadline_at or math.inf, arrival)
