"""What etcd says of the instance, as far as a gateway needs it: the spec, the newest map, the
ranks' records. While etcd is away the last view stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from shared.codec import unpack
from shared.errors import WireError
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import InstanceSpec, RankRecord, unpack_map
from shared.store import Snapshot, Store, WatchEvent
from shared.types import Epoch, Member

log = structlog.get_logger()

_UNKNOWN_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A snapshot; `ranks` holds registered incarnations, members of the map or not."""

    spec: InstanceSpec | None = None
    epoch: Epoch = Epoch(0)
    members: tuple[Member, ...] = ()
    ranks: Mapping[str, RankRecord] = field(default_factory=dict)  # by etcd key

    @property
    def kv_tokens_min(self) -> int:
        """What fits into the KV cache of every member: a session may move to any."""
        members = set(self.members)
        sizes = [
            r.kv_blocks * r.kv_block_tokens for r in self.ranks.values() if r.member in members
        ]
        return min(sizes, default=_UNKNOWN_TOKENS)

    def with_map(self, expert_map: ExpertMap) -> ClusterView:
        """An older epoch than the known one changes nothing."""
        if expert_map.epoch <= self.epoch:
            return self
        return replace(self, epoch=expert_map.epoch, members=expert_map.members)

    def with_value(self, keys: Keys, key: str, value: bytes) -> ClusterView:
        """Raises WireError where the value is malformed."""
        if key == keys.map:
            return self.with_map(unpack_map(value))
        if key == keys.spec:
            return replace(self, spec=unpack(value, InstanceSpec))
        if key.startswith(keys.ranks):
            return replace(self, ranks={**self.ranks, key: unpack(value, RankRecord)})
        return self

    def without(self, key: str) -> ClusterView:
        """A key was deleted. The spec and the map outlive even that: serving goes on."""
        if key not in self.ranks:
            return self
        return replace(self, ranks={k: v for k, v in self.ranks.items() if k != key})

    def with_snapshot(self, keys: Keys, snapshot: Snapshot) -> ClusterView:
        view = replace(self, ranks={})
        for item in snapshot.values:
            view = _tolerant(view, keys, item.key, item.value)
        return view


class ClusterWatch:
    """Follows etcd and tells of every new view."""

    def __init__(self, *, store: Store, keys: Keys, on_view: Callable[[ClusterView], None]) -> None:
        self._store = store
        self._keys = keys
        self._on_view = on_view
        self.view = ClusterView()

    async def run(self) -> None:
        async for seen in self._store.watch(self._keys.serving):
            view = self._after(seen)
            if view is not self.view:
                self.view = view
                self._on_view(view)

    def _after(self, seen: Snapshot | WatchEvent) -> ClusterView:
        if isinstance(seen, Snapshot):
            return self.view.with_snapshot(self._keys, seen)
        if seen.value is None:
            return self.view.without(seen.key)
        return _tolerant(self.view, self._keys, seen.key, seen.value)


def _tolerant(view: ClusterView, keys: Keys, key: str, value: bytes) -> ClusterView:
    try:
        return view.with_value(keys, key, value)
    except WireError as error:
        log.error("malformed_value", key=key, detail=str(error))
        return view
