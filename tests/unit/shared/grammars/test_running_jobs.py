"""Who is to blame when a grammar child takes too long or dies."""

from __future__ import annotations

from shared.grammars.running_jobs import RunningJobs

BUDGET = {"compile_s": 2.0, "step_s": 1.0}


def test_nobody_runs_at_first() -> None:
    jobs = RunningJobs()
    assert jobs.suspect is None
    assert jobs.overrun(100.0, **BUDGET) is None


def test_a_compilation_counts_from_where_it_began() -> None:
    jobs = RunningJobs()
    jobs.on_began(1, 50.0)
    assert jobs.overrun(52.9, **BUDGET) is None
    assert jobs.overrun(53.1, **BUDGET) == 1
    jobs.on_ended(1, 52.0)
    assert jobs.overrun(99.0, **BUDGET) is None


def test_a_step_counts_from_the_end_of_the_one_before() -> None:
    jobs = RunningJobs()
    jobs.on_step_sent(1, 0.0)
    jobs.on_step_sent(2, 0.0)
    assert jobs.suspect == 1
    jobs.on_ended(1, 2.5)
    assert jobs.suspect == 2
    assert jobs.overrun(5.0, **BUDGET) is None
    assert jobs.overrun(5.6, **BUDGET) == 2


def test_a_compilation_is_suspected_before_a_step() -> None:
    jobs = RunningJobs()
    jobs.on_step_sent(1, 0.0)
    jobs.on_began(2, 0.0)
    assert jobs.suspect == 2
    jobs.on_ended(2, 1.0)
    assert jobs.suspect == 1
