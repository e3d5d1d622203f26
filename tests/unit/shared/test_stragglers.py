"""Which rank the others wait for."""

from __future__ import annotations

from shared.stragglers import LATE_MIN_MS, lateness_ms, stragglers
from shared.types import RankId
from shared.wire import Load


def loads(step_ms: float, *waited_ms: float) -> dict[RankId, Load]:
    return {
        RankId(rank): Load(
            running=1,
            waiting=0,
            tokens=1,
            kv_blocks_free=1,
            kv_blocks=1,
            step_ms=step_ms,
            waited_ms=waited,
        )
        for rank, waited in enumerate(waited_ms)
    }


def test_the_one_that_waits_for_nobody_is_late_by_what_the_others_wait() -> None:
    found = loads(100.0, 80.0, 2.0, 82.0, 78.0)
    assert lateness_ms(found) == {0: 0.0, 1: 77.0, 2: 0.0, 3: 1.0}
    assert stragglers(found) == {1: 77.0}


def test_equal_ranks_have_no_straggler() -> None:
    assert stragglers(loads(100.0, 30.0, 25.0, 34.0)) == {}


def test_two_of_many_can_straggle() -> None:
    assert set(stragglers(loads(100.0, 80.0, 5.0, 80.0, 1.0, 80.0, 80.0))) == {1, 3}


def test_little_is_not_late() -> None:
    assert stragglers(loads(1000.0, 190.0, 0.0, 190.0)) == {}
    assert stragglers(loads(LATE_MIN_MS, LATE_MIN_MS - 1, 0.0, LATE_MIN_MS - 1)) == {}


def test_of_fewer_than_three_that_tell_nothing_is_known() -> None:
    assert lateness_ms(loads(100.0, 80.0, 2.0)) == {}
    assert lateness_ms(loads(0.0, 80.0, 2.0, 80.0)) == {}
