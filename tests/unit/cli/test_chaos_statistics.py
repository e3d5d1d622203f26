"""What a try of a fault did to clients: tokens, gaps, throughput."""

from __future__ import annotations

import pytest

from cli.bench.chaos.statistics import (
    Damage,
    Moments,
    Stream,
    damage_of,
    gaps_over_time,
    rate,
    try_result,
    usual_p99_ms,
)
from cli.bench.stream_client import StreamRecord

EXPECTED = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
MOMENTS = Moments(calm_from=8.0, injected_at=10.0, healed_at=11.0, whole_at=15.0, until=17.0)


def stream(
    prompt: int,
    ids: list[int],
    *arrivals: float,
    sent_at: float = 9.0,
    ended_at: float | None = None,
    error: str | None = None,
    accepted: bool = True,
) -> Stream:
    record = StreamRecord(
        sent_at=sent_at, ids=ids, arrivals=[*arrivals], error=error, accepted=accepted
    )
    return Stream(prompt=prompt, record=record, ended_at=ended_at)


@pytest.mark.parametrize(
    ("ids", "is_whole", "damage"),
    [
        ([1, 2, 3, 4, 5], True, Damage()),
        ([1, 2, 3], False, Damage()),  # it broke off, and what came was right
        ([], False, Damage()),
        ([1, 2, 3], True, Damage(lost=2)),
        ([1, 2, 4, 5], True, Damage(lost=1)),
        ([1, 2, 2, 3, 4, 5], True, Damage(doubled=1)),
        ([1, 2, 9, 4, 5], True, Damage(changed=1)),
        ([1, 2, 4], False, Damage(lost=1)),
        ([1, 2, 9], False, Damage(changed=1)),
        ([1, 9, 9, 9, 5], True, Damage(changed=3)),
        ([1, 2, 3, 4, 5, 6], True, Damage(doubled=1)),
    ],
)
def test_damage_to_a_stream(ids: list[int], is_whole: bool, damage: Damage) -> None:
    assert damage_of(ids, EXPECTED[0], is_whole=is_whole) == damage


def test_a_try_counts_only_streams_that_it_could_have_harmed() -> None:
    streams = [
        stream(0, [1, 2, 9, 4, 5], 9.1, 9.5, ended_at=9.6),  # ended before
        stream(0, [1, 2, 3, 4, 5], 9.5, 12.0, ended_at=12.0),
        stream(1, [6, 7, 8, 9], 9.5, 14.0, ended_at=14.5),
        stream(1, [6, 7], 9.5, 10.5, ended_at=10.5, error="broke off"),
        stream(1, [], sent_at=10.6, ended_at=10.7, error="HTTP 503", accepted=False),
        stream(0, [], sent_at=18.0, ended_at=19.0, error="too late"),
    ]
    found = try_result("rank 1", MOMENTS, streams, EXPECTED, [])
    assert (found.sessions, found.lost, found.refused) == (4, 1, 1)
    assert found.errors == ("HTTP 503", "broke off")
    assert found.damage == Damage(lost=1)
    assert (found.held_s, found.whole_s) == (1.0, 5.0)


def test_gaps_around_the_fault_and_at_the_return() -> None:
    streams = [
        stream(0, [], 9.0, 10.5, 10.75, 16.0, ended_at=16.0),
        stream(1, [], 9.9, ended_at=None),  # stuck until the end and beyond
        stream(1, [], 9.0, 9.5, ended_at=9.5),
    ]
    found = try_result("", MOMENTS, streams, EXPECTED, [])
    assert found.gaps_ms == (2250.0, pytest.approx(3100.0))  # the longer one was open then
    assert found.return_gaps_ms == (5250.0, pytest.approx(7100.0))


def test_the_first_token_of_a_stream_that_began_later() -> None:
    streams = [
        stream(0, [], 14.0, sent_at=9.0),
        stream(0, [], 12.5, sent_at=10.5),
        stream(1, [], 12.5, sent_at=12.0),
    ]
    assert try_result("", MOMENTS, streams, EXPECTED, []).first_token_max_ms == 2000.0


def test_throughput_before_during_and_after() -> None:
    ticks = [(7.0, 50), (8.0, 2), (9.9, 4), (10.0, 5), (14.9, 5), (15.0, 3), (16.9, 3), (17.0, 9)]
    found = try_result("", MOMENTS, [], EXPECTED, ticks)
    assert (found.before, found.during, found.after) == (3.0, 2.0, 3.0)
    assert rate(ticks, 5.0, 5.0) == 0.0


def test_an_instance_that_never_became_whole() -> None:
    moments = Moments(calm_from=0.0, injected_at=2.0, healed_at=2.0, whole_at=None, until=12.0)
    found = try_result("", moments, [], EXPECTED, [(3.0, 20)])
    assert (found.whole_s, found.during, found.after) == (None, 2.0, 0.0)


def test_the_usual_gap_is_that_of_the_calm_before_faults() -> None:
    streams = [stream(0, [], 7.0, 8.5, 8.6, 8.75, 10.5, 13.0)]
    assert usual_p99_ms(streams, [MOMENTS]) == pytest.approx(150.0)


def test_gaps_over_time_are_told_from_the_fault_on() -> None:
    streams = [stream(0, [], 7.0, 9.0, 10.5, 18.0)]
    assert gaps_over_time(streams, MOMENTS) == [(-1.0, 2000.0), (0.5, 1500.0)]
