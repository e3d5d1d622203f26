"""What a node runs, by what etcd holds."""

from __future__ import annotations

import numpy as np

from node_agent.desired_ranks import DesiredRanks, Orders, RunningProcess
from node_agent.serving_view import ServingView
from shared.changes import Changes
from shared.desired_state import AfterDrain, DesiredRank, DesiredState, Drain
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import Verdict, pack_map, pack_record
from shared.store import WatchEvent
from shared.types import Epoch, Incarnation, Member, NodeId, RankId, SuspicionReason
from tests.unit.control_plane.desired import record

KEYS = Keys("t")


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def desired_of(nodes: dict[int, str], *drains: Drain) -> DesiredState:
    ranks = tuple(DesiredRank(rank=RankId(r), node=NodeId(n)) for r, n in nodes.items())
    return DesiredState(ranks=ranks, drains=drains)


def drain(rank: int, after: AfterDrain, incarnation: int = 1) -> Drain:
    return Drain(rank=RankId(rank), incarnation=Incarnation(incarnation), after=after)


def map_of(*members: Member) -> bytes:
    placement = np.zeros((1, 1 + max((m.rank for m in members), default=0), 1), dtype=np.int16)
    return pack_map(ExpertMap(epoch=Epoch(1), num_experts=1, members=members, placement=placement))


def process(rank: int, first: int = 1, newest: int | None = None) -> RunningProcess:
    return RunningProcess(
        rank=RankId(rank), first=Incarnation(first), newest=Incarnation(newest or first)
    )


def view_of(
    desired: DesiredState | None = None,
    serving: tuple[Member, ...] = (),
    records: dict[Member, str] | None = None,
) -> ServingView:
    view = ServingView(keys=KEYS)
    values = {KEYS.map: map_of(*serving)}
    if desired is not None:
        values[KEYS.desired] = pack_record(desired)
    for each, node in (records or {}).items():
        key = KEYS.rank(each.rank, each.incarnation)
        values[key] = pack_record(record(each.rank, node, incarnation=each.incarnation))
    events = [
        WatchEvent(key=k, value=v, mod_revision=n + 1) for n, (k, v) in enumerate(values.items())
    ]
    view.apply(Changes(events=tuple(events), synced=True))
    return view


def orders(view: ServingView, *running: RunningProcess, flags: tuple[int, ...] = (0, 1)) -> Orders:
    ranks = DesiredRanks(node=NodeId("n"), flag_ranks=[RankId(r) for r in flags])
    result = ranks.orders(view, running)
    assert result is not None
    return result


def test_nothing_is_ordered_before_all_is_known() -> None:
    ranks = DesiredRanks(node=NodeId("n"), flag_ranks=[RankId(0)])
    assert ranks.orders(ServingView(keys=KEYS), []) is None


def test_flags_hold_as_long_as_nobody_has_asked_for_anything() -> None:
    told = orders(view_of(serving=(member(2),)), process(2))
    assert told == Orders(wanted=frozenset({0, 1}), ended=(2,), restarted=())


def test_the_desired_state_outweighs_the_flags() -> None:
    view = view_of(desired_of({0: "n", 1: "m", 4: "n", 5: "", 6: ""}))
    assert orders(view, flags=(0, 1, 5)).wanted == {0, 4, 5}


def test_a_rank_that_shall_not_run_here_ends_when_it_serves_no_more() -> None:
    desired = desired_of({0: "n"}, drain(1, AfterDrain.LEAVE))
    serving = view_of(desired, serving=(member(0), member(1, 3)))
    assert orders(serving, process(1, 2, 3)).ended == ()
    assert orders(view_of(desired, serving=(member(0),)), process(1, 2, 4)).ended == (1,)


def test_who_has_just_left_the_map_steps_with_the_others_as_long_as_it_has_its_record() -> None:
    desired = desired_of({0: "n"}, drain(1, AfterDrain.LEAVE))
    served = {member(0): "n", member(1, 3): "n"}
    view = view_of(desired, serving=(member(0), member(1, 3)), records=served)
    without = WatchEvent(key=KEYS.map, value=map_of(member(0)), mod_revision=9)
    view.apply(Changes(events=(without,), synced=True))
    assert orders(view, process(1, 2, 3)).ended == ()
    gone = WatchEvent(key=KEYS.rank(RankId(1), Incarnation(3)), value=None, mod_revision=10)
    view.apply(Changes(events=(gone,), synced=True))
    assert orders(view, process(1, 2, 3)).ended == (1,)


def test_a_rank_starts_only_once_it_runs_nowhere_else() -> None:
    desired = desired_of({0: "n", 1: "n"}, drain(1, AfterDrain.LEAVE))
    assert orders(view_of(desired, records={member(1): "m"})).wanted == {0}
    assert orders(view_of(desired)).wanted == {0, 1}


def test_a_process_is_replaced_once_when_it_serves_no_more() -> None:
    desired = DesiredState(drains=(drain(1, AfterDrain.RESTART, incarnation=3),))
    assert orders(view_of(desired, serving=(member(1, 3),)), process(1, 2, 3)).restarted == ()
    assert orders(view_of(desired), process(1, 2, 4)).restarted == (1,)
    assert orders(view_of(desired), process(1, 5)).restarted == (), "a new process already"


def test_a_drained_rank_that_stays_keeps_its_process() -> None:
    desired = DesiredState(drains=(drain(1, AfterDrain.STAY),))
    told = orders(view_of(desired), process(0), process(1, 1, 2))
    assert told == Orders(wanted=frozenset({0, 1}), ended=(), restarted=())


def test_a_node_that_is_left_keeps_what_serves() -> None:
    ranks = DesiredRanks(node=NodeId("n"), flag_ranks=[RankId(0), RankId(1)], is_leaving=True)
    view = view_of(serving=(member(0), member(3)), records={member(0): "n", member(3): "m"})
    told = ranks.orders(view, [process(0), process(1)])
    assert told == Orders(wanted=frozenset(), ended=(RankId(1),), restarted=())
    assert not ranks.is_alone(view)
    assert ranks.is_alone(view_of(serving=(member(0),), records={member(0): "n"}))


def test_news_are_records_and_verdicts_and_what_is_malformed_counts_as_absent() -> None:
    view = ServingView(keys=KEYS)
    verdict = Verdict(
        rank=RankId(0),
        incarnation=Incarnation(1),
        cause=SuspicionReason.DRAINED,
        signals=(),
        epoch=Epoch(2),
        first_signal_at=0.0,
        decided_at=0.0,
    )
    registered = record(0, "n")
    values = {
        KEYS.rank(RankId(0), Incarnation(1)): pack_record(registered),
        KEYS.verdict(RankId(0), Incarnation(1)): pack_record(verdict),
        KEYS.rank(RankId(1), Incarnation(1)): b"?",
        KEYS.desired: pack_record(DesiredState(change=4)),
        KEYS.spec: b"?",
    }
    events = [WatchEvent(key=k, value=v, mod_revision=1) for k, v in values.items()]
    assert view.apply(Changes(events=tuple(events))) == [registered, verdict]
    assert view.desired.change == 4
    assert view.malformed == {KEYS.rank(RankId(1), Incarnation(1))}
    gone = [WatchEvent(key=k, value=None, mod_revision=2) for k in values]
    assert view.apply(Changes(events=tuple(gone), synced=True)) == []
    assert (view.records, view.desired, view.synced) == ({}, DesiredState(), True)
