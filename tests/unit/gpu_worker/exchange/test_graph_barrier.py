"""Ranks that meet by counting graphs, over a network that delays what they say: whatever the order
of maps, update, deaths and work, graphs that meet have the same number, nobody waits for ever, and
all sleep in the end."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gpu_worker.exchange.graph_barrier import IDLE_GRAPHS, SLEEP_AHEAD, GraphBarrier
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId
from shared.wire import GraphBarrierUpdate

RANKS = 4


def life(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def map_of(epoch: int, members: list[Member], joiners: list[Member]) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=1,
        members=tuple(sorted(members)),
        placement=np.zeros((1, RANKS, 1), dtype=np.int16),
        joiners=tuple(m.rank for m in sorted(joiners)),
    )


@dataclass
class GraphInFlight:
    """A graph in flight. `lost`: it lacks somebody."""

    number: int
    filler: bool
    lost: bool
    timed_out: tuple[Member, ...] = ()


class SimRank:
    """An engine's loop and a device's mask around a barrier."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.barrier = GraphBarrier(member)
        self.told: GraphBarrierUpdate | None = None
        self.mapping = False
        self.newest: ExpertMap | None = None  # effects of
        self.delivered_map: ExpertMap | None = None  # to the engine: links are open
        self.adopted: ExpertMap | None = None
        self.mask: set[Member] = set()
        self.given_up: dict[Member, Epoch] = {}
        self.graphs_in_flight: deque[GraphInFlight] = deque()
        self.behind = False
        self.asleep = False
        self.work = 0
        self.woken = -1
        self.committed: list[tuple[int, int]] = []  # epoch, number

    # What the event loop does

    def on_map(self, expert_map: ExpertMap) -> None:
        if not expert_map.has(self.member) or (
            self.newest is not None and expert_map.epoch <= self.newest.epoch
        ):
            return
        self.newest = expert_map
        effects = self.barrier.on_map(expert_map)
        self.release(effects.to_release, expert_map.epoch)
        self.barrier.on_released(effects.to_release, expert_map.epoch)

    def declare_dead(self, dead: Member, epoch: Epoch) -> None:
        self.release(frozenset({dead}), epoch)
        self.barrier.declare_dead(dead, epoch)

    def release(self, dead: frozenset[Member], epoch: Epoch) -> None:
        self.given_up |= dict.fromkeys(dead, epoch)
        if self.mask & dead:
            self.mask -= dead
            for flight in self.graphs_in_flight:
                flight.lost = True

    # What the engine does

    def launch(self, *, filler: bool) -> None:
        self.barrier.launch()
        lost = self.adopted is not None and any(m not in self.mask for m in self.adopted.members)
        self.graphs_in_flight.append(GraphInFlight(self.barrier.num_launched - 1, filler, lost))

    def may_go_ahead(self) -> bool:
        is_behind = self.behind or self.delivered_map is not self.adopted
        return (
            self.work > len(self.graphs_in_flight)
            and not is_behind
            and self.barrier.may_launch_ahead()
        )

    def turn(self, sim: BarrierSim) -> None:
        if self.mapping:
            self.enter()
            return
        if self.graphs_in_flight:
            if self.may_go_ahead():
                self.launch(filler=False)
                if self.barrier.note_missed_sleep():
                    sim.wake(self, self.barrier.num_launched)
            return
        newest, barrier = self.delivered_map, self.barrier
        epoch = self.adopted.epoch if self.adopted is not None else 0
        if newest is not None and newest.epoch > epoch:
            at = barrier.join_at(newest)
            if at is not None:
                if self.member.rank not in newest.joiners and barrier.num_launched < at:
                    self.launch(filler=True)
                    return
                barrier.pause(newest)
                if not barrier.may_adopt(newest):
                    return
                barrier.adopt(newest)
                self.adopted, self.mask = newest, set()
                self.mapping = True
                sim.note_adopted(self, at)
                return
        if barrier.may_flush(stopped=self.behind):
            sim.num_flushed += 1
            self.launch(filler=True)
            return
        if self.adopted is None or self.behind:
            return
        if self.asleep and self.work:
            sim.wake(self, barrier.num_launched)
            self.asleep = False
        elif self.asleep:
            self.asleep = self.woken < barrier.num_launched
        if not self.asleep and barrier.may_launch():
            self.launch(filler=False)
            if barrier.note_missed_sleep():
                sim.wake(self, barrier.num_launched)

    def maps_joiners(self) -> bool:
        return self.mapping and self.adopted is not None and bool(self.adopted.joiners)

    def enter(self) -> None:
        """It has mapped the joiners, and waits for whom no newer map has given up."""
        assert self.adopted is not None
        epoch = self.adopted.epoch
        self.mapping = self.behind = self.asleep = False
        self.mask = {m for m in self.adopted.members if self.given_up.get(m, 0) <= epoch}
        self.barrier.enter()

    def time_out(self, sim: BarrierSim) -> None:
        """The running kernel waits no longer for those that have not launched its graph."""
        flight = self.graphs_in_flight[0]
        late = [m for m in self.mask - {self.member} if not sim.has_launched(m, flight.number)]
        self.mask -= set(late)
        for each in self.graphs_in_flight:
            each.lost = True
            each.timed_out = (*each.timed_out, *late)

    def complete(self, sim: BarrierSim) -> None:
        flight = self.graphs_in_flight.popleft()
        self.barrier.on_graph_done(flight.timed_out)
        if flight.filler:
            return
        self.behind = self.behind or flight.lost
        if self.behind:
            return
        assert self.adopted is not None
        self.committed.append((self.adopted.epoch, flight.number))
        had_work = self.work > 0
        self.work = max(0, self.work - 1)
        self.barrier.note_step(had_work=had_work)
        if self.barrier.sleep_if_agreed():
            self.asleep = True
        elif self.barrier.note_missed_sleep():
            sim.wake(self, self.barrier.num_launched)


class BarrierSim:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.ranks: dict[Member, SimRank] = {}
        self.channels: dict[tuple[Member, Member], deque[tuple[str, object]]] = {}
        self.maps: list[ExpertMap] = []
        self.seen: dict[Member, int] = {}  # how many maps reached it
        self.verdicts: list[tuple[Member, Epoch]] = []
        self.judged: dict[Member, int] = {}
        self.first_graph: dict[int, int] = {}
        self.num_flushed = 0
        self.timeouts = 0.0  # how likely a kernel that waits for somebody gives it up

    def start(self, member: Member) -> None:
        self.ranks[member] = SimRank(member)
        self.seen[member] = self.judged[member] = 0

    def alive(self) -> list[SimRank]:
        return [self.ranks[m] for m in sorted(self.ranks)]

    def publish(self, members: list[Member], joiners: list[Member]) -> None:
        epoch = self.maps[-1].epoch + 1 if self.maps else 1
        self.maps.append(map_of(epoch, members, joiners))

    def is_settled(self) -> bool:
        current_map = self.maps[-1]
        ranks = [self.ranks.get(m) for m in current_map.members]
        return all(r is not None and r.barrier.own.entered >= current_map.epoch for r in ranks)

    def kill(self, member: Member) -> None:
        """And judge it: those unsettled begin anew."""
        current_map, settled = self.maps[-1], self.is_settled()
        del self.ranks[member]
        self.verdicts.append((member, Epoch(current_map.epoch + 1)))
        if current_map.has(member):
            members = [m for m in current_map.members if m != member]
            again = [] if settled else [m for m in members if m.rank in current_map.joiners]
            self.publish(members, again)

    def join(self, member: Member) -> None:
        """Beside those unsettled, who begin anew."""
        current_map, settled = self.maps[-1], self.is_settled()
        self.start(member)
        again = [] if settled else [m for m in current_map.members if m.rank in current_map.joiners]
        self.publish([*current_map.members, member], [*again, member])

    def has_launched(self, member: Member, number: int) -> bool:
        peer = self.ranks.get(member)
        return peer is not None and peer.barrier.num_launched > number

    def needs_resync(self) -> bool:
        newest = self.maps[-1]
        epochs = [(r.member.rank, r.barrier.out_of_step) for r in self.alive()]
        return any(e == newest.epoch or (e and r not in newest.joiners) for r, e in epochs)

    def _may_time_out(self, rank: SimRank) -> bool:
        if not self.timeouts or not rank.graphs_in_flight or self.draw.random() > self.timeouts:
            return False
        number = rank.graphs_in_flight[0].number
        return any(not self.has_launched(m, number) for m in rank.mask - {rank.member})

    def wake(self, by: SimRank, number: int) -> None:
        self.send(by.member, ("wake", number))

    def send(self, source: Member, what: tuple[str, object]) -> None:
        for target in self.ranks:
            if target != source:
                self.channels.setdefault((source, target), deque()).append(what)

    def note_adopted(self, rank: SimRank, at: int) -> None:
        """All who adopt a map with joiners do it before the same graph."""
        assert rank.adopted is not None
        if rank.adopted.joiners:
            assert self.first_graph.setdefault(rank.adopted.epoch, at) == at

    def advance(self) -> bool:
        """One thing happens somewhere. False: nothing can."""
        options: list[tuple[str, object]] = [("turn", r) for r in self.alive() if self._may_turn(r)]
        options += [("complete", r) for r in self.alive() if self._may_complete(r)]
        options += [("time out", r) for r in self.alive() if self._may_time_out(r)]
        if self.needs_resync():
            options.append(("resync", None))
        options += [("deliver", pair) for pair, wire in self.channels.items() if wire]
        options += [("map", r) for r in self.alive() if self.seen[r.member] < len(self.maps)]
        options += [
            ("verdict", r) for r in self.alive() if self.judged[r.member] < len(self.verdicts)
        ]
        options += [("hand", r) for r in self.alive() if r.delivered_map is not r.newest]
        if not options:
            return False
        kind, what = self.draw.choice(options)
        if kind == "resync":
            members = [m for m in self.maps[-1].members if m in self.ranks]
            self.publish(members, members)
        elif kind == "deliver":
            assert isinstance(what, tuple)
            self._deliver(*what)
        else:
            assert isinstance(what, SimRank)
            self._do(kind, what)
        self._check_pause()
        return True

    def _check_pause(self) -> None:
        """Unmapping a former life's memory waits for all graphs of a card, where ranks share it:
        while anybody maps joiners, none is in flight that waits for one still to be launched."""
        mapping = [r.member for r in self.alive() if r.maps_joiners()]
        for rank in self.alive() if mapping else []:
            for flight in rank.graphs_in_flight:
                waits = [m for m in rank.mask if m in self.ranks and m != rank.member]
                late = [m for m in waits if self.ranks[m].barrier.num_launched <= flight.number]
                assert not late, f"{rank.member} waits for {late} while {mapping} map joiners"

    def is_still(self) -> bool:
        return not any(rank.graphs_in_flight for rank in self.alive())

    def _do(self, kind: str, rank: SimRank) -> None:
        if kind == "time out":
            rank.time_out(self)
        elif kind == "turn":
            rank.turn(self)
        elif kind == "complete":
            rank.complete(self)
        elif kind == "hand":
            rank.delivered_map = rank.newest
        elif kind == "map":
            self.seen[rank.member] += 1
            rank.on_map(self.maps[self.seen[rank.member] - 1])
        else:
            self.judged[rank.member] += 1
            rank.declare_dead(*self.verdicts[self.judged[rank.member] - 1])
        self._tell(rank)

    def _tell(self, rank: SimRank) -> None:
        if rank.barrier.own != rank.told:
            rank.told = rank.barrier.own
            self.send(rank.member, ("update", rank.told))

    def _deliver(self, source: Member, target: Member) -> None:
        kind, what = self.channels[source, target].popleft()
        rank = self.ranks.get(target)
        if rank is None:
            return
        if kind == "wake":
            assert isinstance(what, int)
            rank.woken = max(rank.woken, what)
            return
        assert isinstance(what, GraphBarrierUpdate)
        rank.barrier.on_update(what)
        if rank.barrier.note_missed_sleep():
            self.wake(rank, rank.barrier.num_launched)
        self._tell(rank)

    def _may_turn(self, rank: SimRank) -> bool:
        """Whether a turn would change something: a trial on nothing but the questions it asks."""
        if rank.mapping:
            return not rank.maps_joiners() or self.is_still()
        if rank.graphs_in_flight:
            return rank.may_go_ahead()
        newest, adopted, barrier = rank.delivered_map, rank.adopted, rank.barrier
        epoch = adopted.epoch if adopted else 0
        if newest and newest.epoch > epoch:
            at = barrier.join_at(newest)
            must_pause = newest.joiners and barrier.own.paused < newest.epoch
            if at is not None and (must_pause or barrier.may_adopt(newest)):
                return True
        if barrier.may_flush(stopped=rank.behind):
            return True
        if adopted is None or rank.behind:
            return False
        awake = not rank.asleep or rank.work > 0 or rank.woken >= barrier.num_launched
        return awake and barrier.may_launch()

    def _may_complete(self, rank: SimRank) -> bool:
        """Everybody it still waits for has launched the graph of the same number: a peer's buffer
        knows no numbers, so they must be equal whenever two wait for each other. What a rank has
        not seen the end of may lie two behind, for each may have launched one more."""
        if not rank.graphs_in_flight:
            return False
        number = rank.graphs_in_flight[0].number
        for member in rank.mask - {rank.member}:
            peer = self.ranks.get(member)
            if peer is None or peer.barrier.num_launched <= number:
                return False
            if rank.member in peer.mask and peer.graphs_in_flight:
                assert abs(peer.graphs_in_flight[0].number - number) <= 2, "they are out of step"
        return True

    def run(self, turns: int) -> None:
        for _ in range(turns):
            if not self.advance():
                return

    def settle(self) -> None:
        self.run(100_000)
        assert not self.advance(), "something goes on for ever"
        for rank in self.alive():
            assert not rank.mapping, f"{rank.member} maps for ever"
            assert not rank.graphs_in_flight, (
                f"{rank.member} waits for ever in {rank.graphs_in_flight[0]}"
            )
            assert rank.adopted is self.maps[-1]
            assert rank.asleep
            assert not rank.work
        assert len({rank.barrier.num_launched for rank in self.alive()}) <= 1


def formed(seed: int) -> BarrierSim:
    sim = BarrierSim(seed)
    members = [life(rank) for rank in range(RANKS)]
    for member in members:
        sim.start(member)
    sim.publish(members, members)
    return sim


def give_work(sim: BarrierSim, amount: int) -> None:
    for rank in sim.alive():
        if sim.draw.random() < 0.5:
            rank.work += sim.draw.randrange(amount)


@pytest.mark.parametrize("seed", range(20))
def test_all_sleep_after_work_and_wake_for_more(seed: int) -> None:
    sim = formed(seed)
    sim.settle()
    for _ in range(3):
        give_work(sim, 100)
        sim.run(sim.draw.randrange(500))
        give_work(sim, 20)
        sim.settle()


@pytest.mark.parametrize("seed", range(60))
def test_deaths_and_joins_at_any_moment(seed: int) -> None:
    disturb(formed(seed), rounds=5, turns=400, patience=1.0)


@pytest.mark.parametrize("seed", range(60))
def test_joiners_are_mapped_slowly_while_others_die_and_join(seed: int) -> None:
    sim = formed(seed)
    sim.settle()
    sim.draw = _SlowMapping(seed)
    disturb(sim, rounds=8, turns=150, patience=0.7)


@pytest.mark.parametrize("seed", range(100))
def test_kernels_time_out_at_any_moment(seed: int) -> None:
    """Also while they wait for members that live: all meet again, in a map that names everybody as
    a joiner."""
    sim = formed(seed)
    sim.settle()
    sim.timeouts = 0.02
    disturb(sim, rounds=6, turns=300, patience=1.0)


def test_a_graph_that_nobody_else_has_launched_is_met_by_empty_graphs() -> None:
    """Before its timeout, although no map without the dead comes."""
    flushed = 0
    for seed in range(40):
        sim = formed(seed)
        sim.settle()
        give_work(sim, 100)
        sim.run(sim.draw.randrange(200))
        dead = life(RANKS - 1)
        del sim.ranks[dead]
        sim.verdicts.append((dead, Epoch(2)))
        sim.run(20_000)
        counts = {rank.barrier.num_launched for rank in sim.alive()}
        assert len(counts) == 1
        assert not any(rank.graphs_in_flight for rank in sim.alive())
        flushed += sim.num_flushed
    assert flushed


def disturb(sim: BarrierSim, *, rounds: int, turns: int, patience: float) -> None:
    """`patience`: how often a join waits for the one before."""
    sim.run(sim.draw.randrange(turns))
    incarnations = dict.fromkeys(range(RANKS), 1)
    for _ in range(rounds):
        give_work(sim, 40)
        members = [m for m in sim.maps[-1].members if m in sim.ranks]
        missing = sorted(set(range(RANKS)) - {m.rank for m in sim.ranks})
        may_join = sim.is_settled() or sim.draw.random() > patience
        if missing and may_join and sim.draw.random() < 0.6:
            incarnations[missing[0]] += 1
            sim.join(life(missing[0], incarnations[missing[0]]))
        elif len(members) > 1:
            sim.kill(*sim.draw.sample(members, 1))
        sim.run(sim.draw.randrange(turns))
    if sim.ranks:
        sim.settle()


def test_a_rank_that_hears_late_of_the_last_promise_wakes_the_others() -> None:
    woken = 0
    for seed in range(20):
        sim = formed(seed)
        sim.draw = _Lazy(seed)
        sim.run(3000)
        sim.draw = random.Random(seed)
        sim.settle()
        woken += sum(rank.woken >= 0 for rank in sim.alive())
    assert woken, "no schedule was late enough to show it"


class _SlowMapping(random.Random):
    """Who maps joiners is rarely done with it."""

    def choice(self, options):  # type: ignore[no-untyped-def]
        others = [o for o in options if o[0] != "turn" or not o[1].mapping]
        return super().choice(others if others and self.random() < 0.99 else options)


class _Lazy(random.Random):
    """Delivers update as late as possible, now and then."""

    def choice(self, options):  # type: ignore[no-untyped-def]
        others = [o for o in options if o[0] != "deliver"]
        return super().choice(others if others and self.random() < 0.97 else options)


def news_of(member: Member, *, entered: int, invalidated: int) -> GraphBarrierUpdate:
    return GraphBarrierUpdate(
        member=member,
        joining=Epoch(0),
        limit=0,
        paused=Epoch(0),
        entered=Epoch(entered),
        sleep_at=-1,
        slept_at=-1,
        invalidated=Epoch(invalidated),
        launched=0,
    )


def running(own: Member, expert_map: ExpertMap) -> GraphBarrier:
    """Under this map."""
    barrier = GraphBarrier(own)
    barrier.on_map(expert_map)
    barrier.adopt(expert_map)
    barrier.enter()
    return barrier


def test_who_has_promised_to_sleep_and_has_work_again_runs_ahead_up_to_the_common_sleep() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two], []))
    for _ in range(IDLE_GRAPHS):
        barrier.launch()
        barrier.on_graph_done()
        barrier.note_step(had_work=False)
    assert barrier.own.sleep_at == IDLE_GRAPHS + SLEEP_AHEAD
    barrier.launch()
    barrier.on_update(replace(news_of(two, entered=1, invalidated=0), sleep_at=-1))
    assert barrier.may_launch_ahead()  # the other one is busy, for ever perhaps
    barrier.on_update(
        replace(news_of(two, entered=1, invalidated=0), sleep_at=barrier.num_launched + 1)
    )
    while barrier.num_launched < barrier.own.sleep_at:
        assert barrier.may_launch_ahead()
        barrier.launch()
        barrier.on_graph_done()
    assert not barrier.may_launch_ahead()
    assert not barrier.sleep_if_agreed()  # not while that graph is in flight
    barrier.on_graph_done()
    assert barrier.sleep_if_agreed()


def test_a_slot_is_clear_once_all_have_entered_a_newer_map_or_let_go() -> None:
    one, two, dead = life(0), life(1), life(2)
    barrier = running(one, map_of(1, [one, two, dead], []))
    barrier.on_update(news_of(two, entered=1, invalidated=0))
    assert not barrier.is_clear_of(Epoch(1))
    barrier.declare_dead(dead, Epoch(2))
    assert not barrier.is_clear_of(Epoch(1))  # the other one may still deliver a step
    barrier.on_update(news_of(two, entered=1, invalidated=1))
    assert barrier.is_clear_of(Epoch(1))


def test_a_map_that_names_one_declared_dead_since_needs_nobody_to_have_entered_it() -> None:
    one, two, three, dead = life(0), life(1), life(2), life(3)
    barrier = running(one, map_of(5, [one, two, three, dead], []))
    barrier.declare_dead(dead, Epoch(6))
    barrier.on_map(map_of(6, [one, two, three], []))  # nobody can adopt it:
    barrier.declare_dead(three, Epoch(7))
    barrier.on_update(news_of(two, entered=5, invalidated=5))
    assert not barrier.is_clear_of(Epoch(6))
    barrier.on_update(news_of(two, entered=5, invalidated=6))
    assert barrier.is_clear_of(Epoch(6))


def test_a_graph_in_flight_may_still_be_delivered_where_only_a_map_to_come_names_the_dead() -> None:
    one, two, joiner = life(0), life(1), life(2)
    barrier = running(one, map_of(1, [one, two], []))
    barrier.launch()
    barrier.on_map(map_of(2, [one, two, joiner], [joiner]))
    barrier.declare_dead(joiner, Epoch(3))
    assert barrier.own.invalidated == 0
    barrier.on_graph_done()
    assert barrier.own.invalidated == 2


def test_a_verdict_on_somebody_in_no_map_spoils_none() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two], []))
    barrier.declare_dead(life(2), Epoch(2))
    assert barrier.own.invalidated == 0


def test_nothing_is_launched_between_a_map_with_joiners_and_its_adoption() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one], []))
    assert barrier.may_launch()
    second = map_of(2, [one, two], [two])
    barrier.on_map(second)
    assert not barrier.may_launch()
    assert barrier.join_at(second) is None
    with pytest.raises(StepAbandoned):
        barrier.adopt(second)


def paused_for_a_joiner_that_died() -> tuple[GraphBarrier, Member]:
    """Under map 3, after it had paused for map 2; with the other member."""
    one, two, joiner = life(0), life(1), life(2)
    barrier = running(one, map_of(1, [one, two], []))
    second = map_of(2, [one, two, joiner], [joiner])
    barrier.on_map(second)
    barrier.on_update(replace(news_of(two, entered=1, invalidated=0), joining=Epoch(2)))
    barrier.on_update(replace(news_of(joiner, entered=0, invalidated=0), joining=Epoch(2)))
    barrier.launch()
    barrier.on_graph_done()
    barrier.pause(second)
    assert not barrier.may_adopt(second)  # the others may have graphs in flight
    third = map_of(3, [one, two], [])
    barrier.on_map(third)
    barrier.adopt(third)
    barrier.enter()
    return barrier, two


def test_who_has_paused_launches_nothing_while_a_peer_may_map_the_joiner() -> None:
    barrier, two = paused_for_a_joiner_that_died()
    assert not barrier.may_launch()
    barrier.on_update(
        replace(news_of(two, entered=2, invalidated=0), joining=Epoch(2), paused=Epoch(2))
    )
    assert barrier.may_launch()


def test_a_peer_that_is_ready_for_the_next_joiner_does_not_map_the_last_one() -> None:
    barrier, two = paused_for_a_joiner_that_died()
    barrier.on_update(
        replace(news_of(two, entered=1, invalidated=0), joining=Epoch(4), paused=Epoch(2))
    )
    assert barrier.may_launch()


def test_who_is_ready_for_a_joiner_launches_nothing_under_the_map_before_even_if_it_dies() -> None:
    one, two, joiner = life(0), life(1), life(2)
    barrier = running(one, map_of(1, [one, two], []))
    barrier.on_map(map_of(2, [one, two, joiner], [joiner]))
    third = map_of(3, [one, two], [])
    barrier.on_map(third)
    assert not barrier.may_launch()
    barrier.adopt(third)
    barrier.enter()
    assert barrier.may_launch()


def test_who_maps_joiners_gets_ready_for_the_next_ones_only_after_it() -> None:
    one, two = life(0), life(1)
    barrier = GraphBarrier(one)
    first = map_of(1, [one, two], [one, two])
    barrier.on_map(first)
    barrier.on_update(
        replace(news_of(two, entered=0, invalidated=0), joining=Epoch(1), paused=Epoch(1))
    )
    barrier.adopt(first)
    barrier.on_map(map_of(2, [one, life(2)], [life(2)]))
    assert barrier.own.joining == 1
    barrier.enter()
    assert barrier.own.joining == 2


def test_a_joiner_of_two_maps_is_ready_for_the_newer_one_once_its_graphs_have_ended() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two], []))
    barrier.launch()
    effects = barrier.on_map(map_of(2, [one, two], [one, two]))
    assert effects.to_release == {two}
    assert barrier.own.joining == 0
    barrier.on_graph_done()
    assert (barrier.own.joining, barrier.own.limit, barrier.own.paused) == (2, 1, 2)


def test_numbers_of_graphs_never_go_back() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two], []))
    for _ in range(5):
        barrier.launch()
        barrier.on_graph_done()
    second = map_of(2, [one, two], [one, two])
    barrier.on_map(second)
    told = replace(news_of(two, entered=1, invalidated=0), joining=Epoch(2), limit=7)
    barrier.on_update(told)
    assert barrier.join_at(second) == 7


def out_of_step() -> tuple[GraphBarrier, Member]:
    """A kernel has waited in vain for the other member."""
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two, life(2)], []))
    barrier.launch()
    barrier.on_graph_done([two])
    return barrier, two


def test_who_has_lost_count_launches_nothing_until_a_map_names_it_as_a_joiner() -> None:
    barrier, two = out_of_step()
    assert barrier.out_of_step == 1
    assert not barrier.may_launch()
    without_third = map_of(2, [life(0), two], [])
    barrier.on_map(without_third)
    assert barrier.join_at(without_third) is None
    third = map_of(3, [life(0), two], [life(0), two])
    barrier.on_map(third)
    ready = replace(
        news_of(two, entered=1, invalidated=0), joining=Epoch(3), paused=Epoch(3), limit=4
    )
    barrier.on_update(ready)
    barrier.adopt(third)
    barrier.enter()
    assert barrier.out_of_step == 0
    assert barrier.num_launched == 4


@pytest.mark.parametrize("has_map", [False, True])
def test_who_was_lost_because_it_is_dead_leaves_counts_alone(has_map: bool) -> None:
    barrier, two = out_of_step()
    if has_map:
        barrier.on_map(map_of(2, [life(0), life(2)], []))
    else:
        barrier.declare_dead(two, Epoch(2))
    assert barrier.out_of_step == 0


def test_a_joiner_that_has_entered_the_map_before_may_still_deliver_a_step_of_it() -> None:
    one, two = life(0), life(1)
    barrier = running(one, map_of(1, [one, two], []))
    barrier.on_update(news_of(two, entered=1, invalidated=0))
    barrier.on_map(map_of(2, [one, two], [one, two]))
    barrier.on_released(frozenset({two}), Epoch(2))
    assert not barrier.is_clear_of(Epoch(1))
    barrier.on_update(news_of(two, entered=1, invalidated=1))
    assert barrier.is_clear_of(Epoch(1))


def test_a_promise_comes_after_idle_graphs_only() -> None:
    barrier = running(life(0), map_of(1, [life(0)], []))
    for _ in range(IDLE_GRAPHS - 1):
        barrier.launch()
        barrier.note_step(had_work=False)
        assert barrier.own.sleep_at == -1
    barrier.launch()
    barrier.note_step(had_work=False)
    assert barrier.own.sleep_at == IDLE_GRAPHS + SLEEP_AHEAD
