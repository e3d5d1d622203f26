"""When a rank's process exits, revokes its lease at once and reports the exit to etcd. Retries
until etcd has both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from node_agent.rank_supervisor import RunningRank
from shared.clock import Clock
from shared.errors import LeaseLost, StoreUnavailable
from shared.exit_codes import describe_exit
from shared.keys import Keys
from shared.records import Suspicion, pack_record
from shared.store import Store
from shared.types import Accuser, Epoch, NodeId, RankId, Step, SuspicionReason

log = structlog.get_logger()

RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0


class ExitReporter:
    """The revocations of one agent. The report distinguishes a real exit from a lease that expired
    because etcd was slow. It stays until the rank's next exit or the end of the agent's lease."""

    def __init__(self, store: Store, keys: Keys, node: NodeId, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._by = f"agent:{node}"
        self._clock = clock
        self._report_keys: dict[RankId, str] = {}

    async def revoke_and_report(
        self, running_rank: RunningRank, exit_code: int | None, *, agent_lease_id: Callable[[], int]
    ) -> None:
        """Does both at once; the revocation is sent first."""
        died_at = self._clock.now()
        detail = describe_exit(exit_code)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._revoke(running_rank, died_at))
            tasks.create_task(self._report_exit(running_rank, agent_lease_id, died_at, detail))

    async def _revoke(self, running_rank: RunningRank, died_at: float) -> None:
        await retry_until_done(lambda: self._store.revoke_lease(running_rank.lease_id))
        took_ms = round((self._clock.now() - died_at) * 1000, 2)
        log.info("lease_revoked", member=str(running_rank.member), took_ms=took_ms)

    async def _report_exit(
        self,
        running_rank: RunningRank,
        agent_lease_id: Callable[[], int],
        died_at: float,
        detail: str,
    ) -> None:
        key, value = self._suspicion_entry(running_rank, SuspicionReason.EXIT, died_at, detail)
        await retry_until_done(lambda: self._store.put(key, value, lease_id=agent_lease_id()))
        old = self._report_keys.get(running_rank.member.rank)
        self._report_keys[running_rank.member.rank] = key
        if old is not None:
            await retry_until_done(lambda: self._store.delete(old))

    def _suspicion_entry(
        self, running_rank: RunningRank, reason: SuspicionReason, raised_at: float, detail: str
    ) -> tuple[str, bytes]:
        """Key and value."""
        suspicion = Suspicion(
            rank=running_rank.member.rank,
            incarnation=running_rank.member.incarnation,
            by=self._by,
            reason=reason,
            epoch=Epoch(0),
            step=Step(0),
            raised_at=raised_at,
            detail=detail,
        )
        key = self._keys.suspicion(
            running_rank.member.rank, running_rank.member.incarnation, Accuser.AGENT, self._by
        )
        return key, pack_record(suspicion)


async def retry_until_done(attempt: Callable[[], Awaitable[object]]) -> None:
    """Repeats `attempt` until it succeeds. It must be idempotent."""
    retry_s = RETRY_MIN_S
    while True:
        try:
            await attempt()
        except (StoreUnavailable, LeaseLost) as error:
            log.warning("etcd_retry", detail=str(error))
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.5))
            retry_s = min(retry_s * 2, RETRY_MAX_S)
        else:
            return
