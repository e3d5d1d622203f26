"""Whose sessions this gateway has in flight, as far as ranks must know: of two tenants at most.
Pure."""

from __future__ import annotations

from collections import Counter

from shared.types import TenantName

NAMED_MAX = 2
"""So many names tell any tenant whether there is another."""


class TenantsInFlight:
    """`named` are told to ranks. A tenant that comes is named at once, if fewer than two are; one
    that has gone is named until the next `forget_gone`, so that short requests that follow each
    other are not told of one by one."""

    def __init__(self) -> None:
        self.named: tuple[TenantName, ...] = ()
        self._sessions: Counter[TenantName] = Counter()

    def begin(self, tenant: TenantName) -> bool:
        """A session more. Whether `named` has changed."""
        self._sessions[tenant] += 1
        if tenant in self.named or len(self.named) == NAMED_MAX:
            return False
        self.named = (*self.named, tenant)
        return True

    def end(self, tenant: TenantName) -> None:
        """A session less."""
        self._sessions[tenant] -= 1
        if not self._sessions[tenant]:
            del self._sessions[tenant]

    def forget_gone(self) -> bool:
        """Names those that are in flight, as before as far as possible. Whether `named` has
        changed."""
        before = self.named
        stay = [tenant for tenant in before if tenant in self._sessions]
        others = [tenant for tenant in self._sessions if tenant not in stay]
        self.named = tuple([*stay, *others][:NAMED_MAX])
        return self.named != before
