"""What is read off clients' streams: pauses, those that are not over included; a lost, doubled or
other token; when throughput is back."""

from __future__ import annotations

import pytest

from benchmarks.gpu_serve_gaps import (
    Throughput,
    Window,
    errors,
    first_tokens_ms,
    first_wrong,
    had_begun,
    longest_gaps_ms,
    ran_at,
)
from benchmarks.gpu_serve_load import Arrival, Turn
from cli.bench.stream_client import StreamRecord

STRUCK_AT = 10.0
FAULT = Window(begin=STRUCK_AT, end=12.0)


def turn(
    *arrivals: float,
    ids: list[int] | None = None,
    finish: str | None = "length",
    error: str | None = None,
    sent_at: float = 0.0,
) -> Turn:
    record = StreamRecord(sent_at=sent_at, finish=finish, error=error)
    record.arrivals = list(arrivals)
    record.ids = list(range(len(arrivals))) if ids is None else ids
    return Turn(prompt=(3, 4), wanted_tokens=4, record=record)


def test_the_pause_that_a_fault_falls_into_counts_and_earlier_ones_do_not() -> None:
    found = longest_gaps_ms([turn(1.0, 9.0, 9.9, 10.4, 10.5)], FAULT, now=20.0)
    assert found == [pytest.approx(500.0)]


def test_a_pause_that_begins_after_the_window_is_not_the_faults() -> None:
    rejoin = Window(begin=12.0, end=30.0)
    stream = turn(9.9, 10.0, 10.1, 13.0, 13.1)
    assert longest_gaps_ms([stream], FAULT, now=20.0) == [pytest.approx(2900.0)]
    assert longest_gaps_ms([turn(9.9, 10.1, 12.5, 15.5)], rejoin, now=20.0) == [
        pytest.approx(3000.0)
    ]


def test_a_stream_that_hangs_pauses_until_now_and_one_that_ended_does_not() -> None:
    assert longest_gaps_ms([turn(9.9, finish=None)], FAULT, now=15.0) == [pytest.approx(5100.0)]
    assert longest_gaps_ms([turn(9.9)], FAULT, now=15.0) == []
    broken = turn(9.9, finish=None, error="broke off")
    assert longest_gaps_ms([broken], FAULT, now=15.0) == []
    assert errors([broken]) == ["broke off"]


def test_streams_without_a_token_still_wait_for_it() -> None:
    waits = turn(finish=None, sent_at=11.0)
    served = turn(11.5, sent_at=11.0)
    sent_before = turn(10.5, sent_at=9.5)
    streams = [waits, served, sent_before, turn(9.0)]
    assert first_tokens_ms(streams, FAULT, now=15.0) == [4000.0, 500.0, 1000.0]


def test_a_fault_interrupts_streams_that_have_a_token() -> None:
    running, later, waiting = turn(9.0, 10.5), turn(10.5), turn(finish=None)
    assert had_begun([running, later, waiting], STRUCK_AT) == [running]


@pytest.mark.parametrize(
    ("ids", "finish", "wrong"),
    [
        ([7, 8, 9, 5], "length", None),
        ([7, 8], None, None),  # still running
        ([7, 8], "length", 2),  # ended early
        ([7, 9, 5], None, 1),  # one lost
        ([7, 8, 8], None, 2),  # one doubled
        ([7, 8, 9, 5, 5], "length", 4),
        ([7, 8, 9, 5, 5], None, 4),
        ([], None, None),
    ],
)
def test_every_token_is_compared(ids: list[int], finish: str | None, wrong: int | None) -> None:
    assert first_wrong(turn(ids=ids, finish=finish), [7, 8, 9, 5]) == wrong


def test_streams_that_ran_when_something_happened_are_those_to_be_compared() -> None:
    through, before, after = turn(9.0, 10.5), turn(8.0, 9.5), turn(10.5, 11.0, sent_at=10.2)
    waiting, endless = turn(finish=None, sent_at=9.0), turn(10.7, finish=None, sent_at=10.6)
    streams = [through, before, after, waiting, endless]
    assert ran_at(streams, [STRUCK_AT], now=20.0) == [through, waiting]
    assert ran_at(streams, [STRUCK_AT, 15.0], now=20.0) == [through, waiting, endless]


def steady_window(begin: float, end: float, tokens_per_s: int) -> list[Arrival]:
    count = round((end - begin) * tokens_per_s)
    return [Arrival(at=begin + i / tokens_per_s, num_tokens=1) for i in range(count)]


def test_throughput_is_back_after_the_silence_when_it_reaches_its_share() -> None:
    arrivals = steady_window(0, 10, 100) + steady_window(10.3, 11, 20) + steady_window(11, 15, 80)
    seen = Throughput(arrivals)
    assert seen.tokens_per_s(5, 10) == pytest.approx(100, rel=0.01)
    back = seen.recovered_ms(FAULT, wanted=80, now=15.0)
    assert back == pytest.approx(1000, abs=60)
    assert seen.recovered_ms(FAULT, wanted=20, now=15.0) == pytest.approx(300, abs=20)
    assert seen.recovered_ms(FAULT, wanted=100, now=15.0) is None


def test_a_silence_that_begins_later_is_not_the_faults() -> None:
    seen = Throughput(
        steady_window(0, 10, 100) + steady_window(10.2, 13, 100) + steady_window(14, 20, 100)
    )
    assert seen.recovered_ms(FAULT, wanted=100, now=20.0) == pytest.approx(200, abs=20)


def test_throughput_of_nothing_never_is_back() -> None:
    assert Throughput([]).recovered_ms(FAULT, wanted=1, now=20.0) is None
