"""What /health says of a gateway that cannot serve yet: the truth, and what is being waited for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway.cluster_view import ClusterView
from gateway.health import Health
from gateway.model_loader import ModelLoader
from shared.desired_state import DesiredRank, DesiredState, Drain
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, RankState
from tests.support.fake_clock import FakeClock
from tests.support.gateway_harness import toy_spec
from tests.support.toy_rank import ToyRank

READ = ClusterView(is_read=True)


class Driver:
    def __init__(self) -> None:
        self.view = ClusterView()
        self.live: list[Member] = []
        self.lost: dict[Member, float] = {}
        self.stalled: dict[Member, float] = {}
        self.draining: frozenset[Member] = frozenset()

    def draining_ranks(self) -> frozenset[Member]:
        return self.draining

    def live_ranks(self) -> list[Member]:
        return self.live

    def lost_ranks(self) -> dict[Member, float]:
        return self.lost

    def stalled_ranks(self, after_s: float) -> dict[Member, float]:
        return self.stalled


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def health(driver: Driver, clock: FakeClock) -> Health:
    return Health(driver, ModelLoader(folder=None, name="", clock=clock), clock)  # type: ignore[arg-type]


def serving(driver: Driver, tmp_path: Path) -> tuple[Member, Member]:
    """Two ranks in a map: expert 0 on both, expert 1 on rank 1 alone."""
    members = ToyRank(0).member, ToyRank(1).member
    placement = np.array([[[0, -1], [0, 1]]], dtype=np.int16)
    expert_map = ExpertMap(epoch=Epoch(1), num_experts=2, members=members, placement=placement)
    driver.view = replace(READ, spec=toy_spec(tmp_path)).with_map(expert_map)
    driver.live = list(members)
    return members


def of_model(health: Health) -> list[str]:
    """The reasons, without that of the tokenizer, which these tests do not load."""
    return [reason for reason in health.reasons_not_ready() if "tokenizer" not in reason]


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


def test_a_lost_rank_whose_experts_have_other_replicas_is_a_recovery(
    driver: Driver, health: Health, clock: FakeClock, tmp_path: Path
) -> None:
    first, second = serving(driver, tmp_path)
    driver.live, driver.lost = [second], {first: clock.now()}
    clock.advance(0.2)
    assert of_model(health) == []
    report = health.report()
    assert (report["state"], report["since_s"], report["lost_ranks"]) == ("recovering", 0.2, [0])


def test_an_expert_without_a_replica_is_not_ready_at_once(
    driver: Driver, health: Health, clock: FakeClock, tmp_path: Path
) -> None:
    first, second = serving(driver, tmp_path)
    driver.live, driver.lost = [first], {second: clock.now()}
    assert "1 experts have no replica on a live rank" in of_model(health)[0]


def test_a_recovery_that_does_not_end_is_not_ready(
    driver: Driver, health: Health, clock: FakeClock, tmp_path: Path
) -> None:
    first, second = serving(driver, tmp_path)
    driver.live, driver.lost = [second], {first: clock.now()}
    clock.advance(4)
    assert of_model(health) == [
        "recovering for 4 s: no map without rank 0 is published yet; is a control plane running?"
    ]


def test_ranks_that_stand_still_are_not_ready(
    driver: Driver, health: Health, clock: FakeClock, tmp_path: Path
) -> None:
    first, _ = serving(driver, tmp_path)
    driver.stalled = {first: clock.now()}
    clock.advance(5)
    assert of_model(health) == ["rank 0 has finished no step for 5 s"]


def test_ranks_that_join_are_said(driver: Driver, health: Health, tmp_path: Path) -> None:
    serving(driver, tmp_path)
    newcomer = ToyRank(2).record()
    driver.view = replace(driver.view, ranks={"a": newcomer})
    assert health.report()["joining_ranks"] == [2]


def test_ranks_that_are_drained_are_said_and_are_no_newcomers_afterwards(
    driver: Driver, health: Health, tmp_path: Path
) -> None:
    first, _ = serving(driver, tmp_path)
    driver.draining = frozenset({first})
    report = health.report()
    assert report["draining_ranks"] == [0]
    drained = replace(driver.view, ranks={"a": ToyRank(2).record()})
    desired = DesiredState(drains=(Drain(rank=RankId(2)),))
    driver.view, driver.draining = replace(drained, desired=desired), frozenset()
    report = health.report()
    assert (report["joining_ranks"], report["draining_ranks"]) == ([], [])


def test_a_rank_that_is_desired_no_more_is_not_missed(
    driver: Driver, health: Health, tmp_path: Path
) -> None:
    serving(driver, tmp_path)
    ranks = tuple(DesiredRank(rank=RankId(rank)) for rank in (0, 1, 3))
    driver.view = replace(driver.view, desired=DesiredState(ranks=ranks))
    assert health.report()["missing_ranks"] == [3]


def test_ranks_that_are_gone_from_the_map_are_said_until_they_register(
    driver: Driver, health: Health, tmp_path: Path
) -> None:
    """Else an instance with half of its ranks would look like a whole one."""
    assert health.report()["missing_ranks"] == []
    serving(driver, tmp_path)
    spec = driver.view.spec
    assert spec is not None
    driver.view = replace(driver.view, spec=replace(spec, num_ranks=4))
    assert health.report()["missing_ranks"] == [2, 3]
    driver.view = replace(driver.view, ranks={"a": ToyRank(2).record()})
    assert health.report()["missing_ranks"] == [3]


def test_a_gateway_that_never_had_a_link_says_the_same_as_one_whose_link_broke(
    driver: Driver, health: Health, clock: FakeClock, tmp_path: Path
) -> None:
    """Such as the successor of one that was killed together with its ranks."""
    first, second = serving(driver, tmp_path)
    driver.view = replace(driver.view, ranks={"a": ToyRank(0).record()})
    driver.live = [first]
    driver.lost = {second: clock.now()}
    had_it = health.report()
    driver.lost = {}
    assert health.report() == had_it
    assert (had_it["state"], had_it["lost_ranks"]) == ("recovering", [1])
    clock.advance(4)
    assert health.report()["since_s"] == 4
    driver.live = [first, second]  # its lease alone is gone: it serves
    assert (health.report()["lost_ranks"], of_model(health)) == ([], [])
