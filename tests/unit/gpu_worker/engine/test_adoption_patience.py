"""Until when a planned map waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_worker.engine.adoption_patience import ADOPTION_PATIENCE_S, AdoptionPatience
from shared.expert_map import ExpertMap
from shared.types import Incarnation, Member, RankId
from tests.support.gateway_harness import toy_map

ME = Member(rank=RankId(0), incarnation=Incarnation(1))
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))

NOW = 100.0
UNTIL = NOW + ADOPTION_PATIENCE_S


def planned(epoch: int, *members: Member) -> ExpertMap:
    return replace(toy_map(epoch, members or (ME, PEER)), is_planned=True)


@pytest.fixture
def patience() -> AdoptionPatience:
    patience = AdoptionPatience(ME)
    first = toy_map(1, (ME, PEER))
    assert patience.until(first, set(), NOW) == 0.0
    patience.on_adopted(first)
    return patience


def test_only_a_planned_map_after_another_one_waits(patience: AdoptionPatience) -> None:
    assert AdoptionPatience(ME).until(planned(1), set(), NOW) == 0.0
    assert patience.until(planned(2), set(), NOW) == UNTIL
    assert patience.until(toy_map(3, (ME,)), set(), NOW) == 0.0


def test_who_leaves_waits_longer_than_the_others(patience: AdoptionPatience) -> None:
    assert patience.until(planned(2, PEER), set(), NOW) == NOW + 2 * ADOPTION_PATIENCE_S


def test_nothing_waits_if_a_link_of_the_running_map_is_broken(patience: AdoptionPatience) -> None:
    """Also to one that the next map leaves out."""
    stranger = Member(rank=RankId(7), incarnation=PEER.incarnation)
    assert patience.until(planned(2, ME), {stranger}, NOW) == UNTIL
    patience.on_adopted(planned(2))
    assert patience.until(planned(3, ME), {PEER}, NOW) == 0.0
    assert patience.steps_with(PEER)
    assert not patience.steps_with(stranger)


def test_maps_that_follow_one_another_do_not_prolong_the_wait(patience: AdoptionPatience) -> None:
    patience.until(planned(2), set(), NOW)
    assert patience.until(planned(3), set(), NOW + 0.2) == UNTIL
    patience.until(toy_map(4, (ME, PEER)), set(), NOW + 0.3)
    assert patience.until(planned(5), set(), NOW + 0.4) == 0.0
    patience.on_adopted(planned(5))
    assert patience.until(planned(6), set(), NOW + 0.5) == NOW + 0.5 + ADOPTION_PATIENCE_S
