"""Publishes what the instance serves, once, by the leader; and refuses to change it under ranks
that live."""

from __future__ import annotations

from control_plane.cluster_state import ClusterView
from shared.errors import ConfigError, StoreUnavailable, TxnConflict
from shared.records import InstanceSpec, pack_record
from shared.store import Compare, Put, Store, WatchEvent


async def keep_spec(
    store: Store, view: ClusterView, spec: InstanceSpec, leader_revision: int
) -> bool:
    """Whether etcd holds `spec` now. Raises ConfigError where it holds another and ranks live."""
    standing = view.spec
    if standing == spec:
        return True
    if standing is not None and view.records:
        raise ConfigError(
            f"instance {view.keys.instance!r} serves {difference(standing, spec)} and "
            f"{len(view.records)} of its ranks live; stop them first, or pass another --instance"
        )
    key = view.keys.spec
    compare = [
        Compare(key=view.keys.leader, mod_revision=leader_revision),
        Compare(key=key, mod_revision=view.revision_of(key)),
    ]
    value = pack_record(spec)
    try:
        revision = await store.txn(compare, [Put(key=key, value=value)])
    except (TxnConflict, StoreUnavailable):
        return False
    view.apply(WatchEvent(key=key, value=value, mod_revision=revision))
    return True


def difference(standing: InstanceSpec, wanted: InstanceSpec) -> str:
    """The first field in which they differ, for people."""
    for name in InstanceSpec.__dataclass_fields__:
        if getattr(standing, name) != getattr(wanted, name):
            return f"{name} {getattr(standing, name)!r}, not {getattr(wanted, name)!r},"
    return "the same"
