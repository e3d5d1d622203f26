"""Which rank the others wait for."""

from __future__ import annotations

from shared.stragglers import LATE_MIN_MS, lateness_ms, stragglers
from shared.types import RankId
from shared.wire import LatePeer, Load


def loads(step_ms: float, *late: dict[int, float]) -> dict[RankId, Load]:
    """By how many ms each peer is late, as each rank tells it."""
    return {
        RankId(rank): Load(
            running=1,
            waiting=0,
            tokens=1,
            kv_blocks_free=1,
            kv_blocks=1,
            step_ms=step_ms,
            late_peers=tuple(LatePeer(rank=RankId(r), ms=ms) for r, ms in told.items()),
        )
        for rank, told in enumerate(late)
    }


def test_one_is_late_by_what_more_than_half_of_the_others_wait_for_it() -> None:
    found = loads(100.0, {1: 80.0}, {3: 1.0}, {1: 77.0}, {1: 60.0, 0: 2.0})
    assert lateness_ms(found) == {0: 0.0, 1: 77.0, 2: 0.0, 3: 0.0}
    assert stragglers(found) == {1: 77.0}


def test_equal_ranks_have_no_straggler() -> None:
    assert stragglers(loads(100.0, {1: 30.0}, {2: 25.0}, {0: 34.0})) == {}


def test_one_rank_alone_accuses_nobody() -> None:
    slow: dict[int, float] = {0: 80.0, 1: 80.0}
    assert stragglers(loads(100.0, {}, {}, slow)) == {}
    assert stragglers(loads(100.0, {}, {}, {}, slow)) == {}
    assert stragglers(loads(100.0, {2: 90.0}, {2: 90.0}, slow)) == {2: 90.0}


def test_nobody_is_late_by_its_own_word() -> None:
    assert stragglers(loads(100.0, {0: 80.0}, {0: 80.0}, {})) == {}


def test_two_of_many_can_straggle() -> None:
    told = {1: 80.0, 3: 75.0}
    found = stragglers(loads(100.0, told, {3: 3.0}, told, {1: 9.0}, told, told, told))
    assert found == {1: 80.0, 3: 75.0}


def test_little_is_not_late() -> None:
    assert stragglers(loads(1000.0, {1: 190.0}, {}, {1: 190.0})) == {}
    little = {1: LATE_MIN_MS - 1}
    assert stragglers(loads(LATE_MIN_MS, little, {}, little)) == {}


def test_of_fewer_than_three_that_tell_nothing_is_known() -> None:
    assert lateness_ms(loads(100.0, {1: 80.0}, {})) == {}
    assert lateness_ms(loads(0.0, {1: 80.0}, {}, {1: 80.0})) == {}
