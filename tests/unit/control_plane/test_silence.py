"""Every row of the table of patience, the override, and what is learnt of usual answers."""

from __future__ import annotations

import pytest

from control_plane.silence import SilenceEvidence, SilenceTimings, patience_s
from shared.types import ProcessState

TIMINGS = SilenceTimings()
STOPPED, RUNNING = ProcessState.STOPPED, ProcessState.RUNNING
STARVED, SLEEPING = ProcessState.STARVED, ProcessState.SLEEPING


def evidence(
    view: ProcessState | None, *, is_host_silent: bool = False, usual_s: float = 0.0
) -> SilenceEvidence:
    return SilenceEvidence(view=view, is_host_silent=is_host_silent, usual_s=usual_s)


@pytest.mark.parametrize(
    ("view", "is_host_silent", "expected_s"),
    [
        (STOPPED, False, TIMINGS.stopped_s),
        (STOPPED, True, TIMINGS.host_pause_s),
        (RUNNING, False, TIMINGS.hung_s),
        (RUNNING, True, TIMINGS.hung_s),
        (STARVED, False, TIMINGS.hung_s),
        (SLEEPING, True, TIMINGS.hung_s),
        (None, False, TIMINGS.unseen_s),
        (None, True, TIMINGS.host_pause_s),
    ],
)
def test_patience_follows_what_the_kernel_says(
    view: ProcessState | None, is_host_silent: bool, expected_s: float
) -> None:
    assert patience_s(evidence(view, is_host_silent=is_host_silent), TIMINGS) == expected_s


@pytest.mark.parametrize("view", [None, RUNNING, STARVED, SLEEPING])
@pytest.mark.parametrize("is_host_silent", [False, True])
def test_no_pause_of_a_second_is_ever_the_end(
    view: ProcessState | None, is_host_silent: bool
) -> None:
    assert patience_s(evidence(view, is_host_silent=is_host_silent), TIMINGS) > 1.0


def test_an_instance_whose_answers_are_slow_is_given_more_time() -> None:
    assert patience_s(evidence(None, usual_s=0.7), TIMINGS) == pytest.approx(2.1)
    assert patience_s(evidence(None, usual_s=20.0), TIMINGS) == TIMINGS.hung_s
    assert patience_s(evidence(RUNNING, usual_s=20.0), TIMINGS) == TIMINGS.hung_s
    assert patience_s(evidence(STOPPED, usual_s=1.0), TIMINGS) == TIMINGS.stopped_s


def announced(view: ProcessState | None, announced_s: float) -> SilenceEvidence:
    return SilenceEvidence(view=view, is_host_silent=False, usual_s=0.0, announced_s=announced_s)


@pytest.mark.parametrize("view", [None, RUNNING, STARVED, SLEEPING])
def test_what_was_announced_only_adds_patience_and_is_bounded(view: ProcessState | None) -> None:
    usual_s = patience_s(evidence(view), TIMINGS)
    assert patience_s(announced(view, 0.5), TIMINGS) == usual_s
    assert patience_s(announced(view, 3.5), TIMINGS) == 3.5
    assert patience_s(announced(view, 60.0), TIMINGS) == TIMINGS.announced_max_s
    assert patience_s(announced(view, 2.0), SilenceTimings(override_s=0.05)) == 2.0


def test_a_stopped_process_is_not_excused_by_what_it_announced() -> None:
    assert patience_s(announced(STOPPED, 3.5), TIMINGS) == TIMINGS.stopped_s


def test_the_override_replaces_what_is_learnt() -> None:
    timings = SilenceTimings(override_s=0.05)
    for view in (None, RUNNING, STOPPED):
        assert patience_s(evidence(view, usual_s=1.0), timings) == 0.05
    timings = SilenceTimings(override_s=4.0)
    assert patience_s(evidence(None), timings) == 4.0
    assert patience_s(evidence(STOPPED), timings) == TIMINGS.stopped_s
