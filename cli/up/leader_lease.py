"""A control plane's lease ends with its process: nobody has to wait until it expires."""

from __future__ import annotations

import socket

from shared.errors import StoreError, WireError
from shared.keys import Keys
from shared.records import LeaderRecord, unpack_record
from shared.store import Store


async def revoke_leader_lease(store: Store, keys: Keys, pid: int) -> bool:
    """If the process `pid` of this host, which has exited, was the leader: revokes its lease, so
    that a standby takes over at once. Returns whether it was. If etcd does not answer, the lease
    expires by itself."""
    try:
        found = await store.get(keys.leader)
        if found is None:
            return False
        leader = unpack_record(found.value, LeaderRecord)
        if (leader.host, leader.pid) != (socket.gethostname(), pid):
            return False
        await store.revoke_lease(found.lease_id)
    except (StoreError, WireError):
        return False
    return True
