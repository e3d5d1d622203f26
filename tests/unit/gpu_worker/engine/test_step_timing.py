"""How long steps take, for how much of it a rank waits, and for whom."""

from __future__ import annotations

import pytest

from gpu_worker.engine.step_timing import StepTiming
from shared.types import RankId

PEERS = (RankId(1), RankId(2), RankId(3))
LATE = RankId(2)


def run_step(timing: StepTiming, at: tuple[int, int], began_at: float, *waits: float) -> float:
    """Waits of the given lengths, 10 ms of work after each. Returns when it ended."""
    now = began_at
    for wait_s in waits:
        timing.on_beat(at, PEERS, 4, now)
        timing.on_beat(at, PEERS, 4, now + wait_s / 2)
        timing.on_beat(at, (), 4, now + wait_s)
        now += wait_s + 0.01
    return now


def test_a_step_is_known_when_the_next_begins() -> None:
    timing = StepTiming()
    now = run_step(timing, (1, 0), 5.0, 0.02, 0.03)
    assert (timing.step_ms, timing.waited_ms) == (0.0, 0.0)
    run_step(timing, (1, 1), now, 0.0)
    assert timing.step_ms == pytest.approx(70.0)
    assert timing.waited_ms == pytest.approx(50.0)


def test_averages_follow_the_newest_steps() -> None:
    timing, now = StepTiming(), 0.0
    for step in range(3):
        now = run_step(timing, (1, step), now, 0.0)
    for step in range(3, 300):
        now = run_step(timing, (1, step), now, 0.09)
    assert timing.step_ms == pytest.approx(100.0, abs=1.0)
    assert timing.waited_ms == pytest.approx(90.0, abs=1.0)


def test_a_step_that_an_epoch_ended_says_nothing() -> None:
    timing = StepTiming()
    run_step(timing, (1, 5), 0.0, 3.0)
    run_step(timing, (2, 0), 9.0, 0.0)
    assert (timing.step_ms, timing.waited_ms) == (0.0, 0.0)


def test_sleep_is_not_part_of_a_step() -> None:
    timing = StepTiming()
    run_step(timing, (1, 0), 0.0, 0.01)
    timing.on_sleep()
    run_step(timing, (1, 1), 60.0, 0.01)
    assert timing.step_ms == 0.0


def run_exchanges(timing: StepTiming, *waits: tuple[tuple[int, ...], float], members: int) -> None:
    """One step of exchanges in which these peers are awaited for so many seconds, looked for each
    millisecond. The first of the next step ends it."""
    now = 0.0
    for awaited, wait_s in waits:
        peers = [RankId(rank) for rank in awaited]
        for _ in range(round(wait_s * 1000)):
            timing.on_beat((1, 0), peers, members, now)
            now += 0.001
        timing.on_beat((1, 0), (), members, now)
    timing.on_beat((1, 1), (), members, now)


def test_a_peer_is_late_while_most_are_there() -> None:
    timing = StepTiming()
    timing.on_beat((1, 0), (), 4, 0.0)
    run_exchanges(timing, ((1, 2, 3), 0.01), ((2, 3), 0.02), ((2,), 0.03), ((3,), 0.004), members=4)
    assert timing.waited_ms == pytest.approx(64.0)
    first, second = timing.late_peers()
    assert (first.rank, first.ms) == (2, pytest.approx(30.0))
    assert (second.rank, second.ms) == (3, pytest.approx(4.0))


def test_two_of_five_that_are_slow_alike_are_both_late() -> None:
    timing = StepTiming()
    timing.on_beat((1, 0), (), 5, 0.0)
    run_exchanges(timing, ((1, 2, 3, 4), 0.01), ((2, 3), 0.02), ((3,), 0.001), members=5)
    late = {peer.rank: peer.ms for peer in timing.late_peers()}
    assert late == {2: pytest.approx(20.0), 3: pytest.approx(21.0)}


def test_a_rank_that_did_not_look_calls_nobody_late() -> None:
    timing = StepTiming()
    timing.on_beat((1, 0), (), 4, 0.0)
    timing.on_beat((1, 0), (LATE,), 4, 0.0)
    timing.on_beat((1, 0), (), 4, 0.3)
    timing.on_beat((1, 1), (), 4, 0.3)
    assert timing.waited_ms == pytest.approx(300.0)
    assert timing.late_peers() == ()


def test_the_eight_latest_are_told_and_who_is_in_time_again_is_not() -> None:
    timing = StepTiming()
    timing.on_beat((1, 0), (), 100, 0.0)
    run_exchanges(timing, *(((rank,), 0.002 * rank) for rank in range(1, 11)), members=100)
    assert [peer.rank for peer in timing.late_peers()] == [10, 9, 8, 7, 6, 5, 4, 3]
    for step in range(1, 200):
        timing.on_beat((1, step), (), 100, 1.0 + step)
    assert timing.late_peers() == ()


def test_a_step_that_is_thrown_away_calls_nobody_late() -> None:
    timing = StepTiming()
    timing.on_beat((1, 0), (LATE,), 4, 0.0)
    timing.on_beat((1, 0), (LATE,), 4, 0.04)
    timing.on_beat((2, 0), (), 4, 0.05)
    timing.on_beat((2, 1), (), 4, 0.06)
    assert timing.late_peers() == ()
