"""What a node agent tells of its ranks, and that each recovery is counted once."""

from __future__ import annotations

import os

from node_agent.metrics import AgentMetrics, RankCollector
from shared.exit_codes import EXIT_FENCED
from shared.handshake import Access
from shared.metrics_endpoint import render_metrics
from shared.types import Epoch, Incarnation, NodeId, RankId, Step
from shared.wire import Adoption, Load, StatusReply
from tests.support.metrics import metric_value

RANK = RankId(3)


def adoption(epoch: int, *, abandoned: bool = True, replayed: bool = True) -> Adoption:
    return Adoption(
        epoch=Epoch(epoch),
        seen_at=1.0,
        adopted_at=1.25,
        replayed_at=1.75 if replayed else 0.0,
        abandoned=abandoned,
    )


def reply(*adoptions: Adoption, incarnation: int = 1) -> StatusReply:
    return StatusReply(
        nonce=1,
        rank=RANK,
        incarnation=Incarnation(incarnation),
        pid=os.getpid(),
        epoch=Epoch(7),
        step=Step(5),
        load=Load(running=2, waiting=1, tokens=9, kv_blocks_free=6, kv_blocks=10),
        engine_age_ms=20.0,
        steps_committed=11,
        steps_abandoned=1,
        tokens_generated=40,
        adoptions=adoptions,
    )


def agent_metrics() -> AgentMetrics:
    return AgentMetrics(NodeId("host-a"), "default", Access("default"))


def text_of(metrics: AgentMetrics) -> str:
    return render_metrics(metrics.registry, "")[0].decode()


def recoveries(metrics: AgentMetrics) -> tuple[float, float, float]:
    """(how many, their adoption, their replay)"""
    text, name = text_of(metrics), "starfish_rank_recovery_seconds"
    return (
        metric_value(text, name + "_count", phase="replay"),
        metric_value(text, name + "_sum", phase="adopt"),
        metric_value(text, name + "_sum", phase="replay"),
    )


def test_a_recovery_is_counted_once_and_when_it_is_over() -> None:
    metrics = agent_metrics()
    joined = adoption(1, abandoned=False)
    metrics.count_recoveries(RANK, reply(joined, adoption(2), adoption(3, replayed=False)))
    metrics.count_recoveries(RANK, reply(joined, adoption(2), adoption(3, replayed=False)))
    assert recoveries(metrics) == (1.0, 0.25, 0.5)
    metrics.count_recoveries(RANK, reply(joined, adoption(2), adoption(3)))
    assert recoveries(metrics) == (2.0, 0.5, 1.0)


def test_the_next_incarnation_counts_anew() -> None:
    metrics = agent_metrics()
    metrics.count_recoveries(RANK, reply(adoption(9)))
    metrics.count_recoveries(RANK, reply(adoption(9), incarnation=2))
    assert recoveries(metrics)[0] == 2.0


def test_a_rank_that_does_not_answer_is_down_and_tells_nothing_else() -> None:
    ranks = RankCollector(NodeId("host-b"))
    ranks.replies = {RANK: reply(), RankId(4): None}
    ranks.pids = {RANK: os.getpid()}
    values = {
        (sample.name, sample.labels["rank"]): sample.value
        for family in ranks.collect()
        for sample in family.samples
    }
    assert values["starfish_rank_up", "3"] == 1
    assert values["starfish_rank_up", "4"] == 0
    assert values["starfish_rank_kv_blocks_used", "3"] == 4
    assert values["starfish_rank_steps_committed_total", "3"] == 11
    assert values["starfish_rank_engine_age_seconds", "3"] == 0.02
    assert values["starfish_rank_resident_bytes", "3"] > 1 << 20
    assert ("starfish_rank_epoch", "4") not in values


def test_exits_are_told_apart() -> None:
    metrics = agent_metrics()
    for code in (-9, EXIT_FENCED, 1, None):
        metrics.on_exit(code)
    text = text_of(metrics)
    for how in ("signal", "fenced", "error", "unknown"):
        assert metric_value(text, "starfish_agent_rank_exits_total", how=how) == 1.0
