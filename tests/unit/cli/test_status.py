"""`starfish status --json` in each state of a rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cli.observe.instance_view import InstanceView
from cli.observe.status import describe_links, rank_status, status_of
from cli.run_dir import Target
from shared.etcd_options import EtcdOptions
from shared.expert_map import ExpertMap
from shared.records import RankRecord
from shared.types import Epoch, Incarnation, Member, NodeId, RankId, RankState, Step
from shared.wire import Load, StatusReply

TARGET = Target(store=EtcdOptions(etcd="e"), instance="t")


def record(rank: int, incarnation: int, state: RankState = RankState.READY) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        node=NodeId(f"node-{rank}"),
        pid=100 + rank,
        lease_id=1,
        state=state,
        control_host="127.0.0.1",
        control_port=7,
        transfer_name="",
        slots=2,
        kv_blocks=8,
        kv_block_tokens=16,
        exchange="transfer",
    )


def reply(rank: int, incarnation: int) -> StatusReply:
    load = Load(
        running=3,
        waiting=1,
        tokens=50,
        kv_blocks_free=5,
        kv_blocks=8,
        kv_blocks_cached=4,
        prefix_tokens=200,
        prefix_tokens_cached=50,
    )
    return StatusReply(
        nonce=1,
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        pid=100 + rank,
        epoch=Epoch(2),
        step=Step(5),
        load=load,
        engine_age_ms=0.5,
        steps_committed=9,
        steps_abandoned=1,
        tokens_generated=40,
        adoptions=(),
    )


def view() -> InstanceView:
    """Two ranks in the map, each with both experts. An older incarnation of rank 0 still has a
    lease."""
    members = tuple(Member(rank=RankId(r), incarnation=Incarnation(2)) for r in (0, 1))
    placement = np.array([[[0, 1], [0, 1]]], dtype=np.int16)
    expert_map = ExpertMap(epoch=Epoch(2), num_experts=2, members=members, placement=placement)
    ranks = [record(0, 1), record(0, 2), record(1, 2)]
    return InstanceView(expert_map=expert_map, ranks=ranks)


def test_a_member_that_answers_is_live() -> None:
    status = rank_status(view(), RankId(0), view().record_of(0), reply(0, 2))
    assert status["state"] == "live"
    assert (status["pid"], status["incarnation"], status["running"]) == (100, 2, 3)
    assert (status["kv_blocks_used"], status["slots_filled"]) == (3, 2)
    cached = ("kv_blocks_cached", "prefix_tokens", "prefix_tokens_cached")
    assert [status[key] for key in cached] == [4, 200, 50]


@pytest.mark.parametrize(
    ("memory", "network", "shown"), [(2, 0, "2 memory"), (1, 2, "1 memory, 2 network"), (0, 0, "0")]
)
def test_links_of_each_kind_are_counted(memory: int, network: int, shown: str) -> None:
    peers = [Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(1, 4)]
    links = tuple(peers[: memory + network])
    gone = Member(rank=RankId(9), incarnation=Incarnation(1))
    status = rank_status(
        view(),
        RankId(0),
        replace(record(0, 2), links=links),
        replace(reply(0, 2), memory_links=(*peers[:memory], gone)),
    )
    assert describe_links(status) == shown


def test_a_member_that_does_not_answer_is_silent() -> None:
    status = rank_status(view(), RankId(0), view().record_of(0), None)
    assert (status["state"], status["answers"]) == ("silent", False)
    assert "running" not in status


@pytest.mark.parametrize("state", list(RankState))
def test_who_is_not_in_the_map_is_what_its_record_says(state: RankState) -> None:
    status = rank_status(view(), RankId(1), record(1, 3, state), reply(1, 3))
    assert status["state"] == state.value


def test_a_rank_without_a_record_is_dead() -> None:
    assert rank_status(view(), RankId(3), None, None)["state"] == "dead"


def test_the_map_decides_which_incarnation_counts() -> None:
    found = view()
    found.ranks.append(record(0, 3, RankState.STARTING))
    chosen = found.record_of(0)
    assert chosen is not None
    assert chosen.incarnation == 2


def test_the_whole_status_says_what_the_map_survives() -> None:
    found = view()
    ranks = [RankId(0), RankId(1)]
    records = {r: found.ranks[r + 1] for r in ranks}
    replies = {r: reply(r, 2) for r in ranks}
    status = status_of(TARGET, found, ranks, records, replies)
    assert status["epoch"] == 2
    assert [each["state"] for each in status["ranks"]] == ["live", "live"]
    assert status["survives"]["rank_failures"] == 1
    assert status["survives"]["node_failures"] == 1
    assert "any 1 rank failure" in status["survives"]["summary"]


def test_without_a_map_nothing_is_promised() -> None:
    status = status_of(TARGET, InstanceView(), [], {}, {})
    assert (status["epoch"], status["survives"]) == (0, None)
