"""Every event in every phase of a rank."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable

import pytest

from node_agent.rank_supervisor import (
    TRANSITIONS,
    Kill,
    RankEvent,
    RankPhase,
    RankSupervisor,
    RevokeLease,
    RunningRank,
    Spawn,
    SupervisorAction,
    Terminate,
)
from node_agent.restart_policy import RestartPolicy
from shared.exit_codes import EXIT_FENCED
from shared.types import Incarnation, Member, RankId

RANK = RankId(2)
RUNNING_RANK = RunningRank(
    member=Member(rank=RANK, incarnation=Incarnation(7)), lease_id=99, pid=1234
)
POLICY = RestartPolicy(first_delay_s=1.0, delay_s_max=8.0, healthy_after_s=60.0)


def fresh(now: float = 0.0) -> RankSupervisor:
    return RankSupervisor([RANK], POLICY, random.Random(1), now)


def wanted(supervisor: RankSupervisor) -> list[SupervisorAction]:
    supervisor.want([RANK], 0.0)
    return []


EVENTS: dict[RankEvent, Callable[[RankSupervisor], list[SupervisorAction]]] = {
    RankEvent.DUE: lambda supervisor: supervisor.take_due(1e9),
    RankEvent.ADOPTED: lambda supervisor: supervisor.on_adopted(RUNNING_RANK, 0.0),
    RankEvent.SPAWNED: lambda supervisor: supervisor.on_spawned(RUNNING_RANK, 0.0),
    RankEvent.SPAWN_FAILED: lambda supervisor: supervisor.on_spawn_failed(RANK, 0.0),
    RankEvent.DYING: lambda supervisor: supervisor.on_dying(RANK, -9),
    RankEvent.EXITED: lambda supervisor: supervisor.on_exited(RANK, -9, 0.0),
    RankEvent.STOP: lambda supervisor: supervisor.stop(),
    RankEvent.WANTED: lambda supervisor: wanted(supervisor),
}
PATHS: dict[RankPhase, list[RankEvent]] = {
    RankPhase.WAITING: [],
    RankPhase.STARTING: [RankEvent.DUE],
    RankPhase.RUNNING: [RankEvent.DUE, RankEvent.SPAWNED],
    RankPhase.DYING: [RankEvent.DUE, RankEvent.SPAWNED, RankEvent.DYING],
    RankPhase.STOPPING: [RankEvent.DUE, RankEvent.SPAWNED, RankEvent.STOP],
    RankPhase.ENDING: [RankEvent.DUE, RankEvent.SPAWNED, RankEvent.STOP, RankEvent.DYING],
    RankPhase.STOPPED: [RankEvent.STOP],
}
ACTIONS: dict[tuple[RankPhase, RankEvent], list[SupervisorAction]] = {
    (RankPhase.WAITING, RankEvent.DUE): [Spawn(rank=RANK)],
    (RankPhase.RUNNING, RankEvent.DYING): [RevokeLease(running_rank=RUNNING_RANK, exit_code=-9)],
    (RankPhase.STOPPING, RankEvent.DYING): [RevokeLease(running_rank=RUNNING_RANK, exit_code=-9)],
    (RankPhase.RUNNING, RankEvent.EXITED): [RevokeLease(running_rank=RUNNING_RANK, exit_code=-9)],
    (RankPhase.RUNNING, RankEvent.STOP): [Terminate(running_rank=RUNNING_RANK)],
    (RankPhase.STOPPING, RankEvent.SPAWNED): [Terminate(running_rank=RUNNING_RANK)],
    (RankPhase.STOPPING, RankEvent.EXITED): [RevokeLease(running_rank=RUNNING_RANK, exit_code=-9)],
}


def in_phase(phase: RankPhase) -> RankSupervisor:
    supervisor = fresh()
    for event in PATHS[phase]:
        EVENTS[event](supervisor)
    assert supervisor.phase_of(RANK) is phase
    return supervisor


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(RankPhase, RankEvent)))
def test_every_event_in_every_phase(phase: RankPhase, event: RankEvent) -> None:
    supervisor = in_phase(phase)
    if (phase, event) in TRANSITIONS:
        assert EVENTS[event](supervisor) == ACTIONS.get((phase, event), [])
        assert supervisor.phase_of(RANK) is TRANSITIONS[phase, event]
    elif event in (RankEvent.DUE, RankEvent.WANTED):  # no events for a rank that goes on
        assert EVENTS[event](supervisor) == []
        assert supervisor.phase_of(RANK) is phase
    else:
        with pytest.raises(KeyError):
            EVENTS[event](supervisor)


def test_a_stop_during_the_start_terminates_the_process_once_it_runs() -> None:
    supervisor = in_phase(RankPhase.STARTING)
    assert supervisor.stop() == []
    assert not supervisor.all_stopped
    assert supervisor.on_spawned(RUNNING_RANK, 5.0) == [Terminate(running_rank=RUNNING_RANK)]
    supervisor.on_exited(RANK, 0, 6.0)
    assert supervisor.all_stopped


def test_short_runs_back_off_longer_each_time_and_a_long_one_resets_the_backoff() -> None:
    supervisor, now, waits = fresh(), 0.0, []
    for uptime_s in (0.1, 0.1, 0.1, 0.1, 0.1, 100.0):
        supervisor.take_due(now)
        supervisor.on_spawned(RUNNING_RANK, now)
        now += uptime_s
        supervisor.on_exited(RANK, 1, now)
        due_at = supervisor.next_due_at()
        assert due_at is not None
        waits.append(due_at - now)
        now = due_at
    bases = [1, 2, 4, 8, 8]
    assert all(base <= wait <= 1.5 * base for base, wait in zip(bases, waits, strict=False))
    assert waits[-1] <= 1.5


def test_a_rank_that_is_killed_again_and_again_does_not_wait_like_one_that_fails() -> None:
    supervisor, now, waits = fresh(), 0.0, []
    for _ in range(12):
        supervisor.take_due(now)
        supervisor.on_spawned(RUNNING_RANK, now)
        now += 0.1
        supervisor.on_exited(RANK, -signal.SIGKILL, now)
        due_at = supervisor.next_due_at()
        assert due_at is not None
        waits.append(due_at - now)
        now = due_at
    assert max(waits) <= 1.5 * POLICY.killed_delay_s_max


def test_a_fenced_rank_returns_at_once() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_exited(RANK, EXIT_FENCED, 3.0)
    assert supervisor.take_due(3.0) == [Spawn(rank=RANK)]


def test_a_waiting_rank_is_not_started_before_its_time() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_exited(RANK, -9, 10.0)
    assert supervisor.take_due(10.9) == []
    assert supervisor.take_due(11.6) == [Spawn(rank=RANK)]


def test_a_failed_start_counts_as_a_short_run() -> None:
    supervisor = in_phase(RankPhase.STARTING)
    supervisor.on_spawn_failed(RANK, 10.0)
    supervisor.take_due(20.0)
    supervisor.on_spawn_failed(RANK, 20.0)
    assert supervisor.take_due(21.9) == []
    assert supervisor.take_due(23.1) == [Spawn(rank=RANK)]


def test_ranks_are_independent() -> None:
    supervisor = RankSupervisor([RankId(0), RANK], POLICY, random.Random(1), 0.0)
    assert supervisor.take_due(0.0) == [Spawn(rank=RankId(0)), Spawn(rank=RANK)]
    supervisor.on_spawned(RUNNING_RANK, 0.0)
    supervisor.on_exited(RANK, -9, 1.0)
    assert supervisor.phase_of(RankId(0)) is RankPhase.STARTING
    assert supervisor.running() == []


def test_a_rank_declared_dead_is_killed_only_after_its_grace() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    assert supervisor.next_due_at() == 10.0
    assert supervisor.take_due(9.9) == []
    assert supervisor.take_due(10.0) == [Kill(running_rank=RUNNING_RANK)]
    assert supervisor.take_due(99.0) == []


def test_a_rank_declared_dead_that_leaves_by_itself_is_not_killed() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    supervisor.on_exited(RANK, EXIT_FENCED, 5.1)
    assert supervisor.take_due(99.0) == [Spawn(rank=RANK)]


def test_a_verdict_on_another_incarnation_changes_nothing() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_declared_dead(Member(rank=RANK, incarnation=Incarnation(6)), now=5.0)
    supervisor.on_declared_dead(Member(rank=RankId(9), incarnation=Incarnation(7)), now=5.0)
    assert supervisor.next_due_at() is None


def test_the_lease_of_a_dying_rank_is_revoked_once_and_its_restart_waits_for_its_end() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    assert supervisor.alive() == [RUNNING_RANK]
    assert supervisor.on_dying(RANK, -9) == [RevokeLease(running_rank=RUNNING_RANK, exit_code=-9)]
    assert supervisor.alive() == []
    assert supervisor.running() == [RUNNING_RANK]
    assert supervisor.take_due(1e6) == []
    assert supervisor.on_exited(RANK, -9, 1e6) == []
    assert supervisor.running() == []
    assert supervisor.take_due(1e6 + 2.0) == [Spawn(rank=RANK)]


def test_a_stop_waits_for_the_end_of_a_dying_rank() -> None:
    supervisor = in_phase(RankPhase.DYING)
    assert supervisor.stop() == []
    assert not supervisor.all_stopped
    supervisor.on_exited(RANK, -9, 1.0)
    assert supervisor.all_stopped


def test_a_dying_rank_is_not_killed() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    supervisor.on_dying(RANK, None)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=6.0)
    assert supervisor.next_due_at() is None


def test_a_verdict_that_is_told_again_gives_no_new_grace() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=9.0)
    assert supervisor.next_due_at() == 10.0


def registered(incarnation: int, lease_id: int, pid: int = RUNNING_RANK.pid) -> RunningRank:
    member = Member(rank=RANK, incarnation=Incarnation(incarnation))
    return RunningRank(member=member, lease_id=lease_id, pid=pid)


def test_a_fenced_process_that_registers_again_is_not_killed_and_its_new_lease_is_revoked() -> None:
    supervisor, again = in_phase(RankPhase.RUNNING), registered(8, 100)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    assert supervisor.on_registered(again) == []
    assert supervisor.next_due_at() is None
    supervisor.on_declared_dead(RUNNING_RANK.member, now=6.0)
    assert supervisor.next_due_at() is None
    assert supervisor.on_exited(RANK, -9, 7.0) == [RevokeLease(running_rank=again, exit_code=-9)]


def test_a_new_lease_of_the_same_incarnation_stills_no_verdict() -> None:
    supervisor, again = in_phase(RankPhase.RUNNING), registered(7, 100)
    supervisor.on_declared_dead(RUNNING_RANK.member, now=5.0)
    supervisor.on_registered(again)
    assert supervisor.take_due(10.0) == [Kill(running_rank=again)]
    assert supervisor.on_dying(RANK, -9) == [RevokeLease(running_rank=again, exit_code=-9)]


def test_a_dying_process_that_had_registered_again_leaves_no_lease() -> None:
    supervisor, again = in_phase(RankPhase.DYING), registered(8, 100)
    assert supervisor.on_registered(again) == [RevokeLease(running_rank=again, exit_code=None)]


@pytest.mark.parametrize(
    "stranger", [registered(8, 100, pid=77), registered(6, 98), RUNNING_RANK], ids=str
)
def test_records_of_other_processes_and_of_the_past_change_nothing(stranger: RunningRank) -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    assert supervisor.on_registered(stranger) == []
    assert supervisor.running() == [RUNNING_RANK]


@pytest.mark.parametrize("phase", [RankPhase.WAITING, RankPhase.STARTING, RankPhase.STOPPED])
def test_a_record_without_a_process_changes_nothing(phase: RankPhase) -> None:
    supervisor = in_phase(phase)
    assert supervisor.on_registered(registered(8, 100)) == []
    assert supervisor.running() == []


def test_a_rank_that_shall_run_here_no_more_is_stopped_and_comes_back_if_wanted() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    assert supervisor.stop_unwanted((), (), 5.0) == [], "it still serves"
    assert supervisor.stop_unwanted((), (RANK,), 5.0) == [Terminate(running_rank=RUNNING_RANK)]
    assert supervisor.stop_unwanted((), (RANK,), 6.0) == []
    assert supervisor.take_due(10.0) == [Kill(running_rank=RUNNING_RANK)]
    supervisor.on_exited(RANK, -9, 11.0)
    assert supervisor.take_due(1e9) == []
    supervisor.want([RANK], 12.0)
    assert supervisor.take_due(12.0) == [Spawn(rank=RANK)]


def test_new_ranks_are_started_at_once() -> None:
    supervisor = fresh()
    supervisor.want([RANK, RankId(9)], 3.0)
    assert supervisor.take_due(3.0) == [Spawn(rank=RANK), Spawn(rank=RankId(9))]


def test_a_process_is_told_once_to_give_way_and_the_next_follows_without_backoff() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    assert supervisor.replace(RANK, 1.0) == [Terminate(running_rank=RUNNING_RANK)]
    assert supervisor.replace(RANK, 2.0) == []
    rejoined = RunningRank(
        member=Member(rank=RANK, incarnation=Incarnation(8)), lease_id=100, pid=1234
    )
    supervisor.on_registered(rejoined)
    assert supervisor.take_due(6.0) == [Kill(running_rank=rejoined)]
    supervisor.on_exited(RANK, -9, 6.5)
    due_at = supervisor.next_due_at()
    assert due_at is not None
    assert due_at <= 6.5 + 1.5 * POLICY.first_delay_s
    supervisor.take_due(due_at)
    supervisor.on_spawned(RUNNING_RANK, 9.0)
    assert supervisor.replace(RANK, 9.0) == [Terminate(running_rank=RUNNING_RANK)]


def test_a_process_knows_the_incarnations_that_it_has_gone_through() -> None:
    supervisor = in_phase(RankPhase.RUNNING)
    supervisor.on_registered(
        RunningRank(member=Member(rank=RANK, incarnation=Incarnation(9)), lease_id=1, pid=1234)
    )
    [process] = supervisor.processes()
    assert (process.rank, process.first, process.newest) == (RANK, 7, 9)
