"""The expert map: what it counts, and that a malformed one is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shared.errors import WireError
from shared.expert_map import ExpertMap
from shared.records import SlotContents, pack_map, unpack_map
from shared.types import ABSENT_SLOT, EMPTY_SLOT, Epoch, Incarnation, Member, RankId


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def example() -> ExpertMap:
    placement = np.array(
        [[[0, 1, EMPTY_SLOT], [2, 0, ABSENT_SLOT]], [[0, 1, 1], [1, EMPTY_SLOT, ABSENT_SLOT]]],
        dtype=np.int16,
    )
    return ExpertMap(
        epoch=Epoch(4), num_experts=3, members=(member(0), member(1, 2)), placement=placement
    )


def test_it_counts_replicas_and_names_what_is_not_covered() -> None:
    assert example().replica_counts().tolist() == [[2, 1, 1], [1, 3, 0]]
    assert example().uncovered() == [(1, 2)]


def test_it_knows_incarnations() -> None:
    assert example().incarnation_of(RankId(1)) == 2
    assert example().incarnation_of(RankId(7)) is None
    assert example().has(member(1, 2))
    assert not example().has(member(1, 1))


def test_it_survives_the_wire_and_cannot_be_edited() -> None:
    back = unpack_map(pack_map(example()))
    assert back.members == example().members
    assert back.epoch == 4
    np.testing.assert_array_equal(back.placement, example().placement)
    with pytest.raises(ValueError, match="read-only"):
        back.placement[0, 0, 0] = 1


def test_joiners_survive_the_wire_and_an_old_value_has_none() -> None:
    raw = replace(example(), joiners=(RankId(1),)).to_wire()
    assert ExpertMap.from_wire(raw).joiners == (1,)
    del raw["joiners"]
    assert ExpertMap.from_wire(raw).joiners == ()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 2, 4]},
        {"num_experts": 2},
        {"members": [[1]]},
        {"epoch": None},
        {"joiners": [2]},
        {"joiners": None},
    ],
)
def test_a_malformed_map_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(WireError):
        ExpertMap.from_wire(example().to_wire() | change)


def test_slot_contents_keep_their_shape() -> None:
    slots = np.array([[1, -1], [0, 2]], dtype=np.int16)
    np.testing.assert_array_equal(SlotContents.of(member(0), slots).array(), slots)
