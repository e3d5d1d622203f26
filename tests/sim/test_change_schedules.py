"""Changes on purpose, with and without faults: clients notice nothing, nobody dies of it, and in
the end the instance is what was asked for. Bugs planted on purpose must fall.

STARFISH_SIM_SCHEDULES sets how many are run, one for six others."""

from __future__ import annotations

import os

import pytest

from control_plane.membership import Membership
from control_plane.residency import Residency
from gpu_worker.membership.membership_driver import MembershipDriver
from tests.sim.change_schedules import run_change_schedule
from tests.sim.many_schedules import ManyOutcomes, outcome_of
from tests.sim.planted import is_noticed
from tests.sim.schedules import CARD_FIRST_SEED

NUM_SCHEDULES = int(os.environ.get("STARFISH_SIM_SCHEDULES", "120")) // 6
FIRST_SEED = int(os.environ.get("STARFISH_SIM_FIRST_SEED", "0"))
NUM_CARD_SCHEDULES = NUM_SCHEDULES // 2
PART = 10
REGRESSION_SEEDS = {
    710220: "a drain emptied a replica whose only other one was loaded, and in no map yet",
    710562: "a rank was taken back to a place that had become another one's",
}
CARD_REGRESSION_SEEDS = {
    710105: "a map named a slot that a rank was loading for an assignment replaced since: tokens",
    52: "the checker blamed the last member, which was told to end and could wait for nobody",
}
"""Counted from CARD_FIRST_SEED."""
TIMEOUT_S = int(os.environ.get("STARFISH_SIM_TIMEOUT_S", "1800"))


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, PART))
def test_no_change_on_purpose_breaks_an_invariant(first: int) -> None:
    check_schedules(range(first, min(first + PART, NUM_SCHEDULES)), FIRST_SEED)


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("first", range(0, NUM_CARD_SCHEDULES, PART))
def test_no_change_on_purpose_breaks_an_invariant_on_cards(first: int) -> None:
    seeds = range(first, min(first + PART, NUM_CARD_SCHEDULES))
    check_schedules(seeds, CARD_FIRST_SEED + FIRST_SEED)


def check_schedules(seeds: range, first_seed: int) -> None:
    found = ManyOutcomes()
    for seed in seeds:
        found.add(outcome_of(first_seed + seed, run_change_schedule))
    assert not found.broken, "\n".join(found.broken)
    assert found.moves, "leavers should have moved sessions"


@pytest.mark.parametrize("seed", REGRESSION_SEEDS)
def test_a_schedule_that_once_failed_passes(seed: int) -> None:
    run_change_schedule(seed)


@pytest.mark.parametrize("seed", CARD_REGRESSION_SEEDS)
def test_a_schedule_on_cards_that_once_failed_passes(seed: int) -> None:
    run_change_schedule(CARD_FIRST_SEED + seed)


def test_a_leaver_whose_experts_nobody_else_holds_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 3. It leaves as soon as it serves nobody."""
    monkeypatch.setattr(Residency, "covers", lambda self, rows: bool(rows))
    assert is_noticed(10, run=run_change_schedule)


def test_a_drained_rank_that_joins_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has gone on in place, and looks like any newcomer."""
    monkeypatch.setattr(Residency, "is_to_leave", lambda self, member: False)
    assert is_noticed(14, run=run_change_schedule)


def test_a_change_that_ends_with_its_leader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that carries out only what it was asked for itself."""
    decide = Membership.decide

    def forget(self, state, now, **more):  # type: ignore[no-untyped-def]
        first = self.__dict__.setdefault("_first_change", state.desired.change)
        if first:
            return None
        return decide(self, state, now, **more)

    monkeypatch.setattr(Membership, "decide", forget)
    assert is_noticed(11, 5, run=run_change_schedule)


def test_a_rank_that_is_told_to_end_and_waits_for_no_drain_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MembershipDriver, "ask_to_leave", lambda self: False)
    assert is_noticed(13, 1, run=run_change_schedule)
