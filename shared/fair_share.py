"""Who is next if several tenants want the same: weighted fair queueing by virtual time. Also how
much of a bounded good one of them may hold. Pure; it does not know what is shared."""

from __future__ import annotations

from dataclasses import dataclass

SHARE_OF_FREE = 8
"""A tenant of weight 1 may hold so many times what it leaves free: alone 8/9 of all, one of two
8/17. Higher: less lies idle while others want nothing. Lower: more is free when they come."""


@dataclass(slots=True)
class _Tenant:
    weight: float
    served: float = 0.0  # virtual time: what it has been served, divided by its weight
    num_active: int = 0


class FairShare:
    """Theory of operation. Each tenant has a virtual time, which grows by what it is served divided
    by its weight. The next to serve is the one whose time is least. So tenants that always want
    something are served in proportion to their weights, whatever the size of their requests, up to
    one request.

    A tenant that comes, or comes back, begins at the time of the one that is furthest behind
    among those that are active: what it did not use while it was away is lost, and what it used
    beyond its share while others waited still counts. (Virtual token counters: Sheng et al.,
    "Fairness in Serving Large Language Models", OSDI 2024.)

    Tenants that are neither active nor ahead of the others are forgotten: they would begin there
    anyway."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._now = 0.0  # the least virtual time of an active tenant; never falls

    def __len__(self) -> int:
        return len(self._tenants)

    def enter(self, tenant: str, weight: float) -> None:
        """One more request of it wants to be served. The latest weight counts."""
        known = self._tenants.setdefault(tenant, _Tenant(weight))
        if not known.num_active:
            self._advance()
            known.served = max(known.served, self._now)
        known.weight = weight
        known.num_active += 1

    def leave(self, tenant: str) -> None:
        """Once for each `enter`."""
        known = self._tenants[tenant]
        known.num_active -= 1
        if not known.num_active:
            self._now = max(self._now, min(known.served, self._least_active(known.served)))
            self._forget()

    def charge(self, tenant: str, amount: float) -> None:
        """An active tenant is served so much; a negative amount takes back an earlier charge."""
        known = self._tenants[tenant]
        known.served += amount / known.weight

    def virtual_time(self, tenant: str) -> float:
        """Of an active tenant. The least is next."""
        return self._tenants[tenant].served

    def part_of(self, tenant: str) -> float:
        """An active tenant's weight as a part of the weights of all active ones, 0 … 1."""
        total = sum(t.weight for t in self._tenants.values() if t.num_active)
        return self._tenants[tenant].weight / total

    def _least_active(self, default: float) -> float:
        return min((t.served for t in self._tenants.values() if t.num_active), default=default)

    def _advance(self) -> None:
        self._now = max(self._now, self._least_active(self._now))

    def _forget(self) -> None:
        self._advance()
        for name, known in list(self._tenants.items()):
            if not known.num_active and known.served <= self._now:
                del self._tenants[name]


def fits_share(*, used: float, added: float, free: float, weight: float = 1.0) -> bool:
    """Whether a tenant that holds `used` may take `added` of the `free` rest of a bounded good.
    One that holds nothing may take all that is free. The bound of the others follows what is left
    (dynamic thresholds: Choudhury and Hahne, 1998), so whoever comes finds something free, and
    nobody has to give anything back at once."""
    if added > free:
        return False
    return used == 0 or used + added <= SHARE_OF_FREE * weight * (free - added)
