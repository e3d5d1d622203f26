"""Membership: formation, deaths, orphans, joins, heals, and a leader that inherits half of each."""

from __future__ import annotations

from control_plane.failure_detector import DetectorTimings
from control_plane.verdicts import Alarm, AlarmKind, Dead
from control_plane.writes import Assign, Condemn, Forget, PublishMap
from shared.records import SlotContents, pack_record
from shared.store import Delete, Put
from shared.types import EMPTY_SLOT, Epoch, SuspicionReason
from tests.unit.control_plane.world import POLICY, World, spec


def formed(world: World | None = None) -> World:
    world = world or World()
    for rank in range(world.spec.num_ranks):
        world.start(rank)
    world.settle(1.0)
    assert world.expert_map is not None
    assert len(world.expert_map.members) == world.spec.num_ranks
    return world


def members(world: World) -> list[str]:
    assert world.expert_map is not None
    return [str(m) for m in world.expert_map.members]


def test_without_a_spec_nothing_is_decided() -> None:
    world = World()
    world.view._entries.pop(world.keys.spec)
    world.start(0)
    assert world.reign.decide(world.clock.now()) is None


def test_the_first_map_waits_for_all_ranks_their_weights_and_their_links() -> None:
    world = World()
    for rank in range(3):
        world.start(rank)
    world.pass_time(POLICY.formation_window_s / 2)
    assert world.writes == []
    world.start(3)
    world.run()
    assert [type(w) for w in world.writes] == [Assign]
    world.pass_time(1.0)
    assert world.expert_map is None
    world.load_all()
    world.load_all()
    world.ranks[2].say(links=())
    world.pass_time(1.0)
    assert world.expert_map is None
    world.link()
    world.run()
    assert members(world) == ["0.1", "1.1", "2.1", "3.1"]
    assert world.published[-1].epoch == 1


def test_after_the_window_those_form_who_hold_every_expert_and_the_last_joins() -> None:
    world = World()
    for rank in range(2):
        world.start(rank)
    world.settle(POLICY.formation_window_s + 1)
    assert members(world) == ["0.1", "1.1"]
    world.start(2)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.1", "2.1"]


def test_too_few_ranks_for_the_experts_is_an_alarm_and_no_map() -> None:
    world = World()
    world.start(0)
    world.settle(POLICY.formation_window_s + 1)
    assert world.expert_map is None
    alarms = [n for n in world.reign.take_news() if isinstance(n, Alarm)]
    assert [a.kind for a in alarms] == [AlarmKind.TOO_FEW_SLOTS]


def test_a_rank_that_dies_while_the_instance_forms_is_replaced() -> None:
    world = World()
    for rank in range(4):
        world.start(rank)
    world.run()
    world.kill(1)
    world.settle(1.0)
    assert world.expert_map is None
    world.start(1)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.2", "2.1", "3.1"]


def test_a_death_whose_experts_have_replicas_is_published_at_once() -> None:
    world = formed()
    world.kill(2)
    world.writes.clear()
    world.run()
    write, *rest = world.writes
    assert isinstance(write, PublishMap)
    assert all(isinstance(w, Forget) for w in rest)
    assert [v.rank for v in write.verdicts] == [2]
    assert members(world) == ["0.1", "1.1", "3.1"]


def test_orphans_are_loaded_into_survivors_before_the_map_is_published() -> None:
    world = formed()
    world.kill(0)
    world.run()
    survivors = world.published[-1]
    assert survivors.epoch == 2
    layer, expert = (int(i[0]) for i in (survivors.replica_counts() == 1).nonzero())
    (holder,) = {int(r) for r in (survivors.placement[layer] == expert).nonzero()[0]}
    world.kill(holder)
    world.pass_time(1.0)
    assert world.published[-1].epoch == 2
    orphaned = world.writes[-1]
    assert isinstance(orphaned, Assign)
    assert {a.epoch for a in orphaned.assignments} == {2}
    assert [(v.rank, v.epoch) for v in orphaned.verdicts] == [(holder, 3)]
    world.settle(1.0)
    assert world.published[-1].epoch == 3
    assert len(members(world)) == 2


def test_a_second_death_while_orphans_load_is_told_at_once_too() -> None:
    world = formed(World(spec(ranks=5, slots=4, redundant=4)))
    first = world.published[-1]
    holders = {int(r) for r in (first.placement[0] == 0).nonzero()[0]}
    for rank in holders:
        world.kill(rank)
    world.writes.clear()
    world.run()
    write, *_ = world.writes
    assert isinstance(write, Assign)
    assert {v.rank for v in write.verdicts} == holders
    victim = min(set(world.ranks))
    world.kill(victim)
    world.run()
    assert world.published[-1] is first
    assert [k for k in world.etcd.values if k.startswith(f"{world.keys.verdicts}{victim:05d}/")]
    world.settle(1.0)
    assert world.published[-1].epoch == 2
    assert {m.rank for m in first.members} - {m.rank for m in world.published[-1].members} == {
        *holders,
        victim,
    }


def test_a_second_death_that_orphans_nothing_more_is_told_at_once_too() -> None:
    world = formed(World(spec(ranks=5, slots=4, redundant=4, layers=1)))
    first = world.published[-1]
    holders = {e: {int(r) for r in (first.placement[0] == e).nonzero()[0]} for e in range(6)}
    (orphaned,) = min(holders.values(), key=len)
    world.kill(orphaned)
    world.run()
    told = [w for w in world.writes if isinstance(w, Assign) and w.verdicts]
    loading = {a.rank for w in told for a in w.assignments}
    spare = next(
        rank
        for rank in set(world.ranks) - loading
        if all(h - {rank, orphaned} for h in holders.values() if rank in h)
    )
    world.kill(spare)
    world.writes.clear()
    world.run()
    assert condemned(world) == [f"{spare}.1"]
    assert world.published[-1] is first
    world.settle(1.0)
    assert {m.rank for m in world.published[-1].members} == set(range(5)) - {orphaned, spare}


def test_orphans_without_a_slot_wait_for_a_joiner() -> None:
    world = formed()
    for rank in (0, 1, 2):
        world.kill(rank)
        world.settle(0.4)
    assert members(world) == ["2.1", "3.1"], "the third death leaves too few slots"
    world.settle(2.0)
    assert members(world) == ["2.1", "3.1"]
    world.start(1)
    world.settle(2.0)
    assert members(world) == ["1.2", "3.1"]


def test_all_ranks_may_die_and_the_epoch_still_grows() -> None:
    world = formed()
    for rank in range(4):
        world.kill(rank)
    world.pass_time(1.0)
    for rank in range(4):
        world.start(rank)
    world.settle(1.0)
    assert members(world) == ["0.2", "1.2", "2.2", "3.2"]
    assert world.published[-1].epoch == 2


def test_a_returning_rank_joins_only_when_loaded_and_linked() -> None:
    world = formed()
    world.kill(3)
    world.settle(0.4)
    epoch = world.published[-1].epoch
    joiner = world.start(3)
    world.run()
    assert joiner.begin_load()
    world.pass_time(0.5)
    assert world.published[-1].epoch == epoch
    joiner.finish_load()
    world.ranks[0].say(links=())
    world.pass_time(0.5)
    assert world.published[-1].epoch == epoch
    world.link()
    world.run()
    assert members(world) == ["0.1", "1.1", "2.1", "3.2"]


def test_a_hung_newcomer_holds_up_neither_a_death_nor_the_others() -> None:
    world = formed()
    world.kill(3)
    world.settle(0.4)
    world.start(3).answering = False
    world.kill(2)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.1"]
    world.start(2)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.1", "2.2"]


def test_healing_gives_every_expert_its_replicas_back() -> None:
    world = formed(World(spec(slots=4, redundant=6)))
    world.kill(0)
    world.settle(20.0)
    assert world.expert_map is not None
    assert (world.expert_map.replica_counts() >= 2).all()
    causes = [m.cause.split(":")[0] for m in world.published]
    assert "healed" in causes


def test_an_emptied_slot_is_filled_only_after_the_map_that_empties_it() -> None:
    world = formed(World(spec(slots=4, redundant=6)))
    world.kill(0)
    world.settle(20.0)
    for write in world.writes:
        if isinstance(write, PublishMap):
            for contents in write.assignments:
                row = write.expert_map.placement[:, contents.rank]
                assert contents.epoch == write.expert_map.epoch
                assert ((row == EMPTY_SLOT) | (row == contents.array())).all()


def test_a_new_leader_goes_on_with_a_half_done_heal() -> None:
    world = formed(World(spec(slots=4, redundant=6)))
    world.kill(0)
    for _ in range(400):
        world.pass_time(0.05)
        if any(rank.begin_load() for rank in world.ranks.values()):
            break
    world.take_office()
    for rank in world.ranks.values():
        rank.finish_load()
    world.settle(20.0)
    assert world.expert_map is not None
    assert (world.expert_map.replica_counts() >= 2).all()


def test_a_new_leader_goes_on_with_orphans_that_load() -> None:
    world = formed()
    world.kill(0)
    world.kill(1)
    world.run()
    world.take_office()
    world.settle(2 * DetectorTimings().settle_s)
    assert members(world) == ["2.1", "3.1"]


def doomed() -> World:
    """Three of four are judged dead, and the last cannot hold all experts."""
    world = formed()
    for rank in (0, 1, 2):
        dead = Dead(
            member=world.ranks[rank].member,
            cause=SuspicionReason.SILENCE,
            signals=(),
            first_signal_at=0.0,
            decided_at=world.clock.now(),
        )
        world.reign.membership.on_dead(dead)
    world.writes.clear()
    return world


def condemned(world: World) -> list[str]:
    return [f"{v.rank}.{v.incarnation}" for w in condemnations(world) for v in w.verdicts]


def condemnations(world: World) -> list[Condemn]:
    return [w for w in world.writes if isinstance(w, Condemn)]


def test_dead_members_that_no_map_can_leave_out_yet_are_told_and_come_back() -> None:
    world = doomed()
    world.pass_time(1.0)
    assert condemned(world) == ["0.1", "1.1", "2.1"]
    assert len(condemnations(world)) == 1
    for rank in (0, 1, 2):
        world.kill(rank)
        world.start(rank)
    world.settle(2.0)
    assert members(world) == ["0.2", "1.2", "2.2", "3.1"]


def test_a_new_leader_knows_whom_the_old_one_condemned() -> None:
    world = doomed()
    world.pass_time(1.0)
    world.take_office()
    world.writes.clear()
    world.pass_time(1.0)
    assert world.reign.membership.dead == {world.ranks[r].member for r in (0, 1, 2)}
    assert condemned(world) == []


def test_a_verdict_of_the_former_leader_that_arrives_late_counts() -> None:
    world = doomed()
    world.reign.on_tick(world.clock.now())
    write = world.reign.decide(world.clock.now())
    assert isinstance(write, Condemn)
    world.take_office()
    member = world.ranks[0].member
    key = world.keys.verdict(member.rank, member.incarnation)
    world.etcd.apply([Put(key=key, value=pack_record(write.verdicts[0]))])
    world.run()
    assert members(world) == ["1.1", "2.1", "3.1"]


def test_survivors_that_have_lost_their_records_are_waited_for() -> None:
    world = doomed()
    world.pass_time(0.1)
    survivor = world.ranks[3]
    for rank in (0, 1, 2):
        world.kill(rank)
        world.start(rank)
    key = world.keys.rank(survivor.member.rank, survivor.member.incarnation)
    world.etcd.apply([Delete(key=key)])
    world.settle(0.4)
    assert len(world.published) == 1
    survivor.say()
    world.settle(1.0)
    assert members(world) == ["0.2", "1.2", "2.2", "3.1"]


def test_a_former_leader_can_write_nothing() -> None:
    world = formed()
    old = world.leader_revision
    world.kill(3)
    world._deliver()
    world.reign.on_tick(world.clock.now())
    write = world.reign.decide(world.clock.now())
    assert isinstance(write, PublishMap)
    world.take_office()
    assert world.conflicts(write, old)
    world.pass_time(DetectorTimings().settle_s + 1.0)
    assert members(world) == ["0.1", "1.1", "2.1"]


def test_a_write_whose_reply_was_lost_is_not_done_twice() -> None:
    world = formed()
    world.kill(3)
    world.run(reply_lost=True)
    world.pass_time(1.0)
    assert [m.epoch for m in world.published] == [1, 2]


def test_a_frozen_map_takes_no_joiner() -> None:
    world = formed()
    world.kill(3)
    world.settle(0.4)
    world.start(3)
    world.load_all()
    assert world.reign.membership.decide(world.clock.now(), frozen=True) is None


def test_a_member_without_residents_key_keeps_its_experts() -> None:
    """A lease that expired takes the key along, not the weights."""
    world = formed()
    rank = world.ranks[1]
    world.etcd.revoke(rank.lease_id)
    rank.lease_id = world.etcd.grant(5.0)
    rank.say()
    world.kill(0)
    world.run()
    assert members(world) == ["1.1", "2.1", "3.1"]


def test_keys_of_lives_that_are_over_are_forgotten() -> None:
    world = formed()
    world.hang(2)
    world.settle(1.0)
    world.ranks.pop(2)
    world.pass_time(6.0, tick_s=0.05)
    assert any(isinstance(w, Forget) for w in world.writes)
    left = [k for k in world.etcd.values if "/00002/" in k and "/verdicts/" not in k]
    assert left == []


def test_a_rank_of_a_number_or_size_that_the_spec_does_not_know_is_left_out() -> None:
    world = formed()
    stranger = world.start(9)
    stranger.say(state=stranger.record.state)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.1", "2.1", "3.1"]


def test_malformed_contents_count_as_nothing() -> None:
    world = formed()
    member = world.ranks[0].member
    junk = SlotContents(
        rank=member.rank, incarnation=member.incarnation, num_layers=7, slots=b"", epoch=Epoch(0)
    )
    key = world.keys.resident(member.rank, member.incarnation)
    world.etcd.apply([Put(key=key, value=pack_record(junk))])
    world.etcd.apply([Put(key=world.keys.rank(member.rank, member.incarnation), value=b"\xc1")])
    world.pass_time(0.5)
    world.kill(1)
    world.run()
    assert members(world) == ["0.1", "2.1", "3.1"]


def joiners(world: World) -> tuple[int, ...]:
    assert world.expert_map is not None
    return world.expert_map.joiners


def test_all_members_of_the_first_map_are_its_joiners() -> None:
    assert joiners(formed()) == (0, 1, 2, 3)


def test_a_joiner_is_listed_until_all_run_under_its_map() -> None:
    world = formed()
    world.kill(3)
    world.settle(0.4)
    assert joiners(world) == ()
    world.start(3)
    world.settle(0.4)
    assert joiners(world) == (3,)
    world.kill(0)
    world.settle(0.4)
    assert members(world) == ["1.1", "2.1", "3.2"]
    assert joiners(world) == ()


def test_a_death_does_not_wait_for_a_map_that_somebody_has_not_adopted() -> None:
    world = formed()
    world.kill(3)
    world.settle(0.4)
    world.start(3)
    world.lag(2)
    world.settle(0.4)
    world.kill(0)
    world.run()
    assert members(world) == ["1.1", "2.1", "3.2"]
    assert joiners(world) == (3,)


def test_a_joiner_waits_until_all_run_under_the_map_before_it() -> None:
    world = formed()
    world.lag(2)
    world.kill(3)
    world.settle(0.4)
    world.start(3)
    world.settle(1.0)
    assert members(world) == ["0.1", "1.1", "2.1"]
    world.ranks[2].runs_under = None
    world.settle(0.2)
    assert members(world) == ["0.1", "1.1", "2.1", "3.2"]


def test_a_member_that_does_not_adopt_holds_a_joiner_up_for_a_while_only() -> None:
    world = World()
    for rank in range(3):
        world.start(rank)
    world.settle(POLICY.formation_window_s + 1.0)
    assert joiners(world) == (0, 1, 2)
    world.ranks[2].runs_under = Epoch(0)
    world.take_office()
    world.start(3)
    world.settle(POLICY.adoption_patience_s + 1.0)
    assert members(world) == ["0.1", "1.1", "2.1", "3.1"]
    assert joiners(world) == (0, 1, 2, 3)


def test_a_heal_waits_until_all_run_under_the_map_before_it() -> None:
    world = formed(World(spec(slots=4, redundant=6)))
    world.lag(1)
    world.kill(0)
    world.settle(POLICY.heal_after_s + 1.0)
    assert [m.epoch for m in world.published] == [1, 2]
    world.ranks[1].runs_under = None
    world.settle(1.0)
    assert len(world.published) > 2
    assert joiners(world) == ()


def test_a_new_leader_that_has_heard_nothing_yet_lists_joiners_again() -> None:
    world = formed()
    world.take_office()
    world.kill(0)
    world._deliver()
    world.reign.on_tick(world.clock.now())
    write = world.reign.decide(world.clock.now())
    assert isinstance(write, PublishMap)
    assert write.expert_map.joiners == (1, 2, 3)
