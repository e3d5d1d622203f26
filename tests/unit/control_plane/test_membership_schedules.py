"""Random schedules of starts, loads, deaths, hangs, lost replies and fallen leaders: every
published map keeps its promises (`ControlPlaneHarness` checks them), and in the end every rank is
back in it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.unit.control_plane.harness import ControlPlaneHarness, spec

RANKS = st.integers(min_value=0, max_value=3)


class Schedules(RuleBasedStateMachine):
    @initialize(slots=st.integers(min_value=2, max_value=5), redundant=st.integers(0, 6))
    def build(self, slots: int, redundant: int) -> None:
        self.harness = ControlPlaneHarness(
            spec(slots=slots, redundant=min(redundant, 4 * slots - 6))
        )
        for rank in range(4):
            self.harness.start(rank)

    @rule(rank=RANKS)
    def start(self, rank: int) -> None:
        if rank not in self.harness.ranks:
            self.harness.start(rank)

    @rule(rank=RANKS, agent=st.booleans())
    def kill(self, rank: int, agent: bool) -> None:
        if rank in self.harness.ranks:
            self.harness.kill(rank, agent=agent)

    @rule(rank=RANKS)
    def hang(self, rank: int) -> None:
        if rank in self.harness.ranks:
            self.harness.hang(rank)

    @rule(rank=RANKS)
    def begin_load(self, rank: int) -> None:
        if rank in self.harness.ranks and self.harness.ranks[rank].answering:
            self.harness.ranks[rank].begin_load()

    @rule(rank=RANKS)
    def finish_load(self, rank: int) -> None:
        if rank in self.harness.ranks and self.harness.ranks[rank].answering:
            self.harness.ranks[rank].finish_load()

    @rule(rank=RANKS)
    def lag(self, rank: int) -> None:
        """It stays under the map that it runs under now."""
        if rank in self.harness.ranks:
            self.harness.lag(rank)

    @rule(rank=RANKS)
    def catch_up(self, rank: int) -> None:
        if rank in self.harness.ranks:
            self.harness.ranks[rank].lagging_epoch = None

    @rule()
    def load_all(self) -> None:
        self.harness.load_all()

    @rule()
    def replace_leader(self) -> None:
        self.harness.begin_term()

    @rule(lost=st.booleans())
    def run(self, lost: bool) -> None:
        self.harness.run(reply_lost=lost)

    @rule(seconds=st.sampled_from((0.02, 0.1, 0.4, 2.5)))
    def pass_time(self, seconds: float) -> None:
        self.harness.pass_time(seconds, tick_s=0.02 if seconds < 1 else 0.05)

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        for rank in range(4):
            if rank in harness.ranks and not harness.ranks[rank].answering:
                harness.kill(rank)
            if rank not in harness.ranks:
                harness.start(rank)
            harness.ranks[rank].lagging_epoch = None
        harness.settle(8.0)
        assert harness.expert_map is not None
        alive = tuple(harness.ranks[rank].member for rank in range(4))
        assert harness.expert_map.members == alive, "not every rank came back"


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
