"""Writes to etcd whom the failure detector suspects, so that the node agents look at these
processes. Judges nothing."""

from __future__ import annotations

from collections.abc import Iterable

from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import Suspicion, pack_record
from shared.store import Store
from shared.types import Accuser, Member

_REPEAT_S = 1.0


class SuspicionPublisher:
    """Keeps one suspicion of ours for each suspected member, under a lease of its own. Run `run()`
    once."""

    def __init__(self, store: Store, keys: Keys, *, lease_ttl_s: float) -> None:
        self._keys = keys
        self._leased = LeasedKeys(store, ttl_s=lease_ttl_s)
        self._written_at: dict[Member, float] = {}
        self._key_of: dict[Member, str] = {}

    async def run(self) -> None:
        await self._leased.run()

    def update(self, suspicions: Iterable[Suspicion], now: float) -> None:
        """`suspicions` are all that we have now. One that stays is written again every second: a
        node agent looks into it for a few seconds only."""
        suspected = {suspicion.member: suspicion for suspicion in suspicions}
        for member in [m for m in self._written_at if m not in suspected]:
            del self._written_at[member]
            self._leased.delete(self._key_of.pop(member), urgent=False)
        for member, suspicion in suspected.items():
            if now - self._written_at.get(member, -_REPEAT_S) >= _REPEAT_S:
                key = self._keys.suspicion(
                    member.rank, member.incarnation, Accuser.CONTROL_PLANE, suspicion.by
                )
                self._written_at[member], self._key_of[member] = now, key
                self._leased.put(key, pack_record(suspicion))
