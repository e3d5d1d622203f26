"""Turns what membership wants into writes: the next map or assignments, with the verdicts that go
with them, and the epoch that they name. It does not decide what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from control_plane.cluster_state import ClusterState
from control_plane.judgements import verdicts_on
from control_plane.map_adoption import MapAdoption
from control_plane.residency import Residency
from control_plane.writes import Assign, DeclareDead, PublishMap
from shared.expert_map import Placement
from shared.records import SlotContents, Verdict
from shared.types import Epoch, Member, SuspicionReason


class WriteBuilder:
    def __init__(
        self,
        adoption: MapAdoption,
        dead: Mapping[Member, Verdict],
        first_epoch: Epoch,
    ) -> None:
        """`dead` is followed: the verdicts that are known, written or not. No map gets a lower
        epoch than `first_epoch`."""
        self._adoption = adoption
        self._dead = dead
        self._first_epoch = first_epoch
        self._running_epoch = Epoch(0)

    def on_running(self, epoch: Epoch) -> None:
        """A member was seen to run under this map."""
        self._running_epoch = max(self._running_epoch, epoch)

    def on_publishing(self, epoch: Epoch) -> None:
        """A write of the map of this epoch has begun. Whether it succeeds may stay unknown."""
        self._first_epoch = max(self._first_epoch, Epoch(epoch + 1))

    def publish(
        self,
        residency: Residency,
        rows: dict[Member, Placement],
        cause: str,
        now: float,
        assignments: tuple[SlotContents, ...] = (),
        *,
        at_once: bool = False,
        drained: Sequence[Member] = (),
    ) -> PublishMap | None:
        """The map with these members, `drained` being those of the others that live. None if it
        must wait until all run under the present map: not after a death, nor `at_once`."""
        current, epoch = residency.state.expert_map, self.next_epoch(residency.state)
        missing = [m for m in (current.members if current else ()) if m not in rows]
        dead = [m for m in missing if m not in drained]
        if any(m not in self._dead for m in dead):  # a map of an older spec: judge it first
            return None
        if not dead and not at_once and not self._adoption.may_follow(now):
            return None
        expert_map = residency.map_of(
            rows,
            epoch=epoch,
            joiners=self._adoption.joiners(rows),
            is_planned=current is not None and not dead and not at_once,
            cause=cause,
            published_at=now,
        )
        return PublishMap(
            expert_map=expert_map,
            verdicts=(
                *(replace(self._dead[m], epoch=epoch) for m in dead),
                *verdicts_on(drained, SuspicionReason.DRAINED, epoch=epoch, now=now),
            ),
            assignments=assignments,
        )

    def assign(
        self,
        residency: Residency,
        wanted: dict[Member, Placement],
        *,
        force: bool = False,
        dead: Iterable[Member] = (),
    ) -> Assign | None:
        """What differs from what is assigned, or all if `force`, with the verdicts on `dead` that
        etcd does not hold yet."""
        epoch = self._newest_epoch(residency.state)
        assignments = residency.assignments(wanted, epoch=epoch, force=force)
        verdicts = self._fresh_verdicts(residency.state, dead)
        return Assign(assignments=assignments, verdicts=verdicts) if assignments else None

    def declare_dead(self, residency: Residency, members: Sequence[Member]) -> DeclareDead | None:
        verdicts = self._fresh_verdicts(residency.state, members)
        return DeclareDead(verdicts=verdicts) if verdicts else None

    def next_epoch(self, state: ClusterState) -> Epoch:
        """Above that of every map that somebody may run, also if etcd has lost it."""
        return Epoch(max(self._newest_epoch(state) + 1, self._first_epoch))

    def is_newest_map_stored(self, state: ClusterState) -> bool:
        """Whether etcd has the newest map that a member may run under."""
        current = state.expert_map
        epoch = current.epoch if current is not None else Epoch(0)
        return state.is_map_stored and epoch >= self._running_epoch

    def _newest_epoch(self, state: ClusterState) -> Epoch:
        current = state.expert_map
        known = current.epoch if current is not None else Epoch(0)
        return max(known, self._running_epoch)

    def _fresh_verdicts(
        self, state: ClusterState, members: Iterable[Member]
    ) -> tuple[Verdict, ...]:
        """For the dead among `members` that have no verdict in etcd yet."""
        fresh = [m for m in members if m in self._dead and m not in state.verdicts]
        epoch = self.next_epoch(state)
        return tuple(replace(self._dead[m], epoch=epoch) for m in fresh)
