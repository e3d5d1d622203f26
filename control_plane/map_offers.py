"""Whether a leader may give a map to the ranks itself, because etcd cannot be written. Pure.

Theory of operation. A death must not hold the survivors up until etcd is back. So the leader hands
them the map without the dead over the connections on which it probes them, and writes it when etcd
answers again. `docs/protocol/index.md` says why that is safe: above all, no two leaders may ever
choose the same epoch. A leader that has lost its lease and cannot know it may go on offering, while
its successor publishes or offers others. Therefore each term begins EPOCHS_PER_TERM epochs above
all that etcd knew of at the election, and a leader offers no epoch so far above what it has
written.

Ranks that are cut off from etcd alone are told of the newest map in the same way, though it is
written: it is what they would have read.

For a map that is not written, more than half of the members of the newest must have answered
lately, none of them under a newer map: a leader that is cut off itself gives up nobody.
"""

from __future__ import annotations

from control_plane.cluster_state import ClusterState
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member

EPOCHS_PER_TERM = 64
_HEARD_WITHIN_S = 1.0
_UNREAD_AFTER_S = 0.5


def first_epoch_of_next_term(state: ClusterState) -> int:
    """For the transaction of the election, which compares the map. The first term needs none."""
    if not state.term:
        return 0
    written = state.expert_map.epoch if state.expert_map is not None else 0
    return max(state.first_epoch, written) + EPOCHS_PER_TERM


class MapOffers:
    """What the members of the newest map say. Of one leader's term."""

    def __init__(self, first_epoch: int) -> None:
        self._written_epoch = first_epoch
        self._heard: dict[Member, tuple[float, Epoch]] = {}
        self._lag_since: float | None = None

    def on_pong(self, member: Member, epoch: Epoch, now: float) -> None:
        self._heard[member] = (now, epoch)

    def on_broken(self, member: Member) -> None:
        """Its connection has ended: what it said last is not what it would say now."""
        self._heard.pop(member, None)

    def on_written(self, epoch: Epoch) -> None:
        """etcd holds the map of this epoch."""
        self._written_epoch = max(self._written_epoch, epoch)

    def may_offer(self, epoch: Epoch) -> bool:
        """Whether no later leader can ever choose this epoch."""
        return epoch < self._written_epoch + EPOCHS_PER_TERM

    def has_majority(self, newest: ExpertMap, now: float) -> bool:
        """Whether most members answer, none of them under a newer map."""
        epochs = self._epochs_heard(newest, now)
        return 2 * len(epochs) > len(newest.members) and max(epochs) <= newest.epoch

    def lag(self, newest: ExpertMap, now: float) -> bool:
        """Whether a member that answers runs under an older map than the newest."""
        return any(epoch < newest.epoch for epoch in self._epochs_heard(newest, now))

    def is_unread(self, newest: ExpertMap, now: float) -> bool:
        """Whether a member that answers has run under an older map for so long that etcd may be out
        of its reach alone: once in _UNREAD_AFTER_S. To be asked at each tick."""
        if not self.lag(newest, now):
            self._lag_since = None
            return False
        if self._lag_since is None:
            self._lag_since = now
        if now - self._lag_since < _UNREAD_AFTER_S:
            return False
        self._lag_since = now
        return True

    def _epochs_heard(self, newest: ExpertMap, now: float) -> list[Epoch]:
        """Under which maps those members run that have answered lately."""
        return [
            heard[1]
            for member in newest.members
            if (heard := self._heard.get(member)) is not None and now - heard[0] <= _HEARD_WITHIN_S
        ]
