"""Membership: formation, deaths, orphans, joins, heals, and a leader that inherits half of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from control_plane.detector_timings import DetectorTimings
from control_plane.judgements import Alarm, AlarmKind
from control_plane.writes import Assign, DeclareDead, DeleteKeys, PublishMap
from shared.records import SlotContents, Verdict, pack_record
from shared.store import Delete, Put
from shared.types import EMPTY_SLOT, Epoch, SuspicionReason
from tests.unit.control_plane.harness import POLICY, ControlPlaneHarness, spec


def formed(harness: ControlPlaneHarness | None = None) -> ControlPlaneHarness:
    harness = harness or ControlPlaneHarness()
    for rank in range(harness.spec.num_ranks):
        harness.start(rank)
    harness.settle(1.0)
    assert harness.expert_map is not None
    assert len(harness.expert_map.members) == harness.spec.num_ranks
    return harness


def register_again(harness: ControlPlaneHarness) -> None:
    """After etcd has lost its data: what the leader and the ranks do by themselves."""
    harness.etcd.apply([Put(key=harness.keys.spec, value=pack_record(harness.spec))])
    leader = harness.cluster.state.leader
    harness.leader_revision = harness.etcd.apply(
        [Put(key=harness.keys.leader, value=pack_record(leader))]
    )
    for rank in harness.ranks.values():
        rank.lease_id = harness.etcd.grant(5.0)
        rank.write_record(lease_id=rank.lease_id)
        contents = SlotContents.of(rank.member, rank.actual_contents)
        key = harness.keys.resident(rank.member.rank, rank.member.incarnation)
        harness.etcd.apply([Put(key=key, value=pack_record(contents), lease_id=rank.lease_id)])
    harness.watch.is_broken = False
    harness.watch.offer(replace(harness.etcd.snapshot(harness.keys.root), restored=True))


def test_a_map_that_etcd_has_lost_is_published_again_above_the_one_that_ranks_run() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle()
    harness.start(3)
    harness.settle()
    running = harness.expert_map
    assert running is not None
    assert running.epoch > 2
    harness.etcd.lose_data()
    register_again(harness)
    harness.run()
    again = harness.expert_map
    assert again is not None
    assert again.epoch == running.epoch + 1
    assert again.members == running.members
    assert (again.placement == running.placement).all()
    harness.kill(1)
    harness.settle(0.5)
    assert "1.1" not in members(harness)


def test_a_leader_without_a_past_numbers_its_first_map_above_what_ranks_run() -> None:
    harness = formed()
    for rank in harness.ranks.values():
        rank.lagging_epoch = Epoch(7)  # as they say in their Pongs
    harness.etcd.lose_data()
    register_again(harness)
    harness.begin_term()
    harness.settle()
    assert harness.expert_map is not None
    assert harness.expert_map.epoch == 8


def members(harness: ControlPlaneHarness) -> list[str]:
    assert harness.expert_map is not None
    return [str(m) for m in harness.expert_map.members]


def test_without_a_spec_nothing_is_decided() -> None:
    harness = ControlPlaneHarness()
    harness.etcd.apply([Delete(key=harness.keys.spec)])
    harness.start(0)
    harness.run()
    assert harness.writes == []


def test_the_first_map_waits_for_all_ranks_their_weights_and_their_links() -> None:
    harness = ControlPlaneHarness()
    for rank in range(3):
        harness.start(rank)
    harness.pass_time(POLICY.formation_window_s / 2)
    assert harness.writes == []
    harness.start(3)
    harness.run()
    assert [type(w) for w in harness.writes] == [Assign]
    harness.pass_time(1.0)
    assert harness.expert_map is None
    harness.load_all()
    harness.load_all()
    harness.ranks[2].write_record(links=())
    harness.pass_time(1.0)
    assert harness.expert_map is None
    harness.link()
    harness.run()
    assert members(harness) == ["0.1", "1.1", "2.1", "3.1"]
    assert harness.published[-1].epoch == 1


def test_after_the_window_those_form_who_hold_every_expert_and_the_last_joins() -> None:
    harness = ControlPlaneHarness()
    for rank in range(2):
        harness.start(rank)
    harness.settle(POLICY.formation_window_s + 1)
    assert members(harness) == ["0.1", "1.1"]
    harness.start(2)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1", "2.1"]


def test_too_few_ranks_for_the_experts_is_an_alarm_and_no_map() -> None:
    harness = ControlPlaneHarness()
    harness.start(0)
    harness.settle(POLICY.formation_window_s + 1)
    assert harness.expert_map is None
    alarms = [n for n in harness.leader_term.take_judgements() if isinstance(n, Alarm)]
    assert [a.kind for a in alarms] == [AlarmKind.TOO_FEW_SLOTS]


def test_a_rank_that_dies_while_the_instance_forms_is_replaced() -> None:
    harness = ControlPlaneHarness()
    for rank in range(4):
        harness.start(rank)
    harness.run()
    harness.kill(1)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "2.1", "3.1"]
    harness.start(1)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.2", "2.1", "3.1"]


def test_a_death_whose_experts_have_replicas_is_published_at_once() -> None:
    harness = formed()
    harness.kill(2)
    harness.writes.clear()
    harness.run()
    write, *rest = harness.writes
    assert isinstance(write, PublishMap)
    assert all(isinstance(w, DeleteKeys) for w in rest)
    assert [v.rank for v in write.verdicts] == [2]
    assert members(harness) == ["0.1", "1.1", "3.1"]


def test_orphans_are_loaded_into_survivors_before_the_map_is_published() -> None:
    harness = formed()
    harness.kill(0)
    harness.run()
    survivors = harness.published[-1]
    assert survivors.epoch == 2
    layer, expert = (int(i[0]) for i in (survivors.replica_counts() == 1).nonzero())
    (holder,) = {int(r) for r in (survivors.placement[layer] == expert).nonzero()[0]}
    harness.kill(holder)
    harness.pass_time(1.0)
    assert harness.published[-1].epoch == 2
    orphaned = harness.writes[-1]
    assert isinstance(orphaned, Assign)
    assert {a.epoch for a in orphaned.assignments} == {2}
    assert [(v.rank, v.epoch) for v in orphaned.verdicts] == [(holder, 3)]
    harness.settle(1.0)
    assert harness.published[-1].epoch == 3
    assert len(members(harness)) == 2


def test_orphans_do_not_go_to_a_joiner_that_has_not_been_seen_to_step() -> None:
    assert 4 in _ranks_given_orphans(is_proven=True)
    others = _ranks_given_orphans(is_proven=False)
    assert others
    assert 4 not in others


def _ranks_given_orphans(*, is_proven: bool) -> frozenset[int]:
    """Rank 4 has joined anew when two others die that alone had an expert."""
    harness = formed(ControlPlaneHarness(spec(ranks=5, slots=6, redundant=2)))
    harness.kill(4)
    harness.settle(0.4)
    harness.start(4)
    harness.lag(4)
    harness.settle(0.4)
    assert "4.2" in members(harness)
    if is_proven:
        harness.ranks[4].lagging_epoch = None
        harness.settle(0.4)
    harness.writes.clear()
    harness.kill(0)
    harness.kill(1)
    harness.run()
    orphaned = harness.writes[0]
    assert isinstance(orphaned, Assign)
    return frozenset(int(each.rank) for each in orphaned.assignments)


def test_a_second_death_while_orphans_load_is_told_at_once_too() -> None:
    harness = formed(ControlPlaneHarness(spec(ranks=5, slots=4, redundant=4)))
    first = harness.published[-1]
    holders = {int(r) for r in (first.placement[0] == 0).nonzero()[0]}
    for rank in holders:
        harness.kill(rank)
    harness.writes.clear()
    harness.run()
    write, *_ = harness.writes
    assert isinstance(write, Assign)
    assert {v.rank for v in write.verdicts} == holders
    victim = min(set(harness.ranks))
    harness.kill(victim)
    harness.run()
    assert harness.published[-1] is first
    assert [k for k in harness.etcd.values if k.startswith(f"{harness.keys.verdicts}{victim:05d}/")]
    harness.settle(1.0)
    assert harness.published[-1].epoch == 2
    assert {m.rank for m in first.members} - {m.rank for m in harness.published[-1].members} == {
        *holders,
        victim,
    }


def test_a_second_death_that_orphans_nothing_more_is_told_at_once_too() -> None:
    harness = formed(ControlPlaneHarness(spec(ranks=5, slots=4, redundant=4, layers=1)))
    first = harness.published[-1]
    holders = {e: {int(r) for r in (first.placement[0] == e).nonzero()[0]} for e in range(6)}
    (orphaned,) = min(holders.values(), key=len)
    harness.kill(orphaned)
    harness.run()
    told = [w for w in harness.writes if isinstance(w, Assign) and w.verdicts]
    loading = {a.rank for w in told for a in w.assignments}
    spare = next(
        rank
        for rank in set(harness.ranks) - loading
        if all(h - {rank, orphaned} for h in holders.values() if rank in h)
    )
    harness.kill(spare)
    harness.writes.clear()
    harness.run()
    assert declared_dead(harness) == [f"{spare}.1"]
    assert harness.published[-1] is first
    harness.settle(1.0)
    assert {m.rank for m in harness.published[-1].members} == set(range(5)) - {orphaned, spare}


def test_orphans_without_a_slot_wait_for_a_joiner() -> None:
    harness = formed()
    for rank in (0, 1, 2):
        harness.kill(rank)
        harness.settle(0.4)
    assert members(harness) == ["2.1", "3.1"], "the third death leaves too few slots"
    harness.settle(2.0)
    assert members(harness) == ["2.1", "3.1"]
    harness.start(1)
    harness.settle(2.0)
    assert members(harness) == ["1.2", "3.1"]


def test_all_ranks_may_die_and_the_epoch_still_grows() -> None:
    harness = formed()
    for rank in range(4):
        harness.kill(rank)
    harness.pass_time(1.0)
    for rank in range(4):
        harness.start(rank)
    harness.settle(1.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.2"]
    assert harness.published[-1].epoch == 2


def test_a_returning_rank_joins_only_when_loaded_and_linked() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle(0.4)
    epoch = harness.published[-1].epoch
    joiner = harness.start(3)
    harness.run()
    assert joiner.begin_load()
    harness.pass_time(0.5)
    assert harness.published[-1].epoch == epoch
    joiner.finish_load()
    harness.ranks[0].write_record(links=())
    harness.pass_time(0.5)
    assert harness.published[-1].epoch == epoch
    harness.link()
    harness.run()
    assert members(harness) == ["0.1", "1.1", "2.1", "3.2"]


def test_a_hung_newcomer_holds_up_neither_a_death_nor_the_others() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle(0.4)
    harness.start(3).answering = False
    harness.kill(2)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1"]
    harness.start(2)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1", "2.2"]


def test_healing_gives_every_expert_its_replicas_back() -> None:
    harness = formed(ControlPlaneHarness(spec(slots=4, redundant=6)))
    harness.kill(0)
    harness.settle(20.0)
    assert harness.expert_map is not None
    assert (harness.expert_map.replica_counts() >= 2).all()
    causes = [m.cause.split(":")[0] for m in harness.published]
    assert "healed" in causes


def test_an_emptied_slot_is_filled_only_after_the_map_that_empties_it() -> None:
    harness = formed(ControlPlaneHarness(spec(slots=4, redundant=6)))
    harness.kill(0)
    harness.settle(20.0)
    for write in harness.writes:
        if isinstance(write, PublishMap):
            for contents in write.assignments:
                row = write.expert_map.placement[:, contents.rank]
                assert contents.epoch == write.expert_map.epoch
                assert ((row == EMPTY_SLOT) | (row == contents.array())).all()


def test_a_new_leader_goes_on_with_a_half_done_heal() -> None:
    harness = formed(ControlPlaneHarness(spec(slots=4, redundant=6)))
    harness.kill(0)
    for _ in range(400):
        harness.pass_time(0.05)
        if any(rank.begin_load() for rank in harness.ranks.values()):
            break
    harness.begin_term()
    for rank in harness.ranks.values():
        rank.finish_load()
    harness.settle(20.0)
    assert harness.expert_map is not None
    assert (harness.expert_map.replica_counts() >= 2).all()


def test_a_new_leader_goes_on_with_orphans_that_load() -> None:
    harness = formed()
    harness.kill(0)
    harness.kill(1)
    harness.run()
    harness.begin_term()
    harness.settle(2 * DetectorTimings().reregister_timeout_s)
    assert members(harness) == ["2.1", "3.1"]


def harness_with_three_dead() -> ControlPlaneHarness:
    """Three of four are judged dead, and the last cannot hold all experts."""
    harness = formed()
    for rank in (0, 1, 2):
        member = harness.ranks[rank].member
        dead = Verdict(
            rank=member.rank,
            incarnation=member.incarnation,
            cause=SuspicionReason.SILENCE,
            signals=(),
            epoch=Epoch(0),
            first_signal_at=0.0,
            decided_at=harness.clock.now(),
        )
        harness.leader_term.membership.on_dead(dead)
    harness.writes.clear()
    return harness


def declared_dead(harness: ControlPlaneHarness) -> list[str]:
    return [str(v.member) for w in death_declarations(harness) for v in w.verdicts]


def death_declarations(harness: ControlPlaneHarness) -> list[DeclareDead]:
    return [w for w in harness.writes if isinstance(w, DeclareDead)]


def test_dead_members_that_no_map_can_leave_out_yet_are_told_and_come_back() -> None:
    harness = harness_with_three_dead()
    harness.pass_time(1.0)
    assert declared_dead(harness) == ["0.1", "1.1", "2.1"]
    assert len(death_declarations(harness)) == 1
    for rank in (0, 1, 2):
        harness.kill(rank)
        harness.start(rank)
    harness.settle(2.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.1"]


def test_a_new_leader_knows_whom_the_old_one_declared_dead() -> None:
    harness = harness_with_three_dead()
    harness.pass_time(1.0)
    harness.begin_term()
    harness.writes.clear()
    harness.pass_time(1.0)
    assert harness.leader_term.membership.dead == {harness.ranks[r].member for r in (0, 1, 2)}
    assert declared_dead(harness) == []


def test_a_verdict_of_the_former_leader_that_arrives_late_counts() -> None:
    harness = harness_with_three_dead()
    harness.leader_term.on_tick(harness.cluster.state, harness.clock.now())
    write = harness.decide()
    assert isinstance(write, DeclareDead)
    harness.begin_term()
    member = harness.ranks[0].member
    key = harness.keys.verdict(member.rank, member.incarnation)
    harness.etcd.apply([Put(key=key, value=pack_record(write.verdicts[0]))])
    harness.run()
    assert members(harness) == ["1.1", "2.1", "3.1"]


def test_survivors_that_have_lost_their_records_are_waited_for() -> None:
    harness = harness_with_three_dead()
    harness.pass_time(0.1)
    survivor = harness.ranks[3]
    for rank in (0, 1, 2):
        harness.kill(rank)
        harness.start(rank)
    key = harness.keys.rank(survivor.member.rank, survivor.member.incarnation)
    harness.etcd.apply([Delete(key=key)])
    harness.settle(0.4)
    assert len(harness.published) == 1
    survivor.write_record()
    harness.settle(1.0)
    assert members(harness) == ["0.2", "1.2", "2.2", "3.1"]


def test_a_former_leader_can_write_nothing() -> None:
    harness = formed()
    old = harness.leader_revision
    harness.kill(3)
    harness._deliver()
    harness.leader_term.on_tick(harness.cluster.state, harness.clock.now())
    write = harness.decide()
    assert isinstance(write, PublishMap)
    harness.begin_term()
    assert harness.perform_expecting_conflict(write, old)
    harness.pass_time(DetectorTimings().reregister_timeout_s + 1.0)
    assert members(harness) == ["0.1", "1.1", "2.1"]


def test_a_write_whose_reply_was_lost_is_not_done_twice() -> None:
    harness = formed()
    harness.kill(3)
    harness.run(reply_lost=True)
    harness.pass_time(1.0)
    assert [m.epoch for m in harness.published] == [1, 2]


def test_a_frozen_map_takes_no_joiner() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle(0.4)
    harness.start(3)
    harness.load_all()
    membership, now = harness.leader_term.membership, harness.clock.now()
    assert membership.decide(harness.cluster.state, now, frozen=True) is None


def test_a_member_without_residents_key_keeps_its_experts() -> None:
    """A lease that expired takes the key along, not the weights."""
    harness = formed()
    rank = harness.ranks[1]
    harness.etcd.revoke(rank.lease_id)
    rank.lease_id = harness.etcd.grant(5.0)
    rank.write_record()
    harness.kill(0)
    harness.run()
    assert members(harness) == ["1.1", "2.1", "3.1"]


def test_keys_of_ended_incarnations_are_forgotten() -> None:
    harness = formed()
    harness.hang(2)
    harness.settle(1.0)
    harness.ranks.pop(2)
    harness.pass_time(6.0, tick_s=0.05)
    assert any(isinstance(w, DeleteKeys) for w in harness.writes)
    left = [k for k in harness.etcd.values if "/00002/" in k and "/verdicts/" not in k]
    assert left == []


def test_a_rank_of_a_number_or_size_that_the_spec_does_not_know_is_left_out() -> None:
    harness = formed()
    stranger = harness.start(9)
    stranger.write_record(state=stranger.record.state)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1", "2.1", "3.1"]


def test_malformed_contents_count_as_nothing() -> None:
    harness = formed()
    member = harness.ranks[0].member
    junk = SlotContents(
        rank=member.rank, incarnation=member.incarnation, num_layers=7, slots=b"", epoch=Epoch(0)
    )
    key = harness.keys.resident(member.rank, member.incarnation)
    harness.etcd.apply([Put(key=key, value=pack_record(junk))])
    harness.etcd.apply([Put(key=harness.keys.rank(member.rank, member.incarnation), value=b"\xc1")])
    harness.pass_time(0.5)
    harness.kill(1)
    harness.run()
    assert members(harness) == ["0.1", "2.1", "3.1"]


def joiners(harness: ControlPlaneHarness) -> tuple[int, ...]:
    assert harness.expert_map is not None
    return harness.expert_map.joiners


def test_all_members_of_the_first_map_are_its_joiners() -> None:
    assert joiners(formed()) == (0, 1, 2, 3)


def test_a_joiner_is_listed_until_all_run_under_its_map() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle(0.4)
    assert joiners(harness) == ()
    harness.start(3)
    harness.settle(0.4)
    assert joiners(harness) == (3,)
    harness.kill(0)
    harness.settle(0.4)
    assert members(harness) == ["1.1", "2.1", "3.2"]
    assert joiners(harness) == ()


def test_a_death_does_not_wait_for_a_map_that_somebody_has_not_adopted() -> None:
    harness = formed()
    harness.kill(3)
    harness.settle(0.4)
    harness.start(3)
    harness.lag(2)
    harness.settle(0.4)
    harness.kill(0)
    harness.run()
    assert members(harness) == ["1.1", "2.1", "3.2"]
    assert joiners(harness) == (3,)


def test_a_joiner_waits_until_all_run_under_the_map_before_it() -> None:
    harness = formed()
    harness.lag(2)
    harness.kill(3)
    harness.settle(0.4)
    harness.start(3)
    harness.settle(1.0)
    assert members(harness) == ["0.1", "1.1", "2.1"]
    harness.ranks[2].lagging_epoch = None
    harness.settle(0.2)
    assert members(harness) == ["0.1", "1.1", "2.1", "3.2"]


def test_a_member_that_does_not_adopt_holds_a_joiner_up_for_a_while_only() -> None:
    harness = ControlPlaneHarness()
    for rank in range(3):
        harness.start(rank)
    harness.settle(POLICY.formation_window_s + 1.0)
    assert joiners(harness) == (0, 1, 2)
    harness.ranks[2].lagging_epoch = Epoch(0)
    harness.begin_term()
    harness.start(3)
    harness.settle(POLICY.adoption_timeout_s + 1.0)
    assert members(harness) == ["0.1", "1.1", "2.1", "3.1"]
    assert joiners(harness) == (0, 1, 2, 3)


def test_a_heal_waits_until_all_run_under_the_map_before_it() -> None:
    harness = formed(ControlPlaneHarness(spec(slots=4, redundant=6)))
    harness.lag(1)
    harness.kill(0)
    harness.settle(POLICY.heal_after_s + 1.0)
    assert [m.epoch for m in harness.published] == [1, 2]
    harness.ranks[1].lagging_epoch = None
    harness.settle(1.0)
    assert len(harness.published) > 2
    assert joiners(harness) == ()


def test_a_new_leader_that_has_heard_nothing_yet_lists_joiners_again() -> None:
    harness = formed()
    harness.begin_term()
    harness.kill(0)
    harness._deliver()
    harness.leader_term.on_tick(harness.cluster.state, harness.clock.now())
    write = harness.decide()
    assert isinstance(write, PublishMap)
    assert write.expert_map.joiners == (1, 2, 3)


def test_a_member_that_has_lost_count_gets_the_same_map_with_all_as_joiners() -> None:
    harness = formed()
    before = harness.expert_map
    assert before is not None
    harness.lag(2)  # it does not wait for members that have yet to adopt the map before
    harness.ranks[1].out_of_step = before.epoch
    harness.pass_time(0.2)
    resync = harness.expert_map
    assert resync is not None
    assert resync.epoch == before.epoch + 1
    assert resync.members == before.members
    assert np.array_equal(resync.placement, before.placement)
    assert joiners(harness) == (0, 1, 2, 3)
    harness.settle(0.4)
    assert harness.expert_map.epoch == resync.epoch  # once


def test_a_death_and_a_lost_count_take_one_map() -> None:
    harness = formed()
    before = harness.expert_map
    assert before is not None
    harness.ranks[1].out_of_step = before.epoch
    harness.kill(3)
    harness.run()
    assert members(harness) == ["0.1", "1.1", "2.1"]
    assert joiners(harness) == (0, 1, 2)


# Below capacity.


def start_all_that_compute_on_demand(harness: ControlPlaneHarness, *, but: int = -1) -> None:
    for rank in range(harness.spec.num_ranks):
        harness.start(rank).write_record(computes_on_demand=rank != but)
    harness.settle()


def test_below_capacity_serving_goes_on_with_experts_on_demand_until_there_is_room_again() -> None:
    harness = ControlPlaneHarness(spec(ranks=4, experts=6, slots=2, redundant=2))
    start_all_that_compute_on_demand(harness)
    harness.kill(0)
    harness.settle()
    harness.kill(1)
    harness.settle()
    found = harness.expert_map
    assert found is not None
    assert {m.rank for m in found.members} == {2, 3}
    assert found.uncovered() == []
    assert (found.on_demand >= 0).sum() == 2 * harness.spec.num_moe_layers
    assert (found.placement[:, [2, 3]] >= 0).all(), "a slot is left empty"
    alarms = harness.leader_term.membership.take_alarms()
    assert [alarm.kind for alarm in alarms] == [AlarmKind.BELOW_CAPACITY]
    settled = len(harness.published)
    harness.pass_time(30.0)
    assert len(harness.published) == settled
    harness.start(0).write_record(computes_on_demand=True)
    harness.link()
    harness.settle()
    found = harness.expert_map
    assert found is not None
    assert found.on_demand.size == 0
    assert found.uncovered() == []


def test_nothing_is_on_demand_where_a_survivor_cannot_compute_so() -> None:
    harness = ControlPlaneHarness(spec(ranks=4, experts=6, slots=2, redundant=2))
    start_all_that_compute_on_demand(harness, but=3)
    harness.kill(0)
    harness.settle()
    before = len(harness.published)
    harness.kill(1)
    harness.settle()
    assert len(harness.published) == before
    assert all(not published.on_demand.size for published in harness.published)
