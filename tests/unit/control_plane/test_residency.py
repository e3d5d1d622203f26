"""What a rank's slots surely hold. An assignment that is replaced before the rank has said that it
knows it may still be loaded: what it wanted elsewhere is in dispute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from control_plane.cluster_state import ClusterState
from control_plane.residency import Residency
from shared.expert_map import Placement
from shared.keys import Keys
from shared.records import SlotContents
from shared.types import EMPTY_SLOT, Incarnation, Member, RankId
from tests.unit.control_plane.harness import spec

MEMBER = Member(rank=RankId(0), incarnation=Incarnation(1))
SPEC = spec(ranks=1, slots=4)


def row(*experts: int) -> Placement:
    return np.array([experts] * SPEC.num_moe_layers, dtype=np.int16)


def state_of(assigned: SlotContents, *resident: int, known: int | None) -> ClusterState:
    residents = {MEMBER: SlotContents.of(MEMBER, row(*resident), number=known)}
    return ClusterState(
        keys=Keys("it"), spec=SPEC, assignments={MEMBER: assigned}, residents=residents
    )


def next_assignment(state: ClusterState, *wanted: int) -> SlotContents:
    (assignment,) = Residency(state, SPEC).assignments({MEMBER: row(*wanted)}, epoch=1)
    return assignment


def available(state: ClusterState) -> list[int]:
    return Residency(state, SPEC).available(MEMBER)[0].tolist()


FIRST = SlotContents.of(MEMBER, row(0, 1, 2, EMPTY_SLOT), number=1)


def test_what_an_unknown_assignment_wanted_elsewhere_is_in_dispute_until_the_next_is_known() -> (
    None
):
    state = state_of(FIRST, 0, 1, 2, EMPTY_SLOT, known=1)
    takes = next_assignment(state, 0, 3, 2, EMPTY_SLOT)
    assert (takes.number, takes.disputed) == (2, b"")
    state = state_of(takes, 0, 1, 2, EMPTY_SLOT, known=1)
    wants_back = next_assignment(state, 0, 1, 2, EMPTY_SLOT)
    assert wants_back.number == 3
    assert wants_back.disputed_slots()[0].tolist() == [False, True, False, False]
    assert available(state_of(wants_back, 0, 1, 2, EMPTY_SLOT, known=1)) == [0, -1, 2, -1]
    assert available(state_of(wants_back, 0, 1, 2, EMPTY_SLOT, known=2)) == [0, -1, 2, -1]
    assert available(state_of(wants_back, 0, 1, 2, EMPTY_SLOT, known=3)) == [0, 1, 2, -1]


def test_a_dispute_outlives_a_third_assignment() -> None:
    takes = replace(FIRST, slots=SlotContents.of(MEMBER, row(0, 3, 2, -1)).slots, number=2)
    wants_back = next_assignment(state_of(takes, 0, 1, 2, -1, known=1), 0, 1, 2, -1)
    third = next_assignment(state_of(wants_back, 0, 1, 2, -1, known=1), 0, 1, 2, 4)
    assert third.disputed_slots()[0].tolist() == [False, True, False, False]
    assert available(state_of(third, 0, 1, 2, -1, known=1)) == [0, -1, 2, -1]


@pytest.mark.parametrize("known", [2, None], ids=["known", "an earlier release"])
def test_nothing_is_in_dispute_with_who_knows_or_does_not_count(known: int | None) -> None:
    takes = replace(FIRST, slots=SlotContents.of(MEMBER, row(0, 3, 2, -1)).slots, number=2)
    resident = (0, -1, 2, -1) if known else (0, 1, 2, -1)
    back = next_assignment(state_of(takes, *resident, known=known), 0, 1, 2, -1)
    assert back.disputed == b""
    assert available(state_of(back, *resident, known=known)) == list(resident)
