"""A step waits a moment for quick matchers, and for no slow one twice."""

from __future__ import annotations

from gpu_worker.engine.mask_patience import QUICK_AGAIN_AFTER, SLOW_S, MaskPatience


def test_a_step_waits_for_a_mask_until_it_is_there() -> None:
    patience = MaskPatience()
    assert patience.wait_s == 0
    patience.on_sent(1, matcher=7)
    assert patience.wait_s > 0
    patience.on_mask(1, matcher=7, cost_s=SLOW_S / 10)
    assert patience.wait_s == 0


def test_many_masks_are_given_more_time_but_not_any() -> None:
    patience = MaskPatience()
    waits = []
    for job in range(1000):
        patience.on_sent(job, matcher=job)
        waits.append(patience.wait_s)
    assert waits == sorted(waits)
    assert waits[0] < waits[20]
    assert waits[-1] <= 0.01


def test_a_slow_matcher_is_not_waited_for_until_it_has_long_been_quick() -> None:
    patience = MaskPatience()
    patience.on_sent(0, matcher=7)
    patience.on_mask(0, matcher=7, cost_s=SLOW_S * 2)
    for job in range(1, QUICK_AGAIN_AFTER + 1):
        patience.on_sent(job, matcher=7)
        assert patience.wait_s == 0
        patience.on_mask(job, matcher=7, cost_s=0.0)
    patience.on_sent(99, matcher=7)
    assert patience.wait_s > 0


def test_a_mask_that_does_not_come_is_waited_for_once_and_its_neighbours_stay_quick() -> None:
    patience = MaskPatience()
    patience.on_sent(1, matcher=7)  # stuck
    patience.on_sent(2, matcher=8)  # behind it
    patience.on_waited()
    assert patience.wait_s == 0
    patience.on_mask(2, matcher=8, cost_s=0.0)
    patience.on_sent(3, matcher=8)
    assert patience.wait_s > 0


def test_what_is_closed_is_forgotten() -> None:
    patience = MaskPatience()
    patience.on_sent(1, matcher=7)
    patience.forget(1, matcher=7)
    assert patience.wait_s == 0
