"""What ranks agree on if they meet by counting graphs: before which graph all adopt a map with
joiners, after which graph all sleep, and when nobody can deliver a step of an old map any more.
Pure: updates in, answers out.

Theory of operation. Every rank launches the same sequence of graphs. Graph n of one rank meets
graph n of the others and waits for it. A rank may launch one more graph while its last is in
flight. That one runs when the last has ended, so no rank runs more than one graph ahead. A death
needs no barrier: survivors stop waiting for the dead member and adopt the map without it whenever
they see it. Three things need one.

*Joining.* A map names its `joiners`. A rank that hears of it launches nothing more and tells how
many graphs it has launched (`limit`). When all members have told this, the old members launch empty
graphs, still without the joiners, up to one more than the highest limit. The last of these wipes
what a former incarnation may have left in their buffers. Then they tell that they have `paused`.
When all have paused, nothing is in flight anywhere. Each rank adopts the map, maps the buffers of
members that it does not know yet, and tells that it has `entered`. The joiners take the common
number as their own. Nobody launches before all have entered: unmapping the memory of a former
incarnation may wait for all graphs of a card, and those may wait for this rank.
A death meanwhile brings a newer map, and joining begins again. A rank that has paused launches
nothing under the newer map either, until all its members have entered one of the two maps. The old
members stop waiting for the joiners. A joiner that has run under a former map stops waiting for all
others, and is ready for the newer one only when its graphs have ended. In the pause it launches one
graph that waits for nobody, which wipes what others have sent it.

*Counts that may differ.* A kernel waits for a member no longer than its timeout. If that member
lives, both have now launched different numbers of graphs with each other, or what one has sent lies
in the other's buffer, and a later graph would take it for its own. Messages carry no number, so
nothing shows it later. So every graph that ends, also one that nobody wants any more, shows which
members it lacks (`on_graph_done`). A rank that lacks a member with neither a verdict nor a map
without it is `out_of_step`. It launches nothing more until a map names it as a joiner; the control
plane publishes one that names all members (a *resync*), in which counts begin together.

*Flushing.* So that this stays rare, nobody lets a graph of another run into its timeout. A rank
whose graphs cannot be delivered any more tells how many it has `launched`. Those under the same map
that have stopped launching, launch empty graphs up to that number.

*Sleeping.* A rank without work for a while promises to sleep at a graph some way ahead
(`sleep_at`). When all have promised, all sleep at the latest of these graphs, without another
message: a promise cannot be taken back. A rank that then has work wakes the others at once. A rank
that hears of the last promise only after that graph goes on and wakes the others as well. Everybody
tells where the common sleep was (`slept_at`), because the promises for the next sleep replace those
for the last one.

*Loading.* A slot that a map names may be overwritten when nobody can deliver a step of that map:
every living member has entered a newer map, or has stopped waiting for some member of it
(`invalidated`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member
from shared.wire import GraphBarrierUpdate

IDLE_GRAPHS = 16
"""A rank promises to sleep after so many graphs without work of its own."""
SLEEP_AHEAD = 32
"""How many graphs ahead. An update that takes longer than these costs a wake."""

_NO_SLEEP = -1


class MapEffects(NamedTuple):
    """`to_release`: members of the adopted map that kernels shall not wait for any more."""

    to_release: frozenset[Member]


class GraphBarrier:
    """Not thread-safe."""

    def __init__(self, own: Member) -> None:
        self.own = _empty_update(own)
        self.num_launched = 0
        self._updates: dict[Member, GraphBarrierUpdate] = {}
        self._newest: ExpertMap | None = None  # effects of
        self._adopted: ExpertMap | None = None
        self._all_have_mapped = False  # of the adopted map, since this rank paused
        self._declared_dead: set[Member] = set()
        self._lost: set[Member] = set()  # graphs have ended without them, though they may live
        self._idle_graphs = 0
        self._num_in_flight = 0
        self._invalidated_on_landing = Epoch(0)

    def on_update(self, update: GraphBarrierUpdate) -> None:
        self._updates[update.member] = update

    # Maps ----------------------------------------------------------------------------------------

    def on_map(self, expert_map: ExpertMap) -> MapEffects:
        """This is now the newest map. It names this rank."""
        assert expert_map.has(self.own.member)
        self._newest = expert_map
        if not self._is_mapping():
            self._prepare_to_join()
        self._declared_dead = {m for m in self._declared_dead if expert_map.has(m)}
        self._lost = {m for m in self._lost if expert_map.has(m)}
        return MapEffects(self._members_dropped_by(expert_map))

    def on_released(self, members: frozenset[Member], epoch: Epoch) -> None:
        """Kernels no longer wait for these members, which `on_map` has returned for the map of
        this epoch. If that map is adopted by now, this changes nothing."""
        adopted = self._adopted
        if adopted is not None and adopted.epoch < epoch and any(map(adopted.has, members)):
            self._invalidate(adopted.epoch)

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        """There is a verdict, and kernels no longer wait for this member. The map of `epoch` will
        be the first without it. No step of the maps before that one can be delivered any more,
        whether they are adopted or not. There is one exception: if only a map that is still to be
        adopted names the dead member, graphs in flight can still be delivered."""
        self._declared_dead.add(dead)
        self._lost.discard(dead)
        self._tell_launched()
        if self._adopted is not None and self._adopted.has(dead):
            self._invalidate(Epoch(epoch - 1))
        elif self._newest is not None and self._newest.has(dead):
            self._invalidated_on_landing = Epoch(epoch - 1)
            if not self._num_in_flight:
                self._invalidate_as_landed()

    def join_at(self, expert_map: ExpertMap) -> int | None:
        """The number of the first graph under this map. None if not all members are ready for it,
        or if this rank is ready for a newer map, or out of step and no joiner."""
        if self.own.joining > expert_map.epoch:
            return None
        if self._lost and self.own.member.rank not in expert_map.joiners:
            return None
        if not expert_map.joiners:
            return self.num_launched
        if any(self._of(m).joining != expert_map.epoch for m in expert_map.members):
            return None
        # Numbers never go back: those of sleeps and wakes would be taken for later ones.
        return max(
            self._of(m).limit + (m.rank not in expert_map.joiners) for m in expert_map.members
        )

    def pause(self, expert_map: ExpertMap) -> None:
        """The last graph before `join_at` has ended."""
        if expert_map.joiners and self.own.paused < expert_map.epoch:
            assert not self._num_in_flight, "a graph is in flight"
            self.own = replace(self.own, paused=expert_map.epoch)
            self._all_have_mapped = False

    def may_adopt(self, expert_map: ExpertMap) -> bool:
        if self.join_at(expert_map) is None:
            return False
        epoch = expert_map.epoch
        return not expert_map.joiners or all(
            self._of(m).paused == epoch for m in expert_map.members
        )

    def adopt(self, expert_map: ExpertMap) -> None:
        """Nobody else may hear of it before `enter`. Raises StepAbandoned if members are not ready
        for it any more, because a newer map is on its way."""
        at = self.join_at(expert_map)
        if at is None or not self.may_adopt(expert_map):
            raise StepAbandoned(f"the members do not meet in epoch {expert_map.epoch}")
        if self.own.member.rank in expert_map.joiners:
            self.num_launched = at
            self._lost.clear()
        assert self.num_launched == at, f"{self.num_launched} graphs launched, not {at}"
        assert not self._num_in_flight, "a graph is in flight under the former map"
        self._adopted = expert_map
        self._all_have_mapped = False

    def enter(self) -> None:
        """From now on kernels wait for the members of the adopted map, except those that newer
        maps or verdicts have removed since."""
        assert self._adopted is not None, "adopt comes first"
        epoch = self._adopted.epoch
        self.own = replace(self.own, entered=epoch, sleep_at=_NO_SLEEP, slept_at=_NO_SLEEP)
        self._idle_graphs = 0
        self._prepare_to_join()

    # Graphs --------------------------------------------------------------------------------------

    def may_launch(self) -> bool:
        """Whether the next graph may be launched under the adopted map."""
        adopted = self._adopted
        if adopted is None or self.own.joining > adopted.epoch or self._lost:
            return False
        self._all_have_mapped = self._all_have_mapped or not self.may_be_mapping()
        return self._all_have_mapped

    def may_be_mapping(self) -> list[Member]:
        """Members of the adopted map that may still be mapping the joiners for which this rank has
        paused. A member that is ready for later joiners is not mapping."""
        paused = self.own.paused
        if self._adopted is None or not paused:
            return []
        update = map(self._of, self._adopted.members)
        return [n.member for n in update if n.entered < paused and n.joining <= paused]

    def awaited(self) -> list[Member]:
        """Members whose next update this rank needs before it goes on with the newest joiners."""
        newest, adopted = self._newest, self._adopted
        if newest is None or not newest.joiners or newest is adopted:
            return self.may_be_mapping()
        epoch = newest.epoch
        update = [self._of(m) for m in newest.members if m != self.own.member]
        unready = [n.member for n in update if n.joining < epoch]
        return unready or [n.member for n in update if n.paused < epoch]

    def may_launch_ahead(self) -> bool:
        """Whether one more graph may be launched while the last is in flight: nothing known would
        spoil it, no map waits for the end of the last one, and not all sleep after it."""
        newest, adopted = self._newest, self._adopted
        if newest is None or adopted is None or newest.epoch != adopted.epoch:
            return False
        at = self._sleep_at()
        is_last = at is not None and self.num_launched >= at
        is_spoilt = bool(self._declared_dead or self._lost)
        return self._num_in_flight == 1 and not is_spoilt and not is_last

    def may_flush(self, *, stopped: bool) -> bool:
        """Whether an empty graph is to be launched for a peer that has launched more, and whose
        graph would wait for this rank until its timeout. `stopped`: this rank runs no more steps
        under the adopted map. A peer under a newer map is not met: what it launches can be
        delivered, and needs the slots of that map."""
        adopted, own = self._adopted, self.own
        if adopted is None or self._is_mapping() or self._num_in_flight:
            return False
        if own.paused > adopted.epoch or not (stopped or own.joining > adopted.epoch):
            return False
        gone = self._declared_dead | self._lost
        peers = [self._of(m) for m in adopted.members if m not in gone and m != own.member]
        counts = [max(u.launched, u.limit) for u in peers if u.entered == own.entered]
        return max(counts, default=0) > self.num_launched

    def launch(self) -> None:
        """Call `note_missed_sleep` afterwards: the last promise may have come just before."""
        self.num_launched += 1
        self._num_in_flight += 1
        self._tell_launched()

    def on_graph_done(self, lost: Collection[Member] = ()) -> None:
        """The first of the graphs in flight has ended, whatever its result. `lost`: members of the
        adopted map that it lacks, without those that kernels no longer wait for."""
        self._num_in_flight -= 1
        newest = self._newest
        self._lost.update(
            m for m in lost if m not in self._declared_dead and (newest is None or newest.has(m))
        )
        self._tell_launched()
        if not self._num_in_flight:
            self._invalidate_as_landed()
            if not self._is_mapping():
                self._prepare_to_join()

    @property
    def out_of_step(self) -> Epoch:
        """The adopted map, if a graph under it has ended without a member that may live: counts may
        differ, and only a map that names this rank as a joiner ends that. Otherwise 0."""
        return self._adopted.epoch if self._adopted is not None and self._lost else Epoch(0)

    def note_step(self, *, had_work: bool) -> None:
        """A step was committed."""
        self._idle_graphs = 0 if had_work else self._idle_graphs + 1
        if self._idle_graphs < IDLE_GRAPHS or self.own.sleep_at > self.own.slept_at:
            return
        self.own = replace(self.own, sleep_at=self.num_launched + SLEEP_AHEAD)

    def sleep_if_agreed(self) -> bool:
        """Whether the graph just committed is the one after which all sleep."""
        at = self._sleep_at()
        if at is None or at != self.num_launched or self._num_in_flight:
            return False
        self._record_sleep(at)
        return True

    def note_missed_sleep(self) -> bool:
        """Whether the others sleep since a graph that this rank has passed. If so, wake them."""
        at = self._sleep_at()
        if at is None or at >= self.num_launched:
            return False
        self._record_sleep(at)
        return True

    def is_clear_of(self, epoch: Epoch) -> bool:
        """Whether no living member can deliver a step of map `epoch` or an older one."""
        newest = self._newest
        if newest is None:
            return True
        for member in newest.members:
            if member in self._declared_dead or self._never_ran(member, newest, epoch):
                continue
            update = self._of(member)
            if update.entered <= epoch and update.invalidated < epoch:
                return False
        return True

    def _of(self, member: Member) -> GraphBarrierUpdate:
        if member == self.own.member:
            return self.own
        return self._updates.get(member) or _empty_update(member)

    def _is_mapping(self) -> bool:
        """Between `adopt` and `enter`. If this rank told meanwhile that it is ready for a newer
        map, the others would launch empty graphs, and these would wait for it."""
        return self._adopted is not None and self.own.entered != self._adopted.epoch

    def _prepare_to_join(self) -> None:
        """For the newest map, if it has joiners that this rank has not prepared for yet. A joiner
        is ready only when nothing of it is in flight: what it sends later would lie in buffers that
        the old members have wiped."""
        newest = self._newest
        if newest is None or not newest.joiners or newest.epoch <= self.own.joining:
            return
        is_joiner = self.own.member.rank in newest.joiners
        if is_joiner and self._num_in_flight:
            return
        self.own = replace(self.own, joining=newest.epoch, limit=self.num_launched)
        if is_joiner:
            self.pause(newest)

    def _members_dropped_by(self, expert_map: ExpertMap) -> frozenset[Member]:
        """Members of the adopted map that are not in the new one, or are joiners in it."""
        if self._adopted is None:
            return frozenset()
        return frozenset(
            m
            for m in self._adopted.members
            if m != self.own.member and (not expert_map.has(m) or m.rank in expert_map.joiners)
        )

    def _tell_launched(self) -> None:
        """If no graph in flight can be delivered, peers must meet it before its timeout."""
        if self._declared_dead or self._lost or self._is_invalid():
            self.own = _with_launched(self.own, self.num_launched)

    def _is_invalid(self) -> bool:
        return self._adopted is not None and self.own.invalidated >= self._adopted.epoch

    def _invalidate_as_landed(self) -> None:
        self._invalidate(self._invalidated_on_landing)
        self._invalidated_on_landing = Epoch(0)

    def _invalidate(self, epoch: Epoch) -> None:
        if epoch > self.own.invalidated:
            self.own = replace(self.own, invalidated=epoch)
            self._tell_launched()

    def _sleep_at(self) -> int | None:
        """The graph at which all members of the adopted map have agreed to sleep, if this rank has
        not recorded it yet. They can agree on the next one only after this rank has recorded this
        one. So if a member tells of a later sleep than this rank knows, it means this one."""
        if self._adopted is None or self._is_mapping():
            return None
        everybody = [self._of(m) for m in self._adopted.members]
        if any(n.entered != self.own.entered for n in everybody):
            return None
        latest = max(n.slept_at for n in everybody)
        if latest > self.own.slept_at:
            return latest
        if any(n.sleep_at <= latest for n in everybody):
            return None
        return max(n.sleep_at for n in everybody)

    def _record_sleep(self, at: int) -> None:
        self.own = replace(self.own, slept_at=at)
        self._idle_graphs = 0

    def _never_ran(self, member: Member, newest: ExpertMap, epoch: Epoch) -> bool:
        """A joiner that is not known to have entered any map has launched nothing with us."""
        is_joiner = member.rank in newest.joiners
        return epoch < newest.epoch and is_joiner and not self._of(member).entered


def _with_launched(update: GraphBarrierUpdate, launched: int) -> GraphBarrierUpdate:
    return update if update.launched == launched else replace(update, launched=launched)


def _empty_update(member: Member) -> GraphBarrierUpdate:
    """What is known of a member that has told nothing yet."""
    return GraphBarrierUpdate(
        member=member,
        joining=Epoch(0),
        limit=0,
        paused=Epoch(0),
        entered=Epoch(0),
        sleep_at=_NO_SLEEP,
        slept_at=_NO_SLEEP,
        invalidated=Epoch(0),
        launched=0,
    )
