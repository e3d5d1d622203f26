"""Ranks that meet by counting graphs, over a network that delays what they say: whatever the order
of maps, news, deaths and work, graphs that meet have the same number, nobody waits for ever, and
all sleep in the end."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gpu_worker.exchange.graph_barrier import IDLE_GRAPHS, SLEEP_AHEAD, GraphAccord
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId
from shared.wire import GraphNews

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
class Flight:
    """A graph in flight. `lost`: it lacks somebody."""

    number: int
    filler: bool
    lost: bool


class SimRank:
    """An engine's loop and a device's mask around an accord."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.accord = GraphAccord(member)
        self.told: GraphNews | None = None
        self.mapping = False
        self.newest: ExpertMap | None = None  # heard of
        self.handed: ExpertMap | None = None  # to the engine: links are open
        self.adopted: ExpertMap | None = None
        self.mask: set[Member] = set()
        self.given_up: dict[Member, Epoch] = {}
        self.flights: deque[Flight] = deque()
        self.behind = False
        self.asleep = False
        self.work = 0
        self.woken = -1
        self.left = False
        self.committed: list[tuple[int, int]] = []  # epoch, number

    # What the event loop does

    def hear(self, expert_map: ExpertMap) -> None:
        if not expert_map.has(self.member) or (
            self.newest is not None and expert_map.epoch <= self.newest.epoch
        ):
            return
        self.newest = expert_map
        heard = self.accord.hear(expert_map)
        self.left = self.left or heard.leave
        self.release(heard.give_up, expert_map.epoch)
        self.accord.gave_up(heard.give_up)

    def condemn(self, dead: Member, epoch: Epoch) -> None:
        self.release(frozenset({dead}), epoch)
        self.accord.condemn(dead, epoch)

    def release(self, dead: frozenset[Member], epoch: Epoch) -> None:
        self.given_up |= dict.fromkeys(dead, epoch)
        if self.mask & dead:
            self.mask -= dead
            for flight in self.flights:
                flight.lost = True

    # What the engine does

    def launch(self, *, filler: bool) -> None:
        self.accord.launch()
        lost = self.adopted is not None and any(m not in self.mask for m in self.adopted.members)
        self.flights.append(Flight(self.accord.launched - 1, filler, lost))

    def may_go_ahead(self) -> bool:
        is_behind = self.behind or self.handed is not self.adopted
        return self.work > len(self.flights) and not is_behind and self.accord.may_launch_ahead()

    def turn(self, world: World) -> None:
        if self.left:
            return
        if self.mapping:
            self.enter()
            return
        if self.flights:
            if self.may_go_ahead():
                self.launch(filler=False)
                if self.accord.has_overslept():
                    world.wake(self, self.accord.launched)
            return
        newest, accord = self.handed, self.accord
        epoch = self.adopted.epoch if self.adopted is not None else 0
        if newest is not None and newest.epoch > epoch:
            at = accord.join_at(newest)
            if at is not None:
                if self.member.rank not in newest.joiners and accord.launched < at:
                    self.launch(filler=True)
                    return
                accord.pause(newest)
                if not accord.may_adopt(newest):
                    return
                accord.adopt(newest)
                self.adopted, self.mask = newest, set()
                self.mapping = True
                world.note_adopted(self, at)
                return
        if self.adopted is None or self.behind:
            return
        if self.asleep and self.work:
            world.wake(self, accord.launched)
            self.asleep = False
        elif self.asleep:
            self.asleep = self.woken < accord.launched
        if not self.asleep and accord.may_launch():
            self.launch(filler=False)
            if accord.has_overslept():
                world.wake(self, accord.launched)

    def maps_joiners(self) -> bool:
        return self.mapping and self.adopted is not None and bool(self.adopted.joiners)

    def enter(self) -> None:
        """It has mapped the joiners, and waits for whom no newer map has given up."""
        assert self.adopted is not None
        epoch = self.adopted.epoch
        self.mapping = self.behind = self.asleep = False
        self.mask = {m for m in self.adopted.members if self.given_up.get(m, 0) <= epoch}
        self.accord.enter()

    def complete(self, world: World) -> None:
        flight = self.flights.popleft()
        self.accord.land()
        if flight.filler:
            return
        self.behind = self.behind or flight.lost
        if self.behind:
            return
        assert self.adopted is not None
        self.committed.append((self.adopted.epoch, flight.number))
        had_work = self.work > 0
        self.work = max(0, self.work - 1)
        self.accord.note_step(had_work=had_work)
        if self.accord.falls_asleep():
            self.asleep = True
        elif self.accord.has_overslept():
            world.wake(self, self.accord.launched)


class World:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.ranks: dict[Member, SimRank] = {}
        self.wires: dict[tuple[Member, Member], deque[tuple[str, object]]] = {}
        self.maps: list[ExpertMap] = []
        self.seen: dict[Member, int] = {}  # how many maps reached it
        self.verdicts: list[tuple[Member, Epoch]] = []
        self.judged: dict[Member, int] = {}
        self.first_graph: dict[int, int] = {}

    def start(self, member: Member) -> None:
        self.ranks[member] = SimRank(member)
        self.seen[member] = self.judged[member] = 0

    def alive(self) -> list[SimRank]:
        return [self.ranks[m] for m in sorted(self.ranks)]

    def publish(self, members: list[Member], joiners: list[Member]) -> None:
        epoch = self.maps[-1].epoch + 1 if self.maps else 1
        self.maps.append(map_of(epoch, members, joiners))

    def is_settled(self) -> bool:
        standing = self.maps[-1]
        ranks = [self.ranks.get(m) for m in standing.members]
        return all(r is not None and r.accord.own.entered >= standing.epoch for r in ranks)

    def kill(self, member: Member) -> None:
        """And judge it: those unsettled begin anew."""
        standing, settled = self.maps[-1], self.is_settled()
        del self.ranks[member]
        self.verdicts.append((member, Epoch(standing.epoch + 1)))
        if standing.has(member):
            members = [m for m in standing.members if m != member]
            again = [] if settled else [m for m in members if m.rank in standing.joiners]
            self.publish(members, again)

    def join(self, member: Member) -> None:
        """Beside those unsettled, who begin anew."""
        standing, settled = self.maps[-1], self.is_settled()
        self.start(member)
        again = [] if settled else [m for m in standing.members if m.rank in standing.joiners]
        self.publish([*standing.members, member], [*again, member])

    def wake(self, by: SimRank, number: int) -> None:
        self.send(by.member, ("wake", number))

    def send(self, source: Member, what: tuple[str, object]) -> None:
        for target in self.ranks:
            if target != source:
                self.wires.setdefault((source, target), deque()).append(what)

    def note_adopted(self, rank: SimRank, at: int) -> None:
        """All who adopt a map with joiners do it before the same graph."""
        assert rank.adopted is not None
        if rank.adopted.joiners:
            assert self.first_graph.setdefault(rank.adopted.epoch, at) == at

    def advance(self) -> bool:
        """One thing happens somewhere. False: nothing can."""
        options: list[tuple[str, object]] = [("turn", r) for r in self.alive() if self._may_turn(r)]
        options += [("complete", r) for r in self.alive() if self._may_complete(r)]
        options += [("deliver", pair) for pair, wire in self.wires.items() if wire]
        options += [("map", r) for r in self.alive() if self.seen[r.member] < len(self.maps)]
        options += [
            ("verdict", r) for r in self.alive() if self.judged[r.member] < len(self.verdicts)
        ]
        options += [("hand", r) for r in self.alive() if r.handed is not r.newest]
        if not options:
            return False
        kind, what = self.draw.choice(options)
        if kind == "deliver":
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
            for flight in rank.flights:
                waits = [m for m in rank.mask if m in self.ranks and m != rank.member]
                late = [m for m in waits if self.ranks[m].accord.launched <= flight.number]
                assert not late, f"{rank.member} waits for {late} while {mapping} map joiners"

    def is_still(self) -> bool:
        return not any(rank.flights for rank in self.alive())

    def _do(self, kind: str, rank: SimRank) -> None:
        if kind == "turn":
            rank.turn(self)
        elif kind == "complete":
            rank.complete(self)
        elif kind == "hand":
            rank.handed = rank.newest
        elif kind == "map":
            self.seen[rank.member] += 1
            rank.hear(self.maps[self.seen[rank.member] - 1])
        else:
            self.judged[rank.member] += 1
            rank.condemn(*self.verdicts[self.judged[rank.member] - 1])
        self._tell(rank)
        if rank.left:
            self.kill(rank.member)

    def _tell(self, rank: SimRank) -> None:
        if rank.accord.own != rank.told:
            rank.told = rank.accord.own
            self.send(rank.member, ("news", rank.told))

    def _deliver(self, source: Member, target: Member) -> None:
        kind, what = self.wires[source, target].popleft()
        rank = self.ranks.get(target)
        if rank is None:
            return
        if kind == "wake":
            assert isinstance(what, int)
            rank.woken = max(rank.woken, what)
            return
        assert isinstance(what, GraphNews)
        rank.accord.on_news(what)
        if rank.accord.has_overslept():
            self.wake(rank, rank.accord.launched)
        self._tell(rank)

    def _may_turn(self, rank: SimRank) -> bool:
        """Whether a turn would change something: a trial on nothing but the questions it asks."""
        if rank.left:
            return False
        if rank.mapping:
            return not rank.maps_joiners() or self.is_still()
        if rank.flights:
            return rank.may_go_ahead()
        newest, adopted, accord = rank.handed, rank.adopted, rank.accord
        epoch = adopted.epoch if adopted else 0
        if newest and newest.epoch > epoch:
            at = accord.join_at(newest)
            must_pause = newest.joiners and accord.own.paused < newest.epoch
            if at is not None and (must_pause or accord.may_adopt(newest)):
                return True
        if adopted is None or rank.behind:
            return False
        awake = not rank.asleep or rank.work > 0 or rank.woken >= accord.launched
        return awake and accord.may_launch()

    def _may_complete(self, rank: SimRank) -> bool:
        """Everybody it still waits for has launched the graph of the same number: a peer's buffer
        knows no numbers, so they must be equal whenever two wait for each other. What a rank has
        not seen the end of may lie two behind, for each may have launched one more."""
        if not rank.flights:
            return False
        number = rank.flights[0].number
        for member in rank.mask - {rank.member}:
            peer = self.ranks.get(member)
            if peer is None or peer.accord.launched <= number:
                return False
            if rank.member in peer.mask and peer.flights:
                assert abs(peer.flights[0].number - number) <= 2, "they are out of step"
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
            assert not rank.flights, f"{rank.member} waits for ever in {rank.flights[0]}"
            assert rank.adopted is self.maps[-1]
            assert rank.asleep
            assert not rank.work
        assert len({rank.accord.launched for rank in self.alive()}) <= 1


def formed(seed: int) -> World:
    world = World(seed)
    members = [life(rank) for rank in range(RANKS)]
    for member in members:
        world.start(member)
    world.publish(members, members)
    return world


def give_work(world: World, amount: int) -> None:
    for rank in world.alive():
        if world.draw.random() < 0.5:
            rank.work += world.draw.randrange(amount)


@pytest.mark.parametrize("seed", range(20))
def test_all_sleep_after_work_and_wake_for_more(seed: int) -> None:
    world = formed(seed)
    world.settle()
    for _ in range(3):
        give_work(world, 100)
        world.run(world.draw.randrange(500))
        give_work(world, 20)
        world.settle()


@pytest.mark.parametrize("seed", range(60))
def test_deaths_and_joins_at_any_moment(seed: int) -> None:
    disturb(formed(seed), rounds=5, turns=400, patience=1.0)


@pytest.mark.parametrize("seed", range(60))
def test_joiners_are_mapped_slowly_while_others_die_and_join(seed: int) -> None:
    world = formed(seed)
    world.settle()
    world.draw = _SlowMapping(seed)
    disturb(world, rounds=8, turns=150, patience=0.7)


def disturb(world: World, *, rounds: int, turns: int, patience: float) -> None:
    """`patience`: how often a join waits for the one before."""
    world.run(world.draw.randrange(turns))
    lives = dict.fromkeys(range(RANKS), 1)
    for _ in range(rounds):
        give_work(world, 40)
        members = [m for m in world.maps[-1].members if m in world.ranks]
        missing = sorted(set(range(RANKS)) - {m.rank for m in world.ranks})
        may_join = world.is_settled() or world.draw.random() > patience
        if missing and may_join and world.draw.random() < 0.6:
            lives[missing[0]] += 1
            world.join(life(missing[0], lives[missing[0]]))
        elif len(members) > 1:
            world.kill(*world.draw.sample(members, 1))
        world.run(world.draw.randrange(turns))
    if world.ranks:
        world.settle()


def test_a_rank_that_hears_late_of_the_last_promise_wakes_the_others() -> None:
    woken = 0
    for seed in range(20):
        world = formed(seed)
        world.draw = _Lazy(seed)
        world.run(3000)
        world.draw = random.Random(seed)
        world.settle()
        woken += sum(rank.woken >= 0 for rank in world.alive())
    assert woken, "no schedule was late enough to show it"


class _SlowMapping(random.Random):
    """Who maps joiners is rarely done with it."""

    def choice(self, options):  # type: ignore[no-untyped-def]
        others = [o for o in options if o[0] != "turn" or not o[1].mapping]
        return super().choice(others if others and self.random() < 0.99 else options)


class _Lazy(random.Random):
    """Delivers news as late as possible, now and then."""

    def choice(self, options):  # type: ignore[no-untyped-def]
        others = [o for o in options if o[0] != "deliver"]
        return super().choice(others if others and self.random() < 0.97 else options)


def news_of(member: Member, *, entered: int, spoilt: int) -> GraphNews:
    return GraphNews(
        member=member,
        joining=Epoch(0),
        limit=0,
        paused=Epoch(0),
        entered=Epoch(entered),
        sleep_at=-1,
        slept_at=-1,
        spoilt=Epoch(spoilt),
    )


def running(own: Member, expert_map: ExpertMap) -> GraphAccord:
    """Under this map."""
    accord = GraphAccord(own)
    accord.hear(expert_map)
    accord.adopt(expert_map)
    accord.enter()
    return accord


def test_who_has_promised_to_sleep_and_has_work_again_runs_ahead_up_to_the_common_sleep() -> None:
    one, two = life(0), life(1)
    accord = running(one, map_of(1, [one, two], []))
    for _ in range(IDLE_GRAPHS):
        accord.launch()
        accord.land()
        accord.note_step(had_work=False)
    assert accord.own.sleep_at == IDLE_GRAPHS + SLEEP_AHEAD
    accord.launch()
    accord.on_news(replace(news_of(two, entered=1, spoilt=0), sleep_at=-1))
    assert accord.may_launch_ahead()  # the other one is busy, for ever perhaps
    accord.on_news(replace(news_of(two, entered=1, spoilt=0), sleep_at=accord.launched + 1))
    while accord.launched < accord.own.sleep_at:
        assert accord.may_launch_ahead()
        accord.launch()
        accord.land()
    assert not accord.may_launch_ahead()
    assert not accord.falls_asleep()  # not while that graph is in flight
    accord.land()
    assert accord.falls_asleep()


def test_a_slot_is_clear_once_all_have_entered_a_newer_map_or_let_go() -> None:
    one, two, dead = life(0), life(1), life(2)
    accord = running(one, map_of(1, [one, two, dead], []))
    accord.on_news(news_of(two, entered=1, spoilt=0))
    assert not accord.is_clear_of(Epoch(1))
    accord.condemn(dead, Epoch(2))
    assert not accord.is_clear_of(Epoch(1))  # the other one may still deliver a step
    accord.on_news(news_of(two, entered=1, spoilt=1))
    assert accord.is_clear_of(Epoch(1))


def test_a_map_that_names_one_condemned_since_needs_nobody_to_have_entered_it() -> None:
    one, two, three, dead = life(0), life(1), life(2), life(3)
    accord = running(one, map_of(5, [one, two, three, dead], []))
    accord.condemn(dead, Epoch(6))
    accord.hear(map_of(6, [one, two, three], []))  # nobody can adopt it:
    accord.condemn(three, Epoch(7))
    accord.on_news(news_of(two, entered=5, spoilt=5))
    assert not accord.is_clear_of(Epoch(6))
    accord.on_news(news_of(two, entered=5, spoilt=6))
    assert accord.is_clear_of(Epoch(6))


def test_a_graph_in_flight_may_still_be_delivered_where_only_a_map_to_come_names_the_dead() -> None:
    one, two, joiner = life(0), life(1), life(2)
    accord = running(one, map_of(1, [one, two], []))
    accord.launch()
    accord.hear(map_of(2, [one, two, joiner], [joiner]))
    accord.condemn(joiner, Epoch(3))
    assert accord.own.spoilt == 0
    accord.land()
    assert accord.own.spoilt == 2


def test_a_verdict_on_somebody_in_no_map_spoils_none() -> None:
    one, two = life(0), life(1)
    accord = running(one, map_of(1, [one, two], []))
    accord.condemn(life(2), Epoch(2))
    assert accord.own.spoilt == 0


def test_nothing_is_launched_between_a_map_with_joiners_and_its_adoption() -> None:
    one, two = life(0), life(1)
    accord = running(one, map_of(1, [one], []))
    assert accord.may_launch()
    second = map_of(2, [one, two], [two])
    accord.hear(second)
    assert not accord.may_launch()
    assert accord.join_at(second) is None
    with pytest.raises(StepAbandoned):
        accord.adopt(second)


def paused_for_a_joiner_that_died() -> tuple[GraphAccord, Member]:
    """Under map 3, after it had paused for map 2; with the other member."""
    one, two, joiner = life(0), life(1), life(2)
    accord = running(one, map_of(1, [one, two], []))
    second = map_of(2, [one, two, joiner], [joiner])
    accord.hear(second)
    accord.on_news(replace(news_of(two, entered=1, spoilt=0), joining=Epoch(2)))
    accord.on_news(replace(news_of(joiner, entered=0, spoilt=0), joining=Epoch(2)))
    accord.launch()
    accord.land()
    accord.pause(second)
    assert not accord.may_adopt(second)  # the others may have graphs in flight
    third = map_of(3, [one, two], [])
    accord.hear(third)
    accord.adopt(third)
    accord.enter()
    return accord, two


def test_who_has_paused_launches_nothing_while_a_peer_may_map_the_joiner() -> None:
    accord, two = paused_for_a_joiner_that_died()
    assert not accord.may_launch()
    accord.on_news(replace(news_of(two, entered=2, spoilt=0), joining=Epoch(2), paused=Epoch(2)))
    assert accord.may_launch()


def test_a_peer_that_is_ready_for_the_next_joiner_does_not_map_the_last_one() -> None:
    accord, two = paused_for_a_joiner_that_died()
    accord.on_news(replace(news_of(two, entered=1, spoilt=0), joining=Epoch(4), paused=Epoch(2)))
    assert accord.may_launch()


def test_who_is_ready_for_a_joiner_launches_nothing_under_the_map_before_even_if_it_dies() -> None:
    one, two, joiner = life(0), life(1), life(2)
    accord = running(one, map_of(1, [one, two], []))
    accord.hear(map_of(2, [one, two, joiner], [joiner]))
    third = map_of(3, [one, two], [])
    accord.hear(third)
    assert not accord.may_launch()
    accord.adopt(third)
    accord.enter()
    assert accord.may_launch()


def test_who_maps_joiners_gets_ready_for_the_next_ones_only_after_it() -> None:
    one, two = life(0), life(1)
    accord = GraphAccord(one)
    first = map_of(1, [one, two], [one, two])
    accord.hear(first)
    accord.on_news(replace(news_of(two, entered=0, spoilt=0), joining=Epoch(1), paused=Epoch(1)))
    accord.adopt(first)
    accord.hear(map_of(2, [one, life(2)], [life(2)]))
    assert accord.own.joining == 1
    accord.enter()
    assert accord.own.joining == 2


def test_a_joiner_that_was_ready_once_does_not_begin_anew() -> None:
    accord = GraphAccord(life(1))
    assert not accord.hear(map_of(4, [life(0), life(1)], [life(1)])).leave
    assert accord.hear(map_of(5, [life(1)], [life(1)])).leave


def test_a_promise_comes_after_idle_graphs_only() -> None:
    accord = running(life(0), map_of(1, [life(0)], []))
    for _ in range(IDLE_GRAPHS - 1):
        accord.launch()
        accord.note_step(had_work=False)
        assert accord.own.sleep_at == -1
    accord.launch()
    accord.note_step(had_work=False)
    assert accord.own.sleep_at == IDLE_GRAPHS + SLEEP_AHEAD
