"""What is learnt of usual answers."""

from __future__ import annotations

from shared.rhythm import Rhythm


def test_a_slow_answer_counts_for_half_a_minute_to_a_minute() -> None:
    rhythm = Rhythm(now=100.0)
    rhythm.observe(0.4, 101.0)
    rhythm.observe(0.1, 102.0)
    assert rhythm.usual_s(129.0) == 0.4
    rhythm.observe(0.2, 131.0)
    assert rhythm.usual_s(159.0) == 0.4
    assert rhythm.usual_s(161.0) == 0.2
    assert rhythm.usual_s(300.0) == 0.0
