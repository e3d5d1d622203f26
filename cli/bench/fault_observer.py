"""Observes a fault from inside the instance: verdict, map and adoptions. All times are monotonic, a
clock that the processes of one host share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cli.observe.instance_view import InstanceView, decode_value
from cli.run_dir import Target
from shared.changes import changes
from shared.errors import Unavailable
from shared.etcd_store import EtcdStore, connect_store
from shared.expert_map import ExpertMap
from shared.handshake import Access
from shared.keys import Keys
from shared.rank_query import query_ranks
from shared.records import RankRecord, Verdict
from shared.types import Epoch, Member
from shared.wire import Adoption

_VERDICT_TIMEOUT_S = 10.0
_SETTLED_S = 1.0
_POLL_S = 0.1


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
        self._view = InstanceView()

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
        """Members of the map that `wait_until_all_ranks_in_map` found."""
        found = self._view.expert_map
        return [r for r in self._view.ranks if found is not None and found.has(r.member)]

    def maps(self) -> list[ExpertMap]:
        """All maps seen so far, by epoch."""
        return [self._maps[epoch] for epoch in sorted(self._maps)]

    async def wait_until_all_ranks_in_map(self, timeout_s: float) -> None:
        """Waits until every rank has been in the map for a while. Raises Unavailable."""
        complete_polls = 0
        try:
            async with asyncio.timeout(timeout_s):
                while complete_polls * _POLL_S < _SETTLED_S:
                    await asyncio.sleep(_POLL_S)
                    snapshot = await self._store.get_prefix(self._keys.root)
                    self._view = InstanceView.of(self._keys, snapshot.values)
                    spec = self._view.spec
                    is_complete = spec is not None and len(self.members()) == spec.num_ranks
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
                    await asyncio.sleep(_POLL_S)
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
                if event.value is not None:
                    self._on_value(event.key, event.value)

    def _on_value(self, key: str, value: bytes) -> None:
        match decode_value(self._keys, key, value):
            case Verdict() as verdict:
                self._verdicts[verdict.member] = verdict
            case ExpertMap() as expert_map:
                self._maps[expert_map.epoch] = expert_map


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start) * 1000
