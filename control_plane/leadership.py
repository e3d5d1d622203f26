"""Performs what `election` decides: leases, renewals, campaigns. It decides nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from control_plane.cluster_state import ClusterState
from control_plane.election import (
    Action,
    Campaign,
    Election,
    ElectionState,
    GrantLease,
    RenewLease,
    RevokeLease,
)
from control_plane.leader_doubts import lost_leader
from control_plane.map_offers import first_epoch_of_next_term
from control_plane.state_applier import StateApplier
from shared.clock import Clock
from shared.errors import LeaseLost, StoreUnavailable, TxnConflict
from shared.records import LeaderRecord, pack_record
from shared.release import own_release, refusal
from shared.store import Compare, Put, Store, WatchEvent

log = structlog.get_logger()

_RETRY_S = (0.1, 0.5)


def cannot_lead(state: ClusterState) -> str | None:
    """Why this release must leave the instance to a control plane of another one; None if it may
    lead. A newcomer alone of another release keeps nobody from leading."""
    expert_map = state.expert_map
    for member, record in sorted(state.refused.items()):
        if not state.records or (expert_map is not None and expert_map.has(member)):
            return refusal("this control plane", f"rank {member}", record.release)
    return None


class Leadership:
    """Call `notify()` after every change of the leader key. `on_change` is called after each
    action."""

    def __init__(
        self,
        *,
        store: Store,
        cluster: StateApplier,
        election: Election,
        clock: Clock,
        name: str,
        pid: int,
        host: str,
        ttl_s: float,
        on_change: Callable[[], None],
        admin_url: str = "",
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._election = election
        self._clock = clock
        self._name = name
        self._pid = pid
        self._host = host
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._admin_url = admin_url
        self._notified = asyncio.Event()
        self._obstacle: str | None = None

    def notify(self) -> None:
        state = self._cluster.state
        if state.synced:
            name = state.leader.control_plane if state.leader else None
            self._election.on_key(name, state.revision_of(state.keys.leader))
        self._notified.set()

    def look_at_doubts(self) -> None:
        """To be called after every change of the state."""
        state = self._cluster.state
        revision = lost_leader(state)
        if not self._election.on_lost_leader(revision):
            return
        if revision is not None and self._election.state is ElectionState.STANDBY:
            log.warning("leader_unheard", leader=state.leader, doubts=len(state.leader_doubts))
        self._notified.set()

    async def run(self) -> None:
        while True:
            self._notified.clear()
            now = self._clock.now()
            action = self._election.next_action(now)
            if action is None:
                await self._wait(self._election.next_action_in_s(now))
                continue
            if not await self._perform(action):
                await asyncio.sleep(random.uniform(*_RETRY_S))
            self._on_change()

    async def resign(self) -> None:
        """Gives up the key, so that a standby takes over at once."""
        self._election.resign()
        action = self._election.next_action(self._clock.now())
        if action is not None:
            await self._perform(action)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.005)):
                await self._notified.wait()
        except TimeoutError:
            return

    async def _perform(self, action: Action) -> bool:
        """False if etcd did not answer."""
        asked_at = self._clock.now()
        election = self._election
        try:
            match action:
                case GrantLease():
                    election.on_granted(await self._store.grant_lease(self._ttl_s), asked_at)
                case RenewLease():
                    await self._store.keep_alive(action.lease_id)
                    election.on_renewed(asked_at)
                    if not election.may_act(asked_at):
                        await self._reread_leader()
                case Campaign():
                    await self._campaign(action.lease_id, action.against_revision)
                case RevokeLease():
                    await self._store.revoke_lease(action.lease_id)
                    election.on_revoked()
        except LeaseLost:
            log.warning("leader_lease_lost")
            election.on_lease_lost()
        except StoreUnavailable as error:
            log.warning("etcd_unavailable", doing=type(action).__name__, error=str(error))
            if isinstance(action, Campaign):
                election.on_not_won(self._clock.now())
            return False
        return True

    async def _reread_leader(self) -> None:
        """On standby, with each renewal: an event that the watch has not brought must not leave the
        instance without a leader."""
        key = self._cluster.state.keys.leader
        read = await self._store.get_prefix(key)
        found = next((kv for kv in read.values if kv.key == key), None)
        value, revision = (
            (None, read.revision) if found is None else (found.value, found.mod_revision)
        )
        self._cluster.apply(WatchEvent(key=key, value=value, mod_revision=revision))
        self.notify()

    async def _campaign(self, lease_id: int, against_revision: int) -> None:
        state = self._cluster.state
        keys = state.keys
        if (obstacle := cannot_lead(state)) is not None:
            self._election.on_not_won(self._clock.now())
            if obstacle != self._obstacle:
                log.error("cannot_lead", detail=obstacle)
            self._obstacle = obstacle
            return
        self._obstacle = None
        record = LeaderRecord(
            control_plane=self._name,
            pid=self._pid,
            term=state.term + 1,
            since=self._clock.wall(),
            host=self._host,
            admin_url=self._admin_url,
            release=own_release(),
        )
        value, term = pack_record(record), pack_record(record.term)
        # The map is compared, because the first epoch must be beyond all that a former leader may
        # give to ranks itself (`map_offers`).
        compare = [
            Compare(key=keys.leader, mod_revision=against_revision),
            Compare(key=keys.term, mod_revision=state.revision_of(keys.term)),
            Compare(key=keys.map, mod_revision=state.revision_of(keys.map)),
        ]
        puts = [
            Put(key=keys.leader, value=value, lease_id=lease_id),
            Put(key=keys.term, value=term),
            Put(key=keys.first_epoch, value=pack_record(first_epoch_of_next_term(state))),
        ]
        try:
            revision = await self._store.txn(compare, puts)
        except TxnConflict:
            self._election.on_not_won(self._clock.now())
            return
        for put in puts:
            self._cluster.apply(WatchEvent(key=put.key, value=put.value, mod_revision=revision))
        self._election.on_won(revision)
