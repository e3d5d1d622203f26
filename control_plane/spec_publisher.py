"""Publishes what the instance serves. Refuses to change it while ranks are registered."""

from __future__ import annotations

from control_plane.state_applier import StateApplier
from shared.errors import ConfigError, StoreUnavailable, TxnConflict
from shared.records import InstanceSpec, pack_record
from shared.store import Compare, Put, Store, WatchEvent


async def publish_spec(
    store: Store, cluster: StateApplier, spec: InstanceSpec, leader_revision: int
) -> bool:
    """Whether etcd holds `spec` now. Raises ConfigError if it holds another one and ranks are
    registered."""
    state = cluster.state
    published = state.spec
    if published == spec:
        return True
    if published is not None and state.records:
        raise ConfigError(
            f"instance {state.keys.instance!r} serves {difference(published, spec)} and "
            f"{len(state.records)} of its ranks live; stop them first, or pass another --instance"
        )
    key = state.keys.spec
    compare = [
        Compare(key=state.keys.leader, mod_revision=leader_revision),
        Compare(key=key, mod_revision=state.revision_of(key)),
    ]
    value = pack_record(spec)
    try:
        revision = await store.txn(compare, [Put(key=key, value=value)])
    except (TxnConflict, StoreUnavailable):
        return False
    cluster.apply(WatchEvent(key=key, value=value, mod_revision=revision))
    return True


def difference(published: InstanceSpec, wanted: InstanceSpec) -> str:
    """The first field in which they differ, for an error message."""
    for name in InstanceSpec.__dataclass_fields__:
        if getattr(published, name) != getattr(wanted, name):
            return f"{name} {getattr(published, name)!r}, not {getattr(wanted, name)!r},"
    return "the same"
