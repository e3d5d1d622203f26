"""The incarnations of one rank process, one after the other. A verdict ends an incarnation, not the
process: a fenced rank that lives comes back under a new number and a new lease, with new regions,
and with the weights, kernels and device that it has. Nothing of the fenced incarnation is read by
the new one, or by anybody else."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

import structlog

from gpu_worker.rank import Rank, RankParts
from shared.errors import DeviceLost, StarfishError, StoreError
from shared.exit_codes import EXIT_DEVICE_LOST, EXIT_FENCED
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.types import Member

log = structlog.get_logger()

REJOIN_TIMEOUT_S = 3.0
"""A process that cannot come back within this time ends, and its agent starts another one."""
REVOKE_TIMEOUT_S = 1.0
REJOINS_MAX = 5
REJOINS_WITHIN_S = 60.0
"""A process that is fenced more often than this ends: perhaps it is the reason."""


class RejoiningRank:
    """`run` ends with the process's exit code."""

    def __init__(self, parts: RankParts) -> None:
        """`parts` are those of the first incarnation. On the event loop."""
        self._parts = parts
        self._rank = Rank(parts)
        self._stopped = False
        self._is_leaving = False
        self._rejoined_at: deque[float] = deque(maxlen=REJOINS_MAX)

    @property
    def member(self) -> Member:
        """The present incarnation."""
        return self._parts.member

    def leave(self, grace_s: float) -> None:
        """Ends `run` once this rank has been drained, after the grace time in any case, and at the
        second call at once; the exit code is 0."""
        if self._is_leaving or grace_s <= 0 or not self._rank.ask_to_leave():
            self.stop()
            return
        self._is_leaving = True
        log.info("leaving", member=str(self.member), grace_s=grace_s)
        asyncio.get_running_loop().call_later(grace_s, self.stop)

    def stop(self) -> None:
        """Ends `run`; the exit code is 0."""
        self._stopped = True
        self._rank.stop()

    async def run(self) -> int:
        """0 after `stop` or `leave`, EXIT_FENCED if a fenced rank could not come back in this
        process, EXIT_DEVICE_LOST if none can. Raises what else the engine raised. All leases are
        revoked, so that nobody waits for this rank."""
        while True:
            try:
                exit_code = await self._rank.run()
            finally:
                await self._revoke(self._rank.lease_id)
            if exit_code != EXIT_FENCED or self._stopped:
                return exit_code
            if self._is_leaving:
                return 0
            try:
                if not await self._try_rejoin():
                    return exit_code
            except DeviceLost as error:
                log.error("device_lost", detail=str(error))
                return EXIT_DEVICE_LOST

    async def _try_rejoin(self) -> bool:
        """Whether there is a next incarnation to run. Raises DeviceLost."""
        if self._parts.hardware.renew is None:
            return False
        now = self._parts.clock.now()
        often = len(self._rejoined_at) == REJOINS_MAX
        if often and now - self._rejoined_at[0] < REJOINS_WITHIN_S:
            log.warning("rejoin_failed", detail=f"fenced {REJOINS_MAX} times in a minute")
            return False
        self._rejoined_at.append(now)
        fenced = self.member
        try:
            async with asyncio.timeout(REJOIN_TIMEOUT_S):
                # A thread that still runs may write to the slots, or to a peer's region.
                await self._rank.wait_for_threads()
                self._parts = await self._next_parts()
        except DeviceLost:
            raise
        except (TimeoutError, StarfishError, OSError, MemoryError) as error:
            log.warning("rejoin_failed", detail=str(error) or type(error).__name__)
            return False
        self._rank = Rank(self._parts)
        if self._stopped:
            self._rank.stop()
        took_ms = round((self._parts.clock.now() - now) * 1000, 1)
        log.info("rejoining", fenced=str(fenced), member=str(self.member), took_ms=took_ms)
        return True

    async def _next_parts(self) -> RankParts:
        """Raises StoreError, OSError, MemoryError, DeviceLost."""
        parts, config = self._parts, self._parts.config
        assert parts.hardware.renew is not None, "checked before"
        member, lease_id = await allocate_incarnation(
            parts.store,
            Keys(config.instance),
            parts.member.rank,
            config.timings.lease_ttl_s,
            above=parts.member.incarnation,
        )
        hardware = await asyncio.to_thread(parts.hardware.renew, member)
        replication = parts.replication
        if replication is not None:
            replication = replication.renew(member)
        return replace(
            parts,
            member=member,
            lease_id=lease_id,
            hardware=hardware,
            replication=replication,
            first_incarnation=parts.first_incarnation or parts.member.incarnation,
        )

    async def _revoke(self, lease_id: int) -> None:
        try:
            async with asyncio.timeout(REVOKE_TIMEOUT_S):
                await self._parts.store.revoke_lease(lease_id)
        except (TimeoutError, StoreError) as error:
            log.warning("lease_not_revoked", detail=str(error) or type(error).__name__)
