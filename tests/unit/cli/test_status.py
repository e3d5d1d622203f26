"""`starfish status --json` in each state of a rank."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cli.observe.instance_view import InstanceView
from cli.observe.status import describe_links, rank_status, render_status, status_of
from cli.run_dir import Target
from shared.desired_state import AfterDrain, DesiredState, Drain
from shared.etcd_options import EtcdOptions
from shared.expert_map import ExpertMap
from shared.records import RankRecord, Verdict
from shared.types import (
    Epoch,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    Step,
    SuspicionReason,
)
from shared.wire import Load, StatusReply
from tests.unit.control_plane.harness import spec as spec_of

NOW = 1.7e9
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
    status = status_of(TARGET, found, ranks, records, replies, NOW)
    assert status["epoch"] == 2
    assert [each["state"] for each in status["ranks"]] == ["live", "live"]
    assert status["survives"]["rank_failures"] == 1
    assert status["survives"]["node_failures"] == 1
    assert "any 1 rank failure" in status["survives"]["summary"]


def test_without_a_map_nothing_is_promised() -> None:
    status = status_of(TARGET, InstanceView(), [], {}, {}, NOW)
    assert (status["epoch"], status["survives"]) == (0, None)


def drained_view(after: AfterDrain = AfterDrain.STAY) -> InstanceView:
    found = view()
    found.desired = DesiredState(
        change=1, drains=(Drain(rank=RankId(1), requested_at=NOW - 2, grace_s=30, after=after),)
    )
    return found


def whole_status(found: InstanceView, *ranks: int) -> dict[str, Any]:
    ids = [RankId(rank) for rank in ranks]
    records = {r: record for r in ids if (record := found.record_of(r)) is not None}
    replies = {r: reply(r, record.incarnation) for r, record in records.items()}
    return status_of(TARGET, found, ids, records, replies, NOW)


def test_a_member_that_is_drained_says_for_how_long_its_sessions_may_stay() -> None:
    status = whole_status(drained_view(), 0, 1)
    assert [rank["state"] for rank in status["ranks"]] == ["live", "draining"]
    assert not status["ranks"][1]["safe_to_terminate"]
    (step,) = status["change"]["steps"]
    assert step["text"] == "rank 1 has 4 sessions left, which may finish there for 28 s"
    assert status["change"]["in_progress"]


def test_a_rank_that_has_left_the_map_is_drained_and_safe_to_terminate() -> None:
    found = drained_view()
    assert found.expert_map is not None
    (stays,) = [m for m in found.expert_map.members if m.rank == 0]
    found.expert_map = dataclasses.replace(found.expert_map, members=(stays,))
    found.ranks = [*found.ranks, record(1, 3, RankState.STARTING)]
    status = whole_status(found, 0, 1)
    assert [rank["state"] for rank in status["ranks"]] == ["live", "drained"]
    assert [rank["safe_to_terminate"] for rank in status["ranks"]] == [False, True]
    assert not status["change"]["in_progress"]
    console = Console(width=200, file=io.StringIO())
    render_status(status, console)
    assert isinstance(console.file, io.StringIO)
    assert "safe to terminate  rank 1" in console.file.getvalue()


def test_a_death_is_no_change_in_progress() -> None:
    found = view()
    found.spec = spec_of(ranks=3)
    found.verdicts = [verdict(2, 1, SuspicionReason.EXIT)]
    status = whole_status(found, 0, 1, 2)
    assert [step["kind"] for step in status["change"]["steps"]] == ["recover"]
    assert not status["change"]["in_progress"]
    found.verdicts.append(verdict(2, 2, SuspicionReason.DRAINED))
    status = whole_status(found, 0, 1, 2)
    assert [step["kind"] for step in status["change"]["steps"]] == ["join"]
    assert status["change"]["in_progress"]


def verdict(rank: int, incarnation: int, cause: SuspicionReason) -> Verdict:
    return Verdict(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        cause=cause,
        signals=(),
        epoch=Epoch(2),
        first_signal_at=0.0,
        decided_at=0.0,
    )


def test_paused_verdicts_are_said() -> None:
    found = view()
    found.desired = DesiredState(change=1, verdicts_paused=True)
    status = whole_status(found, 0, 1)
    assert status["verdicts_paused"]
    console = Console(width=200, file=io.StringIO())
    render_status(status, console)
    assert isinstance(console.file, io.StringIO)
    assert "verdicts are paused: `starfish resume`" in console.file.getvalue()
