"""Every event in every phase of a rank's lives."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from node_agent.rank_supervisor import (
    TRANSITIONS,
    Action,
    Bury,
    Event,
    Kill,
    Life,
    Phase,
    RankLives,
    Spawn,
    Terminate,
)
from node_agent.restart_policy import RespawnPolicy
from shared.exit_codes import EXIT_FENCED
from shared.types import Incarnation, Member, RankId

RANK = RankId(2)
LIFE = Life(member=Member(rank=RANK, incarnation=Incarnation(7)), lease_id=99, pid=1234)
POLICY = RespawnPolicy(first_delay_s=1.0, delay_s_max=8.0, healthy_after_s=60.0)


def fresh(now: float = 0.0) -> RankLives:
    return RankLives([RANK], POLICY, random.Random(1), now)


EVENTS: dict[Event, Callable[[RankLives], list[Action]]] = {
    Event.DUE: lambda lives: lives.due(1e9),
    Event.ADOPTED: lambda lives: lives.adopted(LIFE, 0.0),
    Event.SPAWNED: lambda lives: lives.spawned(LIFE, 0.0),
    Event.SPAWN_FAILED: lambda lives: lives.spawn_failed(RANK, 0.0),
    Event.DYING: lambda lives: lives.dying(RANK, -9),
    Event.EXITED: lambda lives: lives.exited(RANK, -9, 0.0),
    Event.STOP: lambda lives: lives.stop(),
}
PATHS: dict[Phase, list[Event]] = {
    Phase.WAITING: [],
    Phase.STARTING: [Event.DUE],
    Phase.RUNNING: [Event.DUE, Event.SPAWNED],
    Phase.DYING: [Event.DUE, Event.SPAWNED, Event.DYING],
    Phase.STOPPING: [Event.DUE, Event.SPAWNED, Event.STOP],
    Phase.ENDING: [Event.DUE, Event.SPAWNED, Event.STOP, Event.DYING],
    Phase.STOPPED: [Event.STOP],
}
ACTIONS: dict[tuple[Phase, Event], list[Action]] = {
    (Phase.WAITING, Event.DUE): [Spawn(rank=RANK)],
    (Phase.RUNNING, Event.DYING): [Bury(life=LIFE, exit_code=-9)],
    (Phase.STOPPING, Event.DYING): [Bury(life=LIFE, exit_code=-9)],
    (Phase.RUNNING, Event.EXITED): [Bury(life=LIFE, exit_code=-9)],
    (Phase.RUNNING, Event.STOP): [Terminate(life=LIFE)],
    (Phase.STOPPING, Event.SPAWNED): [Terminate(life=LIFE)],
    (Phase.STOPPING, Event.EXITED): [Bury(life=LIFE, exit_code=-9)],
}


def in_phase(phase: Phase) -> RankLives:
    lives = fresh()
    for event in PATHS[phase]:
        EVENTS[event](lives)
    assert lives.phase_of(RANK) is phase
    return lives


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_event_in_every_phase(phase: Phase, event: Event) -> None:
    lives = in_phase(phase)
    if (phase, event) in TRANSITIONS:
        assert EVENTS[event](lives) == ACTIONS.get((phase, event), [])
        assert lives.phase_of(RANK) is TRANSITIONS[phase, event]
    elif event is Event.DUE:  # a tick is no event to a rank that does not wait
        assert EVENTS[event](lives) == []
        assert lives.phase_of(RANK) is phase
    else:
        with pytest.raises(KeyError):
            EVENTS[event](lives)


def test_a_stop_during_the_start_terminates_the_process_once_it_runs() -> None:
    lives = in_phase(Phase.STARTING)
    assert lives.stop() == []
    assert not lives.all_stopped
    assert lives.spawned(LIFE, 5.0) == [Terminate(life=LIFE)]
    lives.exited(RANK, 0, 6.0)
    assert lives.all_stopped


def test_short_lives_wait_longer_each_time_and_a_long_one_forgives() -> None:
    lives, now, waits = fresh(), 0.0, []
    for lived_s in (0.1, 0.1, 0.1, 0.1, 0.1, 100.0):
        lives.due(now)
        lives.spawned(LIFE, now)
        now += lived_s
        lives.exited(RANK, 1, now)
        due_at = lives.next_due_at()
        assert due_at is not None
        waits.append(due_at - now)
        now = due_at
    bases = [1, 2, 4, 8, 8]
    assert all(base <= wait <= 1.5 * base for base, wait in zip(bases, waits, strict=False))
    assert waits[-1] <= 1.5


def test_a_fenced_rank_returns_at_once() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.exited(RANK, EXIT_FENCED, 3.0)
    assert lives.due(3.0) == [Spawn(rank=RANK)]


def test_a_waiting_rank_is_not_started_before_its_time() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.exited(RANK, -9, 10.0)
    assert lives.due(10.9) == []
    assert lives.due(11.6) == [Spawn(rank=RANK)]


def test_a_failed_start_counts_as_a_short_life() -> None:
    lives = in_phase(Phase.STARTING)
    lives.spawn_failed(RANK, 10.0)
    lives.due(20.0)
    lives.spawn_failed(RANK, 20.0)
    assert lives.due(21.9) == []
    assert lives.due(23.1) == [Spawn(rank=RANK)]


def test_ranks_are_independent() -> None:
    lives = RankLives([RankId(0), RANK], POLICY, random.Random(1), 0.0)
    assert lives.due(0.0) == [Spawn(rank=RankId(0)), Spawn(rank=RANK)]
    lives.spawned(LIFE, 0.0)
    lives.exited(RANK, -9, 1.0)
    assert lives.phase_of(RankId(0)) is Phase.STARTING
    assert lives.running() == []


def test_a_condemned_life_is_killed_only_after_its_grace() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.condemned(LIFE.member, now=5.0)
    assert lives.next_due_at() == 15.0
    assert lives.due(14.9) == []
    assert lives.due(15.0) == [Kill(life=LIFE)]
    assert lives.due(99.0) == []


def test_a_condemned_life_that_leaves_by_itself_is_not_killed() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.condemned(LIFE.member, now=5.0)
    lives.exited(RANK, EXIT_FENCED, 5.1)
    assert lives.due(99.0) == [Spawn(rank=RANK)]


def test_a_verdict_on_another_life_changes_nothing() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.condemned(Member(rank=RANK, incarnation=Incarnation(6)), now=5.0)
    lives.condemned(Member(rank=RankId(9), incarnation=Incarnation(7)), now=5.0)
    assert lives.next_due_at() is None


def test_a_dying_life_is_buried_once_and_its_rank_waits_for_its_end() -> None:
    lives = in_phase(Phase.RUNNING)
    assert lives.living() == [LIFE]
    assert lives.dying(RANK, -9) == [Bury(life=LIFE, exit_code=-9)]
    assert lives.living() == []
    assert lives.running() == [LIFE]
    assert lives.due(1e6) == []
    assert lives.exited(RANK, -9, 1e6) == []
    assert lives.running() == []
    assert lives.due(1e6 + 2.0) == [Spawn(rank=RANK)]


def test_a_stop_waits_for_the_end_of_a_dying_life() -> None:
    lives = in_phase(Phase.DYING)
    assert lives.stop() == []
    assert not lives.all_stopped
    lives.exited(RANK, -9, 1.0)
    assert lives.all_stopped


def test_a_dying_life_is_not_killed() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.condemned(LIFE.member, now=5.0)
    lives.dying(RANK, None)
    lives.condemned(LIFE.member, now=6.0)
    assert lives.next_due_at() is None


def test_a_verdict_that_is_told_again_gives_no_new_grace() -> None:
    lives = in_phase(Phase.RUNNING)
    lives.condemned(LIFE.member, now=5.0)
    lives.condemned(LIFE.member, now=9.0)
    assert lives.next_due_at() == 15.0
