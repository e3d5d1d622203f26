"""The engine's heartbeat, as probes report it."""

from __future__ import annotations

from gpu_worker.engine.mailbox import Inbox, ThreadWaiter
from gpu_worker.engine.monitor import EngineMonitor


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at


def build(clock: Clock, cpu: list[float]) -> EngineMonitor:
    return EngineMonitor(Inbox(ThreadWaiter()), lambda event: None, clock, lambda: cpu[0])


def test_it_ages_without_a_beat_and_without_cpu_time() -> None:
    clock, cpu = Clock(), [0.0]
    monitor = build(clock, cpu)
    clock.at += 0.5
    assert monitor.engine_age_ms() == 500.0
    monitor.beat((1,))
    assert monitor.engine_age_ms() == 0.0
    assert monitor.waiting_for == (1,)


def test_cpu_time_shows_life_between_beats_but_only_while_it_grows() -> None:
    clock, cpu = Clock(), [0.0]
    monitor = build(clock, cpu)
    clock.at += 0.5
    cpu[0] = 0.01
    assert monitor.engine_age_ms() == 0.0
    clock.at += 0.25
    assert monitor.engine_age_ms() == 250.0
