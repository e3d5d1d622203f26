"""Reads what an instance serves: its spec in etcd."""

from __future__ import annotations

from cli.run_dir import Target
from shared.codec import unpack
from shared.errors import Unavailable
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.records import InstanceSpec


async def read_served_spec(target: Target) -> InstanceSpec:
    """Raises Unavailable if no control plane has written a spec yet, StoreUnavailable."""
    store = await connect_store(target.store)
    try:
        found = await store.get(Keys(target.instance).spec)
    finally:
        await store.close()
    if found is None:
        raise Unavailable(f"instance {target.instance!r} has no spec yet; check `starfish status`")
    return unpack(found.value, InstanceSpec)
