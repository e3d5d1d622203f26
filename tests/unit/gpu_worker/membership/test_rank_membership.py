"""A rank's membership: every event, and what it may and may not lead to."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gpu_worker.membership.rank_membership import (
    AdoptMap,
    AnnounceMap,
    AnnounceVerdict,
    CloseLink,
    HoldEngine,
    Leave,
    LoadSlots,
    MembershipAction,
    OpenLink,
    PutRecord,
    PutResidents,
    RankMembership,
    SuspectPeer,
)
from shared.expert_map import ExpertMap
from shared.records import RankRecord, SlotContents
from shared.types import (
    EMPTY_SLOT,
    Epoch,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    SuspicionReason,
)


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def record(rank: int, incarnation: int = 1) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.STARTING,
        control_host="127.0.0.1",
        control_port=1,
        transfer_name="127.0.0.1:2",
        slots=4,
        kv_blocks=1,
        kv_block_tokens=16,
        exchange="transfer",
    )


def expert_map(epoch: int, *members: Member, slots: int = 4) -> ExpertMap:
    """In which rank 0 has no expert."""
    placement = np.full((1, 3, slots), EMPTY_SLOT, dtype=np.int16)
    for each in members:
        placement[0, each.rank, :2] = [0, 1] if each.rank else EMPTY_SLOT
    return ExpertMap(epoch=Epoch(epoch), num_experts=2, members=members, placement=placement)


def announced_and_adopted(new: ExpertMap) -> list[MembershipAction]:
    return [AnnounceMap(expert_map=new), AdoptMap(expert_map=new)]


def wanted(*experts: int) -> np.ndarray:
    return np.array([experts], dtype=np.int16)


def membership(rank: int = 0, incarnation: int = 1) -> RankMembership:
    return RankMembership(record(rank, incarnation), wanted(-1, -1, -1, -1))


def less_residents(actions: list[MembershipAction]) -> list[MembershipAction]:
    return [action for action in actions if not isinstance(action, PutResidents)]


def said(number: int, *experts: int) -> PutResidents:
    return PutResidents(contents=SlotContents.of(member(0), wanted(*experts), number=number))


def test_residents_are_published_at_the_start_only_if_the_slots_hold_anything() -> None:
    (put,) = membership().on_listening(5)
    assert isinstance(put, PutRecord)
    kept = wanted(3, -1, 0, -1)
    fenced_before = RankMembership(record(0, 2), kept)
    residents, put = fenced_before.on_listening(5)
    assert residents == PutResidents(contents=SlotContents.of(member(0, 2), kept, number=0))
    assert isinstance(put, PutRecord)
    contents = SlotContents.of(member(0, 2), kept, epoch=1)
    (ready,) = fenced_before.on_assignment(contents)
    assert isinstance(ready, PutRecord)
    assert ready.record.state is RankState.READY


def test_a_peer_is_linked_once_and_unlinked_when_its_record_goes() -> None:
    it = membership()
    assert it.on_peer_record(record(1)) == [OpenLink(peer=record(1))]
    assert it.on_peer_record(record(1)) == []
    (put,) = it.on_link_opened(member(1))
    assert isinstance(put, PutRecord)
    assert put.record.links == (member(1),)
    close, put = it.on_peer_gone(member(1))
    assert close == CloseLink(peer=member(1))
    assert isinstance(put, PutRecord)
    assert put.record.links == ()
    assert it.on_peer_gone(member(1)) == []


def test_own_record_and_other_incarnations_of_the_own_rank_are_no_peers() -> None:
    it = membership()
    assert it.on_peer_record(record(0)) == []
    assert it.on_peer_record(record(0, 2)) == []


def test_a_map_waits_for_the_links_of_all_its_members() -> None:
    it = membership()
    for rank in (1, 2):
        it.on_peer_record(record(rank))
    it.on_link_opened(member(1))
    first = expert_map(1, member(0), member(1), member(2))
    assert it.on_map(first) == [AnnounceMap(expert_map=first)]
    actions = it.on_link_opened(member(2))
    assert AdoptMap(expert_map=first) in actions
    assert it.expert_map is first


def test_a_newer_map_replaces_a_held_one_and_an_older_one_is_ignored() -> None:
    it = membership()
    it.on_peer_record(record(1))
    first, second = expert_map(1, member(0), member(1)), expert_map(2, member(0))
    assert it.on_map(first) == [AnnounceMap(expert_map=first)]
    assert it.on_map(second) == announced_and_adopted(second)
    assert it.on_map(expert_map(1, member(0))) == []
    it.on_link_opened(member(1))
    assert it.expert_map is second


def test_a_broken_link_raises_suspicion_only_of_members() -> None:
    it = membership()
    it.on_peer_record(record(1))
    it.on_link_opened(member(1))
    (put,) = it.on_link_broken(member(1), "reset")
    assert isinstance(put, PutRecord)
    it.on_link_opened(member(1))
    it.on_map(expert_map(1, member(0), member(1)))
    actions = it.on_link_broken(member(1), "reset")
    assert SuspectPeer(peer=member(1), reason=SuspicionReason.LINK, detail="reset") in actions


def test_slots_are_loaded_one_load_at_a_time_until_they_are_what_is_wanted() -> None:
    it = membership()
    it.on_assignment(SlotContents.of(member(1), wanted(9, 9, 9, 9)))  # somebody else's
    (load,) = it.on_assignment(SlotContents.of(member(0), wanted(0, 1, -1, -1)))
    assert isinstance(load, LoadSlots)
    assert it.on_assignment(SlotContents.of(member(0), wanted(0, 1, 1, -1))) == []
    put, load = it.on_slots_loaded(wanted(0, 1, -1, -1))
    assert isinstance(put, PutResidents)
    assert isinstance(load, LoadSlots)
    assert load.wanted.tolist() == [[0, 1, 1, -1]]
    put, ready = it.on_slots_loaded(wanted(0, 1, 1, -1))
    assert isinstance(ready, PutRecord)
    assert ready.record.state is RankState.READY


def serving(*experts: int, peers_may_lag: bool = False) -> RankMembership:
    """A member under epoch 1, whose engine has adopted it."""
    it = RankMembership(record(0), wanted(-1, -1, -1, -1), peers_may_lag=peers_may_lag)
    it.on_assignment(SlotContents.of(member(0), wanted(*experts)))
    it.on_slots_loaded(wanted(*experts))
    first = map_of(1, *experts)
    it.on_map(first)
    it.on_adopted(first)
    return it


def map_of(epoch: int, *experts: int) -> ExpertMap:
    placement = np.full((1, 3, 4), EMPTY_SLOT, dtype=np.int16)
    placement[0, 0] = experts
    return ExpertMap(epoch=Epoch(epoch), num_experts=2, members=(member(0),), placement=placement)


def test_a_slot_that_the_engine_may_still_use_is_not_overwritten() -> None:
    it = serving(0, 1, -1, -1)
    second = map_of(2, 0, -1, -1, -1)
    refill = SlotContents.of(member(0), wanted(0, 0, -1, -1), epoch=2)
    assert less_residents(it.on_assignment(refill)) == []  # its map is not here yet
    assert HoldEngine(epoch=Epoch(1)) in it.on_map(second)
    (load,) = it.on_adopted(second)
    assert isinstance(load, LoadSlots)


def test_a_slot_that_a_planned_map_empties_is_loaded_once_the_engine_has_adopted_it() -> None:
    it = serving(0, 1, -1, -1)
    second = replace(map_of(2, 0, -1, -1, -1), is_planned=True)
    assert it.on_map(second) == announced_and_adopted(second)
    refill = SlotContents.of(member(0), wanted(0, 0, -1, -1), epoch=2)
    assert less_residents(it.on_assignment(refill)) == []
    (load,) = it.on_adopted(second)
    assert isinstance(load, LoadSlots)


def test_a_slot_that_a_newer_map_empties_is_loaded_though_that_map_cannot_be_adopted() -> None:
    it = serving(0, 1, -1, -1)
    it.on_peer_record(record(1))
    placement = np.array(map_of(2, 0, -1, -1, -1).placement)
    second = ExpertMap(
        epoch=Epoch(2), num_experts=2, members=(member(0), member(1)), placement=placement
    )
    assert it.on_map(second) == [
        AnnounceMap(expert_map=second)
    ]  # no link to rank 1, which has died
    refill = SlotContents.of(member(0), wanted(0, 0, -1, -1), epoch=2)
    assert less_residents(it.on_assignment(refill)) == [HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)


def test_a_spare_slot_is_loaded_while_the_engine_runs() -> None:
    it = serving(0, 1, -1, -1)
    refill = SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1)
    (load,) = it.on_assignment(refill)
    assert isinstance(load, LoadSlots)


def test_an_orphan_takes_a_surplus_slot_only_once_the_engine_is_held() -> None:
    it = serving(0, 1, 1, -1)
    orphan = SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1)
    assert less_residents(it.on_assignment(orphan)) == [HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)


@pytest.mark.parametrize("peers_may_lag", [False, True])
def test_a_map_waits_for_what_an_assignment_that_did_not_last_has_overwritten(
    peers_may_lag: bool,
) -> None:
    it = serving(0, 1, -1, -1, peers_may_lag=peers_may_lag)
    passing = SlotContents.of(member(0), wanted(1, 0, -1, -1), epoch=1)
    assert less_residents(it.on_assignment(passing)) == [HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)
    assert it.on_assignment(SlotContents.of(member(0), wanted(0, 1, -1, -1), epoch=1)) == []
    second = map_of(2, 0, 1, -1, -1)
    # The control plane does not know of the load yet.
    assert it.on_map(second) == [AnnounceMap(expert_map=second)]
    put, load = it.on_slots_loaded(wanted(1, 0, -1, -1))
    assert isinstance(put, PutResidents)
    assert isinstance(load, LoadSlots)
    assert load.wanted.tolist() == [[0, 1, -1, -1]]
    put, adopt = it.on_slots_loaded(wanted(0, 1, -1, -1))[:2]
    assert isinstance(put, PutResidents)
    assert adopt == AdoptMap(expert_map=second)


def test_what_an_assignment_takes_is_said_to_be_lost_before_it_is_loaded() -> None:
    it = serving(0, 1, -1, -1)
    takes = SlotContents.of(member(0), wanted(1, 1, 0, -1), epoch=1, number=3)
    assert it.on_assignment(takes) == [said(3, -1, 1, -1, -1), HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)
    wants_back = SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1, number=4)
    assert it.on_assignment(wants_back) == [said(4, -1, 1, -1, -1)]
    put, load = it.on_slots_loaded(wanted(1, 1, 0, -1))
    assert put == said(4, -1, 1, 0, -1)
    assert isinstance(load, LoadSlots)


def test_an_assignment_of_what_the_slots_hold_is_said_to_be_known() -> None:
    it = serving(0, 1, -1, -1)
    same = SlotContents.of(member(0), wanted(0, 1, -1, -1), epoch=1, number=2)
    assert it.on_assignment(same) == [said(2, 0, 1, -1, -1)]
    assert it.on_assignment(same) == []


@pytest.mark.parametrize("peers_may_lag", [False, True])
def test_what_a_map_says_is_loaded_once_no_older_map_uses_the_slot(peers_may_lag: bool) -> None:
    it = serving(0, 1, -1, -1, peers_may_lag=peers_may_lag)
    third = map_of(3, 1, 1, -1, -1)
    assert less_residents(it.on_map(third)) == [
        AnnounceMap(expert_map=third),
        HoldEngine(epoch=Epoch(2)),
    ]
    (load,) = it.on_held(Epoch(2))
    assert isinstance(load, LoadSlots)
    assert load.wanted.tolist() == [[1, 1, -1, -1]]


def test_what_a_map_says_of_a_spare_slot_is_loaded_once_lagging_peers_cannot_use_it() -> None:
    third = map_of(3, 0, 1, -1, -1)
    announce, load = serving(0, -1, -1, -1).on_map(third)
    assert announce == AnnounceMap(expert_map=third)
    assert isinstance(load, LoadSlots)
    it = serving(0, -1, -1, -1, peers_may_lag=True)
    hold = HoldEngine(epoch=Epoch(2))
    assert it.on_map(third) == [AnnounceMap(expert_map=third), hold]  # they may run the second map
    (load,) = it.on_held(Epoch(2))
    assert isinstance(load, LoadSlots)


def test_a_map_does_not_wait_for_a_load_into_slots_that_it_does_not_name() -> None:
    it = serving(0, 1, -1, -1)
    it.on_assignment(SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1))
    second = map_of(2, 0, 1, -1, -1)
    assert it.on_map(second) == announced_and_adopted(second)


def test_an_assignment_that_presumes_an_older_map_takes_no_slot_from_the_engine() -> None:
    it = serving(0, 1, 1, -1)
    second = map_of(2, 0, 1, 1, -1)
    it.on_map(second)
    it.on_adopted(second)
    stale = SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1)
    assert it.on_assignment(stale) == []


def test_where_peers_lag_a_slot_waits_until_none_of_them_can_use_it() -> None:
    it = serving(0, 1, -1, -1, peers_may_lag=True)
    second = map_of(2, 0, -1, -1, -1)
    it.on_map(second)
    it.on_adopted(second)
    refill = SlotContents.of(member(0), wanted(0, 0, -1, -1), epoch=2)
    assert less_residents(it.on_assignment(refill)) == [HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)


def test_where_peers_lag_an_orphan_takes_a_surplus_slot_of_a_map_that_nobody_can_serve() -> None:
    it = serving(0, 1, 1, -1, peers_may_lag=True)
    orphan = SlotContents.of(member(0), wanted(0, 1, 0, -1), epoch=1)
    assert less_residents(it.on_assignment(orphan)) == [HoldEngine(epoch=Epoch(1))]
    (load,) = it.on_held(Epoch(1))
    assert isinstance(load, LoadSlots)


def survivor_of_two(experts: tuple[int, ...], orphan: tuple[int, ...]) -> RankMembership:
    """Epoch 1 is adopted. Epoch 2 names a second dead member, whose link is broken. An assignment
    of that epoch gives a slot of it to an orphan."""
    it = serving(*experts, peers_may_lag=True)
    it.on_peer_record(record(1))
    placement = np.array(map_of(2, *experts).placement)
    second = ExpertMap(
        epoch=Epoch(2), num_experts=2, members=(member(0), member(1)), placement=placement
    )
    assert it.on_map(second) == [AnnounceMap(expert_map=second)]
    assignment = SlotContents.of(member(0), wanted(*orphan), epoch=2)
    assert less_residents(it.on_assignment(assignment)) == [HoldEngine(epoch=Epoch(2))]
    return it


def test_an_assignment_that_takes_a_slot_of_the_held_map_is_loaded_once() -> None:
    it = survivor_of_two((0, 1, 1, -1), (0, 1, 0, -1))
    (load,) = it.on_held(Epoch(2))
    assert isinstance(load, LoadSlots)
    (put,) = it.on_slots_loaded(load.wanted)
    assert isinstance(put, PutResidents)
    assert put.contents.array().tolist() == [[0, 1, 0, -1]]


def test_a_held_map_is_not_adopted_once_an_assignment_takes_a_slot_of_it() -> None:
    it = survivor_of_two((0, 1, 1, -1), (0, 1, 0, -1))
    assert not any(isinstance(a, AdoptMap) for a in it.on_link_opened(member(1)))
    third = map_of(3, 0, 1, 0, -1)
    it.on_held(Epoch(2))
    it.on_map(third)
    assert AdoptMap(expert_map=third) in it.on_slots_loaded(wanted(0, 1, 0, -1))


@pytest.mark.parametrize("seed", range(300))
def test_nothing_is_loaded_twice_for_one_target(seed: int) -> None:
    """Maps and assignments as a control plane may write them, seen in any interleaving with the
    ends of loads, holds and adoptions."""
    rng = random.Random(seed)
    it = RankMembership(record(0), wanted(-1, -1, -1, -1), peers_may_lag=rng.random() < 0.5)
    it.on_peer_record(record(1))
    changes = Counter[tuple[int, int]]()  # by slot and expert: how often it has become its target
    loads = Counter[tuple[int, int]]()
    target = [EMPTY_SLOT] * 4
    residents = wanted(-1, -1, -1, -1)
    loading: np.ndarray | None = None
    pending: list[MembershipAction] = []
    epoch = 0

    def want(experts: list[int]) -> None:
        for slot, expert in enumerate(experts):
            if target[slot] != expert:
                target[slot] = expert
                changes[slot, expert] += 1

    def take(actions: list[MembershipAction]) -> None:
        nonlocal loading
        for action in actions:
            if isinstance(action, LoadSlots):
                assert loading is None
                loading = action.wanted
                for _, slot in np.argwhere(loading != residents).tolist():
                    loads[slot, int(loading[0, slot])] += 1
            elif isinstance(action, HoldEngine | AdoptMap):
                pending.append(action)

    for _ in range(60):
        match rng.randrange(6):
            case 0:  # a map of what is there or was meant to be there, perhaps with the dead peer
                epoch += 1
                row = [e if rng.random() < 0.8 else EMPTY_SLOT for e in target]
                members = (member(0), member(1)) if rng.random() < 0.5 else (member(0),)
                want(row)
                placement = np.full((1, 3, 4), EMPTY_SLOT, dtype=np.int16)
                placement[0, 0] = row
                new = ExpertMap(
                    epoch=Epoch(epoch), num_experts=2, members=members, placement=placement
                )
                take(it.on_map(new))
            case 1:
                row = [rng.choice([-1, 0, 1]) if rng.random() < 0.3 else e for e in target]
                want(row)
                take(it.on_assignment(SlotContents.of(member(0), wanted(*row), epoch=epoch)))
            case 2 if loading is not None:
                residents, loading = loading, None
                take(it.on_slots_loaded(residents))
            case 3 if pending:
                action = pending.pop(0)
                if isinstance(action, HoldEngine):
                    take(it.on_held(action.epoch))
                elif isinstance(action, AdoptMap):
                    take(it.on_adopted(action.expert_map))
            case 4:
                take(it.on_link_opened(member(1)))
            case 5:
                take(it.on_link_broken(member(1), "reset"))
    for each, num in loads.items():
        assert each[1] < 0 or num <= changes[each], f"slot and expert {each}"


def test_it_leaves_when_a_map_leaves_it_out_but_not_before_it_was_in_one() -> None:
    it = membership()
    assert it.on_map(expert_map(1, member(1))) == []
    mine = expert_map(2, member(0))
    assert it.on_map(mine) == announced_and_adopted(mine)
    (leave,) = it.on_map(expert_map(3, member(1)))
    assert isinstance(leave, Leave)


def test_it_leaves_when_a_later_incarnation_of_its_rank_is_in_the_map() -> None:
    (leave,) = membership().on_map(expert_map(1, member(0, 2)))
    assert isinstance(leave, Leave)


def test_it_leaves_on_its_own_verdict() -> None:
    (leave,) = membership().on_verdict(member(0), Epoch(2))
    assert isinstance(leave, Leave)


def test_a_verdict_on_a_peer_ends_the_waits_for_it() -> None:
    dead = AnnounceVerdict(peer=member(1), epoch=Epoch(2))
    assert membership().on_verdict(member(1), Epoch(2)) == [dead]


def test_it_leaves_when_its_engine_has_stopped() -> None:
    assert membership().on_engine_stopped("fenced") == [Leave(reason="fenced")]


def test_it_registers_with_the_port_that_its_server_listens_on() -> None:
    (put,) = membership().on_listening(7001)
    assert isinstance(put, PutRecord)
    assert put.record.control_port == 7001


def test_under_another_lease_all_is_registered_again() -> None:
    it = membership()
    put, residents = it.on_lease_granted(77)
    assert isinstance(put, PutRecord)
    assert put.record.lease_id == 77
    assert isinstance(residents, PutResidents)


def test_a_member_whose_record_goes_stays_linked_until_a_map_leaves_it_out() -> None:
    it = membership()
    it.on_peer_record(record(1))
    it.on_link_opened(member(1))
    it.on_map(expert_map(1, member(0), member(1)))
    assert it.on_peer_gone(member(1)) == []
    actions = it.on_map(expert_map(2, member(0)))
    assert CloseLink(peer=member(1)) in actions


def test_a_member_whose_record_comes_back_was_never_gone() -> None:
    it = membership()
    it.on_peer_record(record(1))
    it.on_link_opened(member(1))
    it.on_map(expert_map(1, member(0), member(1)))
    it.on_peer_gone(member(1))
    it.on_peer_record(record(1))
    assert all(not isinstance(a, CloseLink) for a in it.on_map(expert_map(2, member(0))))


def test_a_rank_that_was_told_to_end_says_so() -> None:
    (put,) = membership().on_told_to_leave()
    assert isinstance(put, PutRecord)
    assert put.record.leaving


def test_a_drained_rank_that_counts_graphs_leaves_at_its_verdict() -> None:
    it = serving(0, 1, -1, -1, peers_may_lag=True)
    (leave,) = it.on_verdict(member(0), Epoch(2), is_drained=True)
    assert leave == Leave(reason="it has been drained")


@pytest.mark.parametrize("verdict_first", [True, False])
def test_a_drained_rank_steps_with_the_others_until_all_know_of_the_map(
    verdict_first: bool,
) -> None:
    it = membership()
    it.on_peer_record(record(1))
    it.on_link_opened(member(1))
    first = expert_map(1, member(0), member(1))
    it.on_map(first)
    it.on_adopted(first)
    without = replace(expert_map(2, member(1)), is_planned=True)
    if verdict_first:
        assert it.on_verdict(member(0), Epoch(2), is_drained=True) == []
    assert it.on_map(without) == [AdoptMap(expert_map=without)]
    assert it.on_verdict(member(0), Epoch(2), is_drained=True) == []
    assert it.on_engine_stopped("left out") == [Leave(reason="left out")]


def test_a_drained_rank_that_steps_with_nobody_leaves_at_once() -> None:
    """Its engine is in no map yet, so that none leaves it out."""
    it = membership()
    it.on_peer_record(record(1))
    first = expert_map(1, member(0), member(1))
    assert it.on_map(first) == [AnnounceMap(expert_map=first)], "no link is open"
    (leave,) = it.on_map(replace(expert_map(2, member(1)), is_planned=True))
    assert isinstance(leave, Leave)
