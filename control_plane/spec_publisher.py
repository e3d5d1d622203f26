"""Publishes what the instance serves. Refuses to change it while ranks are registered. What was
asked of an instance that served something else is forgotten with it."""

from __future__ import annotations

from control_plane.state_applier import StateApplier
from shared.errors import ConfigError, StoreUnavailable, TxnConflict
from shared.records import InstanceSpec, pack_record
from shared.store import Compare, Delete, Put, Store, WatchEvent


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
    operations: list[Put | Delete] = [Put(key=key, value=pack_record(spec))]
    if published is not None:
        operations.append(Delete(key=state.keys.desired))
    try:
        revision = await store.txn(compare, operations)
    except (TxnConflict, StoreUnavailable):
        return False
    for each in operations:
        value = each.value if isinstance(each, Put) else None
        cluster.apply(WatchEvent(key=each.key, value=value, mod_revision=revision))
    return True


def difference(published: InstanceSpec, wanted: InstanceSpec) -> str:
    """The first field in which they differ, for an error message."""
    for name in InstanceSpec.__dataclass_fields__:
        if getattr(published, name) != getattr(wanted, name):
            return f"{name} {getattr(published, name)!r}, not {getattr(wanted, name)!r},"
    return "the same"
