"""Percentiles are measured values; only gaps after the fault count."""

from __future__ import annotations

import math

import pytest

from cli.bench.fault import FaultReport, FaultResult
from cli.bench.stats import Spread, percentile
from cli.bench.stream_client import StreamRecord


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1.0), (50, 5.0), (90, 9.0), (91, 10.0), (99, 10.0), (100, 10.0)]
)
def test_nearest_rank(percent: float, value: float) -> None:
    assert percentile([float(n) for n in range(10, 0, -1)], percent) == value


def test_of_nothing_there_is_no_number() -> None:
    assert math.isnan(percentile([], 50))
    assert Spread.of([2.0]) == Spread(count=1, p50=2.0, p99=2.0, max=2.0)


def test_a_gap_that_ended_before_the_fault_does_not_count() -> None:
    record = StreamRecord(sent_at=0.0, arrivals=[1.0, 3.0, 3.5, 4.5])
    assert record.gaps_ms() == [2000.0, 500.0, 1000.0]
    assert record.gaps_ms(since=3.2) == [500.0, 1000.0]
    assert record.first_after(3.5) == 4.5
    assert record.ttft_ms == 1000.0


def test_what_the_fault_added_is_the_gap_less_the_normal_one() -> None:
    one = FaultResult(
        rank=1,
        killed_at=0.0,
        survivors_ms=(50.0, 60.0),
        victims_ms=(90.0,),
        unknown_ms=(),
        wrong=0,
        errors=(),
        phases=None,
    )
    assert FaultReport(normal_itl_p99_ms=30.0, tries=(one,)).added_p99_ms == 60.0
