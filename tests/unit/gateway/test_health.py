"""What /health says of a gateway that cannot serve yet: the truth, and what is being waited for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway.cluster_view import ClusterView
from gateway.health import Health
from gateway.model_loader import ModelLoader
from shared.types import Member, RankState
from tests.support.fake_clock import FakeClock
from tests.support.gateway_harness import toy_spec
from tests.support.toy_rank import ToyRank

READ = ClusterView(is_read=True)


class Driver:
    def __init__(self) -> None:
        self.view = ClusterView()
        self.live: list[Member] = []

    def live_ranks(self) -> list[Member]:
        return self.live


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def health(driver: Driver) -> Health:
    return Health(driver, ModelLoader(folder=None, name="", clock=FakeClock()))  # type: ignore[arg-type]


def test_before_etcd_is_read_nothing_is_said_to_be_missing(health: Health) -> None:
    assert health.reasons_not_ready() == ["this gateway has just started and has not read etcd yet"]


def test_an_instance_without_a_spec_has_none(driver: Driver, health: Health) -> None:
    driver.view = READ
    assert health.reasons_not_ready()[0] == "the control plane has written no spec yet"


def test_a_map_to_come_is_waited_for_with_the_ranks_that_are_there(
    driver: Driver, health: Health, tmp_path: Path
) -> None:
    ready = replace(ToyRank(1).record(), state=RankState.READY)
    starting = replace(ToyRank(0).record(), state=RankState.STARTING)
    ranks = {"a": starting, "b": ready}
    driver.view = replace(READ, spec=toy_spec(tmp_path, num_ranks=4), ranks=ranks)
    assert health.reasons_not_ready() == [
        "the tokenizer is loading",
        "no expert map is published yet: 2 of 4 ranks are registered, 1 of them ready",
    ]
    driver.view = replace(driver.view, members=(ready.member,))
    assert "none of the 1 ranks of the map is connected" in health.reasons_not_ready()[1]
    driver.live = [ready.member]
    assert health.reasons_not_ready() == ["the tokenizer is loading"]
