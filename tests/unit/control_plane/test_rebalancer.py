"""Rebalances: what begins one, that it ends, and that nothing swings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from control_plane.desired_changes import DrainRanks, Rebalance
from control_plane.judgements import AlarmKind
from control_plane.load_meter import PAIRS_MIN, LoadMeter
from control_plane.placement import rank_loads
from control_plane.rebalancer import slowness
from control_plane.writes import PublishMap
from shared.errors import WireError
from shared.types import Incarnation, Member, RankId
from shared.wire import ExpertCounts
from tests.unit.control_plane.harness import POLICY, ControlPlaneHarness, spec

TAU_S = POLICY.rebalance.time_constant_s
EXPERTS, LAYERS = 12, 2
INSTANCE = spec(ranks=4, experts=EXPERTS, slots=7, redundant=EXPERTS, layers=LAYERS)
PAIRS_A_SECOND = 4000.0


def zipf(seed: int, *, exponent: float = 1.0) -> NDArray[np.float64]:
    """`[L, E]`: shares of an expert in its layer's pairs."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, EXPERTS + 1) ** exponent
    return np.stack([rng.permutation(shares) for _ in range(LAYERS)]) / shares.sum()


class Counting:
    """What the ranks of a harness count, and tell the leader once a second."""

    def __init__(self, harness: ControlPlaneHarness) -> None:
        self.harness = harness
        self.chosen: dict[Member, NDArray[np.float64]] = {}
        self.spread = True

    def count(self, shares: NDArray[np.float64], seconds: float) -> None:
        ranks = [r for r in self.harness.ranks.values() if r.answering]
        for rank in ranks:
            seen = self.chosen.setdefault(rank.member, np.zeros((LAYERS, EXPERTS)))
            seen += shares * PAIRS_A_SECOND * seconds / len(ranks)

    def tell(self) -> None:
        rebalancer = self.harness.leader_term.membership.rebalancer
        for member, chosen in self.chosen.items():
            counts = counts_of(member, chosen, spread=self.spread)
            assert rebalancer.on_counts(member, counts, self.harness.clock.now()) is None

    def pass_time(self, shares: NDArray[np.float64], seconds: float, *, load: bool = True) -> None:
        for _ in range(round(seconds)):
            self.count(shares, 1.0)
            self.tell()
            if load:
                self.harness.load_all()
            self.harness.pass_time(1.0, tick_s=0.25)


def counts_of(
    member: Member, chosen: NDArray[np.float64], *, spread: bool = True, num_experts: int = EXPERTS
) -> ExpertCounts:
    wrapped = (chosen.astype(np.int64) % 2**32).astype("<u4")
    return ExpertCounts(
        nonce=1,
        rank=member.rank,
        incarnation=member.incarnation,
        spread=spread,
        num_experts=num_experts,
        chosen=wrapped.tobytes(),
        computed=(wrapped.sum(axis=1) % 2**32).astype("<u4").tobytes(),
    )


def num_maps(harness: ControlPlaneHarness) -> int:
    return sum(isinstance(write, PublishMap) for write in harness.writes)


def slowness_of(harness: ControlPlaneHarness, loads: NDArray[np.float64]) -> float:
    assert harness.expert_map is not None
    return slowness(harness.expert_map, loads)


@pytest.fixture
def counting() -> Counting:
    harness = ControlPlaneHarness(INSTANCE)
    for rank in range(INSTANCE.num_ranks):
        harness.start(rank)
    harness.settle()
    assert harness.expert_map is not None
    return Counting(harness)


def test_a_skewed_load_is_balanced_and_then_nothing_moves(counting: Counting) -> None:
    harness, shares = counting.harness, zipf(1)
    before = slowness_of(harness, shares)
    counting.pass_time(shares, 2 * TAU_S)
    after = slowness_of(harness, shares)
    assert after < 1.12 < 1.25 < before
    settled = num_maps(harness)
    counting.pass_time(shares, 4 * TAU_S)
    assert num_maps(harness) == settled


def test_a_load_that_flips_faster_than_the_time_constant_moves_nothing_once_settled(
    counting: Counting,
) -> None:
    one, other = zipf(1), zipf(2)

    def flip(seconds: float) -> None:
        for _ in range(round(seconds / 10)):
            counting.pass_time(one, 5)
            counting.pass_time(other, 5)

    flip(3 * TAU_S)
    settled = num_maps(counting.harness)
    flip(4 * TAU_S)
    assert num_maps(counting.harness) == settled


def test_a_lasting_change_of_the_load_is_followed(counting: Counting) -> None:
    counting.pass_time(zipf(1), 2 * TAU_S)
    assert slowness_of(counting.harness, zipf(3)) > 1.2
    counting.pass_time(zipf(3), 6 * TAU_S)
    assert slowness_of(counting.harness, zipf(3)) < 1.12


def test_an_even_load_moves_nothing(counting: Counting) -> None:
    maps = num_maps(counting.harness)
    counting.pass_time(np.full((LAYERS, EXPERTS), 1 / EXPERTS), 3 * TAU_S)
    assert num_maps(counting.harness) == maps


def test_where_one_replica_computes_for_all_nothing_is_rebalanced(counting: Counting) -> None:
    counting.spread = False
    maps = num_maps(counting.harness)
    counting.pass_time(zipf(1), 3 * TAU_S)
    assert num_maps(counting.harness) == maps


@pytest.mark.parametrize("is_asked", [True, False])
def test_loads_are_compared_at_once_if_a_rebalance_is_asked_for(
    counting: Counting, is_asked: bool
) -> None:
    harness, rebalancer = counting.harness, counting.harness.leader_term.membership.rebalancer
    counting.pass_time(zipf(1), 1.6 * TAU_S)
    counting.count(zipf(3), 5 * TAU_S)
    counting.tell()
    in_use, settled = rebalancer.loads, num_maps(harness)
    if is_asked:
        harness.ask(Rebalance())
    harness.settle(2.0)
    assert (rebalancer.loads is not in_use) == is_asked
    assert (num_maps(harness) > settled) == is_asked
    assert (slowness_of(harness, zipf(3)) < 1.12) == is_asked


def test_whoever_asks_for_a_rebalance_learns_when_it_is_done_and_whether_it_moved_anything(
    counting: Counting,
) -> None:
    harness = counting.harness
    counting.pass_time(zipf(1), 1.6 * TAU_S)
    counting.count(zipf(3), 5 * TAU_S)
    counting.tell()
    harness.ask(Rebalance())
    done, maps, seen = [], num_maps(harness), harness.leader_term.membership
    while seen.rebalance.done < 1:
        done.append(seen.rebalance.num_steps)
        harness.pass_time(0.25, tick_s=0.25)
        harness.load_all()
        assert len(done) < 200
    assert done[0] == 0
    assert num_maps(harness) > maps
    assert seen.rebalance.num_steps > 0
    harness.ask(Rebalance())
    harness.settle(2.0)
    assert seen.rebalance == (2, 0)
    harness.begin_term()  # which does not know yet, and finds out by its usual healing
    assert harness.leader_term.membership.rebalance == (0, 0)
    counting.pass_time(zipf(3), 20)
    assert harness.leader_term.membership.rebalance == (2, 0)


def test_a_drained_rank_leaves_an_instance_that_was_balanced(counting: Counting) -> None:
    harness, shares = counting.harness, zipf(1)
    counting.pass_time(shares, 2 * TAU_S)
    harness.ask(DrainRanks(ranks=(RankId(1),)))
    counting.pass_time(shares, TAU_S)
    found = harness.expert_map
    assert found is not None
    assert [m.rank for m in found.members] == [0, 2, 3]
    assert found.uncovered() == []
    settled = num_maps(harness)
    counting.pass_time(shares, 2 * TAU_S)
    assert num_maps(harness) == settled


def test_a_new_leader_does_not_undo_a_rebalance(counting: Counting) -> None:
    shares = zipf(1)
    counting.pass_time(shares, 2 * TAU_S)
    settled = num_maps(counting.harness)
    counting.harness.begin_term()
    counting.pass_time(shares, 3 * TAU_S)
    assert num_maps(counting.harness) == settled
    assert slowness_of(counting.harness, shares) < 1.12


def test_after_a_death_and_a_return_the_load_is_balanced_again(counting: Counting) -> None:
    harness, shares = counting.harness, zipf(1)
    counting.pass_time(shares, 2 * TAU_S)
    harness.kill(1)
    harness.settle()
    counting.chosen = {m: c for m, c in counting.chosen.items() if m.rank != 1}
    harness.start(1)
    counting.pass_time(shares, 3 * TAU_S)
    expert_map = harness.expert_map
    assert expert_map is not None
    assert len(expert_map.members) == 4
    assert slowness_of(harness, shares) < 1.12


def test_a_rebalance_that_gets_no_further_raises_an_alarm(counting: Counting) -> None:
    harness = counting.harness
    for _ in range(round(TAU_S)):
        counting.pass_time(zipf(1), 1, load=False)  # the ranks load nothing
        if harness.leader_term.membership.rebalancer.is_balancing:
            break
    harness.leader_term.take_judgements()
    counting.pass_time(zipf(1), POLICY.rebalance.stuck_s + 5, load=False)
    alarms = harness.leader_term.membership.take_alarms()
    assert [alarm.kind for alarm in alarms] == [AlarmKind.REBALANCE_STUCK]


# The meter.

ME = Member(rank=RankId(0), incarnation=Incarnation(1))


def meter() -> LoadMeter:
    return LoadMeter(LAYERS, EXPERTS, time_constant_s=10.0)


def test_few_pairs_are_not_believed_and_what_fades_is_believed_no_longer() -> None:
    found = meter()
    found.on_counts(ME, counts_of(ME, np.zeros((LAYERS, EXPERTS))), 0.0)
    found.on_counts(ME, counts_of(ME, np.full((LAYERS, EXPERTS), PAIRS_MIN - 1)), 0.0)
    assert found.loads(0.0) is None
    found.on_counts(ME, counts_of(ME, np.full((LAYERS, EXPERTS), 3 * PAIRS_MIN)), 0.0)
    assert found.loads(0.0) is not None
    assert found.loads(20.0) is None


def test_counts_may_pass_their_greatest_number() -> None:
    found, start = meter(), 2.0**32 - 10
    found.on_counts(ME, counts_of(ME, np.full((LAYERS, EXPERTS), start)), 0.0)
    history = found.loads(0.0)
    found.on_counts(ME, counts_of(ME, np.full((LAYERS, EXPERTS), start + 100)), 0.0)
    loads = found.loads(0.0)
    assert history is not None
    assert loads is not None
    np.testing.assert_allclose(loads - history, 100)


def test_history_counts_but_no_more_than_is_needed_to_be_believed() -> None:
    found = meter()
    found.on_counts(ME, counts_of(ME, 1e6 * zipf(1)), 0.0)
    loads = found.loads(0.0)
    assert loads is not None
    np.testing.assert_allclose(loads.sum(axis=1), 2 * PAIRS_MIN * EXPERTS)
    np.testing.assert_allclose(loads / loads.sum(axis=1, keepdims=True), zipf(1), rtol=1e-3)


@pytest.mark.parametrize("change", [{"chosen": b"1234"}, {"computed": b""}, {"num_experts": 3}])
def test_counts_of_another_model_are_refused(change: dict[str, object]) -> None:
    counts = replace(counts_of(ME, np.ones((LAYERS, EXPERTS))), **change)  # type: ignore[arg-type]
    with pytest.raises(WireError):
        meter().on_counts(ME, counts, 0.0)


def test_the_slowness_is_the_mean_over_layers_of_the_busiest_rank() -> None:
    harness = ControlPlaneHarness(INSTANCE)
    for rank in range(INSTANCE.num_ranks):
        harness.start(rank)
    harness.settle()
    expert_map, loads = harness.expert_map, zipf(5)
    assert expert_map is not None
    per_rank = rank_loads(expert_map.placement, loads)
    expected = (per_rank.max(axis=1) / per_rank.mean(axis=1)).mean()
    assert slowness(expert_map, loads) == pytest.approx(expected)
