"""Observes a fault from inside the instance: verdict, map and adoptions. All times are monotonic, a
clock that the processes of one host share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cli.observe.instance_view import Record, decode_value
from cli.run_dir import Target
from shared.changes import changes
from shared.errors import Unavailable
from shared.etcd_store import EtcdStore, connect_store
from shared.expert_map import ExpertMap
from shared.handshake import Access
from shared.keys import Keys
from shared.rank_query import query_ranks
from shared.records import InstanceSpec, LeaderRecord, RankRecord, Verdict
from shared.store import WatchEvent
from shared.types import Epoch, Member
from shared.wire import Adoption

_VERDICT_TIMEOUT_S = 10.0
SETTLED_S = 1.0
"""An instance has recovered if every rank has been in the map for so long."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPhases:
    """Consecutive phases that begin with the signal. None: not reported. 0: the phase ended before
    it could begin. `adopt` and `replay` are those of the slowest survivor; `reprefill` lasts from
    there to the first new token of the slowest stream of the dead rank. `reprefill_tokens` counts
    tokens of moved sessions that survivors have recomputed since."""

    detect_ms: float | None
    verdict_ms: float | None
    publish_ms: float | None
    adopt_ms: float | None
    replay_ms: float | None
    reprefill_ms: float | None
    reprefill_tokens: int


class FaultObserver:
    """Follows verdicts and maps while it is open."""

    def __init__(self, store: EtcdStore, keys: Keys, access: Access) -> None:
        self._store, self._keys, self._access = store, keys, access
        self._verdicts: dict[Member, Verdict] = {}
        self._maps: dict[Epoch, ExpertMap] = {}
        self._records: dict[str, Record] = {}  # by key; what nobody here asks for is left out

    @classmethod
    @asynccontextmanager
    async def watching(cls, target: Target) -> AsyncIterator[FaultObserver]:
        """Raises StoreUnavailable."""
        store = await connect_store(target.store)
        observer = cls(store, Keys(target.instance), target.access())
        try:
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(observer._follow())
                yield observer
                following.cancel()
        finally:
            await store.close()

    def members(self) -> list[RankRecord]:
        """Registered members of the newest map, by rank."""
        found = self._records.get(self._keys.map)
        ranks = [record for record in self._records.values() if isinstance(record, RankRecord)]
        if not isinstance(found, ExpertMap):
            return []
        return sorted((r for r in ranks if found.has(r.member)), key=lambda record: record.rank)

    @property
    def leader_pid(self) -> int | None:
        """Of the control plane that leads."""
        found = self._records.get(self._keys.leader)
        return found.pid if isinstance(found, LeaderRecord) else None

    def are_all_ranks_in_map(self) -> bool:
        """As far as etcd has told."""
        spec = self._records.get(self._keys.spec)
        return isinstance(spec, InstanceSpec) and len(self.members()) == spec.num_ranks

    def verdicts(self) -> frozenset[Member]:
        """Who has been declared dead so far."""
        return frozenset(self._verdicts)

    def maps(self) -> list[ExpertMap]:
        """All maps seen so far, by epoch."""
        return [self._maps[epoch] for epoch in sorted(self._maps)]

    async def wait_until_all_ranks_in_map(self, timeout_s: float) -> None:
        """Waits until every rank has been in the map for a while. Raises Unavailable."""
        complete_polls = 0
        try:
            async with asyncio.timeout(timeout_s):
                while complete_polls * POLL_S < SETTLED_S:
                    await asyncio.sleep(POLL_S)
                    is_complete = self.are_all_ranks_in_map()
                    complete_polls = complete_polls + 1 if is_complete else 0
        except TimeoutError:
            raise Unavailable(
                f"only {len(self.members())} ranks are in the map after {timeout_s:.0f} s; "
                "see `starfish status`"
            ) from None

    async def phases(
        self, victim: Member, killed_at: float, first_token_at: float | None
    ) -> FaultPhases | None:
        """None if there was no verdict in time."""
        try:
            async with asyncio.timeout(_VERDICT_TIMEOUT_S):
                while victim not in self._verdicts:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            return None
        verdict = self._verdicts[victim]
        published = self._maps.get(verdict.epoch)
        published_at = published.published_at if published else None
        adoptions = await self._adoptions(verdict.epoch)
        adopted_at = max((a.adopted_at for a in adoptions if a.adopted_at), default=None)
        replayed_at = max((a.replayed_at for a in adoptions if a.replayed_at), default=None)
        return FaultPhases(
            detect_ms=_ms(killed_at, verdict.first_signal_at),
            verdict_ms=_ms(verdict.first_signal_at, verdict.decided_at),
            publish_ms=_ms(verdict.decided_at, published_at),
            adopt_ms=_ms(published_at, adopted_at),
            replay_ms=_ms(adopted_at, replayed_at),
            reprefill_ms=_ms(replayed_at, first_token_at),
            reprefill_tokens=sum(adoption.reprefill_tokens for adoption in adoptions),
        )

    async def _adoptions(self, epoch: Epoch) -> list[Adoption]:
        replies = await query_ranks(self.members(), self._access)
        return [
            adoption
            for reply in replies.values()
            if reply is not None
            for adoption in reply.adoptions
            if adoption.epoch == epoch
        ]

    async def _follow(self) -> None:
        async for seen in changes(self._store, self._keys.root):
            for event in seen.events:
                self._on_event(event)

    def _on_event(self, event: WatchEvent) -> None:
        if event.value is None:
            self._records.pop(event.key, None)
            return
        match decode_value(self._keys, event.key, event.value):
            case Verdict() as verdict:
                self._verdicts[verdict.member] = verdict
            case ExpertMap() as expert_map:
                self._maps[expert_map.epoch] = expert_map
                self._records[event.key] = expert_map
            case RankRecord() | LeaderRecord() | InstanceSpec() as record:
                self._records[event.key] = record


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start) * 1000
