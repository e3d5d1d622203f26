"""Forming a map out of nothing: how long it waits, for whom, and what deaths meanwhile cost."""

from __future__ import annotations

import numpy as np

from control_plane.writes import Assign
from shared.records import SlotContents, pack_record
from shared.store import Put
from tests.unit.control_plane.harness import POLICY, ControlPlaneHarness, Rank, spec

GRACE_S = POLICY.formation_grace_s
FIRST_GRACE_S = POLICY.first_formation_grace_s


def members(harness: ControlPlaneHarness) -> list[str]:
    assert harness.expert_map is not None
    return [str(m) for m in harness.expert_map.members]


def of_ranks(*ranks: int, harness: ControlPlaneHarness | None = None) -> ControlPlaneHarness:
    harness = harness or ControlPlaneHarness()
    for rank in ranks:
        harness.start(rank)
    return harness


def after_an_outage() -> ControlPlaneHarness:
    """All four ranks of a serving instance have just died."""
    harness = of_ranks(0, 1, 2, 3)
    harness.settle(1.0)
    assert len(members(harness)) == 4
    for rank in range(4):
        harness.kill(rank)
    harness.run()
    return harness


def num_loaded(rank: Rank, before: np.ndarray) -> int:
    return int(((rank.actual_contents != before) & (rank.actual_contents >= 0)).sum())


def test_the_first_map_waits_while_ranks_keep_coming() -> None:
    harness = of_ranks(0, 1)
    harness.settle(FIRST_GRACE_S * 0.6)
    harness.start(2)
    harness.settle(FIRST_GRACE_S * 0.6)
    assert harness.writes == []
    harness.settle(FIRST_GRACE_S)
    assert members(harness) == ["0.1", "1.1", "2.1"]


def test_ranks_that_keep_coming_delay_a_map_until_the_window_is_over() -> None:
    harness = ControlPlaneHarness(spec(ranks=8, redundant=12))
    for rank in range(7):
        harness.start(rank)
        harness.settle(FIRST_GRACE_S * 0.8)
    assert len(harness.published[0].members) < 7


def test_after_an_outage_the_map_comes_a_short_grace_after_those_that_hold_all() -> None:
    harness = of_ranks(0, 1, 2, harness=after_an_outage())
    harness.settle(GRACE_S + 0.5)
    assert members(harness) == ["0.2", "1.2", "2.2"]


def test_a_rank_that_dies_at_every_start_delays_nobody() -> None:
    harness = of_ranks(0, 1, 2, 3, harness=after_an_outage())
    for _ in range(4):
        harness.pass_time(0.1)
        harness.kill(0)
        harness.settle(0.2)
        harness.start(0)
    assert members(harness)[-3:] == ["1.2", "2.2", "3.2"]


def test_of_an_instance_that_starts_a_rank_that_dies_at_every_start_delays_nobody() -> None:
    harness = of_ranks(0, 1, 2, 3)
    for _ in range(8):
        harness.pass_time(0.1)
        harness.kill(0)
        harness.settle(0.2)
        harness.start(0)
    assert members(harness)[-3:] == ["1.1", "2.1", "3.1"]


def test_a_late_rank_changes_no_assignment_and_joins_afterwards() -> None:
    harness = of_ranks(0, 1, 2, harness=after_an_outage())
    harness.pass_time(GRACE_S + 0.1)
    (assign,) = (w for w in harness.writes if isinstance(w, Assign) and w.assignments[0].epoch)
    harness.writes.clear()
    harness.start(3)
    harness.pass_time(0.5)
    assert harness.writes == []
    assert {a.rank for a in assign.assignments} == {0, 1, 2}
    harness.settle(1.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.2"]


def test_a_death_while_the_others_load_costs_them_only_what_it_held() -> None:
    harness = ControlPlaneHarness(spec(experts=9, redundant=3))
    of_ranks(0, 1, 2, 3, harness=harness)
    harness.run()
    harness.load_all()
    harness.load_all()
    before = {r: rank.actual_contents.copy() for r, rank in harness.ranks.items() if r != 2}
    harness.kill(2)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1", "3.1"]
    loaded = {r: num_loaded(harness.ranks[r], row) for r, row in before.items()}
    lost = 3 * harness.spec.num_moe_layers
    assert sum(loaded.values()) <= lost, loaded


def test_a_rank_that_does_not_finish_its_load_delays_the_others_for_the_grace_only() -> None:
    harness = of_ranks(0, 1, 2, 3, harness=after_an_outage())
    harness.run()
    harness.ranks[1].begin_load()
    harness.ranks[1].loading, stuck = None, harness.ranks[1].loading
    assert stuck is not None
    harness.ranks[1].begin_load = lambda: False  # type: ignore[method-assign]
    harness.settle(GRACE_S * 0.5)
    assert members(harness) == ["0.1", "1.1", "2.1", "3.1"], "the map before the outage"
    harness.settle(GRACE_S + 0.5)
    assert members(harness) == ["0.2", "2.2", "3.2"]
    del harness.ranks[1].begin_load  # type: ignore[method-assign]
    harness.settle(1.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.2"]


def test_ranks_that_have_brought_all_experts_load_nothing() -> None:
    harness = after_an_outage()
    shape = (harness.spec.num_moe_layers, harness.spec.slots_per_rank)
    for rank_id in range(4):
        rank = harness.start(rank_id)
        first = (rank_id % 2) * harness.spec.slots_per_rank
        experts = np.arange(first, first + harness.spec.slots_per_rank, dtype=np.int16)
        rank.actual_contents = np.broadcast_to(experts, shape).copy()
        contents = SlotContents.of(rank.member, rank.actual_contents)
        key = harness.keys.resident(rank.member.rank, rank.member.incarnation)
        harness.etcd.apply([Put(key=key, value=pack_record(contents), lease_id=rank.lease_id)])
    before = {r: rank.actual_contents.copy() for r, rank in harness.ranks.items()}
    harness.settle(1.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.2"]
    assert all(num_loaded(harness.ranks[r], row) == 0 for r, row in before.items())
