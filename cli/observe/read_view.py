"""What etcd holds of an instance now."""

from __future__ import annotations

from cli.observe.instance_view import InstanceView
from cli.run_dir import Target
from shared.etcd_store import connect_store
from shared.keys import Keys


async def read_view(target: Target) -> InstanceView:
    """By a connection of its own. Raises StoreError, ConfigError."""
    keys = Keys(target.instance)
    store = await connect_store(target.store)
    try:
        return InstanceView.of(keys, (await store.get_prefix(keys.root)).values)
    finally:
        await store.close()
