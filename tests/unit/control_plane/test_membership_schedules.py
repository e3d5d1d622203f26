"""Random schedules of starts, loads, deaths, hangs, lost replies and fallen leaders: every
published map keeps its promises (`World` checks them), and in the end every rank is back in it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.unit.control_plane.world import World, spec

RANKS = st.integers(min_value=0, max_value=3)


class Schedules(RuleBasedStateMachine):
    @initialize(slots=st.integers(min_value=2, max_value=5), redundant=st.integers(0, 6))
    def build(self, slots: int, redundant: int) -> None:
        self.world = World(spec(slots=slots, redundant=min(redundant, 4 * slots - 6)))
        for rank in range(4):
            self.world.start(rank)

    @rule(rank=RANKS)
    def start(self, rank: int) -> None:
        if rank not in self.world.ranks:
            self.world.start(rank)

    @rule(rank=RANKS, agent=st.booleans())
    def kill(self, rank: int, agent: bool) -> None:
        if rank in self.world.ranks:
            self.world.kill(rank, agent=agent)

    @rule(rank=RANKS)
    def hang(self, rank: int) -> None:
        if rank in self.world.ranks:
            self.world.hang(rank)

    @rule(rank=RANKS)
    def begin_load(self, rank: int) -> None:
        if rank in self.world.ranks and self.world.ranks[rank].answering:
            self.world.ranks[rank].begin_load()

    @rule(rank=RANKS)
    def finish_load(self, rank: int) -> None:
        if rank in self.world.ranks and self.world.ranks[rank].answering:
            self.world.ranks[rank].finish_load()

    @rule(rank=RANKS)
    def lag(self, rank: int) -> None:
        """It stays under the map that it runs under now."""
        if rank in self.world.ranks:
            self.world.lag(rank)

    @rule(rank=RANKS)
    def catch_up(self, rank: int) -> None:
        if rank in self.world.ranks:
            self.world.ranks[rank].runs_under = None

    @rule()
    def load_all(self) -> None:
        self.world.load_all()

    @rule()
    def fall_of_the_leader(self) -> None:
        self.world.take_office()

    @rule(lost=st.booleans())
    def run(self, lost: bool) -> None:
        self.world.run(reply_lost=lost)

    @rule(seconds=st.sampled_from((0.02, 0.1, 0.4, 2.5)))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds, tick_s=0.02 if seconds < 1 else 0.05)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for rank in range(4):
            if rank in world.ranks and not world.ranks[rank].answering:
                world.kill(rank)
            if rank not in world.ranks:
                world.start(rank)
            world.ranks[rank].runs_under = None
        world.settle(8.0)
        assert world.expert_map is not None
        alive = tuple(world.ranks[rank].member for rank in range(4))
        assert world.expert_map.members == alive, "not every rank came back"


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
