"""A gateway's snapshot of the instance, as etcd has it: the spec, the newest map, the ranks'
records, what is desired. While etcd does not answer the last snapshot stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from shared.changes import changes
from shared.codec import unpack
from shared.desired_state import DesiredState
from shared.errors import WireError
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import InstanceSpec, RankRecord, unpack_map
from shared.store import Store, WatchEvent
from shared.types import Epoch, Member

log = structlog.get_logger()

_UNKNOWN_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Replaced whole, never edited. `ranks` has every registered incarnation, member of the map or
    not. Until etcd has answered once, `is_read` is False, and what is missing here may exist."""

    is_read: bool = False
    spec: InstanceSpec | None = None
    epoch: Epoch = Epoch(0)
    members: tuple[Member, ...] = ()
    expert_map: ExpertMap | None = None
    ranks: Mapping[str, RankRecord] = field(default_factory=dict)  # by etcd key
    desired: DesiredState = DesiredState()

    @property
    def kv_tokens_min(self) -> int:
        """Tokens that fit into the KV cache of every member, because a session may move to any."""
        members = set(self.members)
        sizes = [
            r.kv_blocks * r.kv_block_tokens for r in self.ranks.values() if r.member in members
        ]
        return min(sizes, default=_UNKNOWN_TOKENS)

    @property
    def sessions_max(self) -> int | None:
        """Sessions that all members together can hold; None if there is one that does not tell, or
        no member."""
        members = set(self.members)
        sizes = [r.sessions_max for r in self.ranks.values() if r.member in members]
        return sum(sizes) if sizes and all(sizes) else None

    def with_map(self, expert_map: ExpertMap) -> ClusterView:
        """A map of the same or an older epoch changes nothing."""
        if expert_map.epoch <= self.epoch:
            return self
        return replace(
            self, epoch=expert_map.epoch, members=expert_map.members, expert_map=expert_map
        )

    def num_uncovered(self, live: Collection[Member]) -> int:
        """Experts, counted in every layer, that no rank of `live` has in the newest map."""
        if self.expert_map is None:
            return 0
        return self.expert_map.num_uncovered({member.rank for member in live})

    def with_value(self, keys: Keys, key: str, value: bytes) -> ClusterView:
        """Raises WireError if the value is malformed."""
        if key == keys.map:
            return self.with_map(unpack_map(value))
        if key == keys.spec:
            return replace(self, spec=unpack(value, InstanceSpec))
        if key == keys.desired:
            return replace(self, desired=unpack(value, DesiredState))
        if key.startswith(keys.ranks):
            return replace(self, ranks={**self.ranks, key: unpack(value, RankRecord)})
        return self

    def without(self, key: str) -> ClusterView:
        """The view after a key was deleted. All but a rank's record stays: serving continues."""
        if key not in self.ranks:
            return self
        return replace(self, ranks={k: v for k, v in self.ranks.items() if k != key})


class ClusterWatch:
    """Follows etcd and passes every new view to the listeners, in their order."""

    def __init__(
        self, *, store: Store, keys: Keys, listeners: Sequence[Callable[[ClusterView], None]]
    ) -> None:
        self._store = store
        self._keys = keys
        self._listeners = listeners
        self._view = ClusterView()

    async def run(self) -> None:
        async for seen in changes(self._store, self._keys.serving):
            view = self._view if self._view.is_read else replace(self._view, is_read=True)
            for event in seen.events:
                view = self._after(view, event)
            if view is self._view:
                continue
            self._view = view
            for listener in self._listeners:
                listener(view)

    def _after(self, view: ClusterView, event: WatchEvent) -> ClusterView:
        if event.value is None:
            return view.without(event.key)
        return _with_valid(view, self._keys, event.key, event.value)


def _with_valid(view: ClusterView, keys: Keys, key: str, value: bytes) -> ClusterView:
    """A malformed value is logged and changes nothing."""
    try:
        return view.with_value(keys, key, value)
    except WireError as error:
        log.error("malformed_value", key=key, detail=str(error))
        return view
