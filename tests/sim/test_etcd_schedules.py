"""Schedules in which etcd misbehaves, and proof that they would notice: bugs planted on purpose
must fall."""

from __future__ import annotations

import pytest

from control_plane.leadership import Leadership
from shared.revisions import Revisions
from shared.watch_position import WatchPosition
from tests.sim.etcd_schedules import run_etcd_schedule
from tests.sim.many_schedules import outcome_of
from tests.sim.planted import is_noticed

NUM_SCHEDULES = 18
PART = 6
REGRESSIONS = [87]
"""Beyond NUM_SCHEDULES. 87: assignments that refer to a map that etcd never had."""


def failure_of(seed: int) -> str | None:
    outcome = outcome_of(seed, run_etcd_schedule)
    return outcome if isinstance(outcome, str) else None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, PART))
def test_no_schedule_breaks_an_invariant(first: int) -> None:
    seeds = range(first, min(first + PART, NUM_SCHEDULES))
    broken = [text for seed in seeds if (text := failure_of(seed)) is not None]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_no_schedule_that_once_failed_does_again(seed: int) -> None:
    assert failure_of(seed) is None


@pytest.fixture
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby reads the leader key again with each renewal, which heals what these bugs do to its
    watch. Without it the watch stands alone."""

    async def believe(self: Leadership) -> None:
        pass

    monkeypatch.setattr(Leadership, "_reread_leader", believe)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_second_look")
def test_a_deletion_that_a_stale_read_undoes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = Revisions._admit_event

    def forget(self, event):  # type: ignore[no-untyped-def]
        news = admit(self, event)
        self._deleted.clear()
        return news

    monkeypatch.setattr(Revisions, "_admit_event", forget)
    assert is_noticed(18, 38, run=run_etcd_schedule)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_second_look")
def test_a_watch_that_goes_on_after_what_it_knows_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def after(self: WatchPosition) -> int | None:
        return None if self._revision is None else self._revision + 1

    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(WatchPosition, "revision", property(after))
    # Whoever wants to see again what it knows would notice it at once, and read all anew.
    monkeypatch.setattr(WatchPosition, "_awaits_last", never, raising=False)
    assert is_noticed(10, 45, run=run_etcd_schedule)
