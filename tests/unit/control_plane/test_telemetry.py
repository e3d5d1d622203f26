"""The metrics of a control plane: what the present map survives, and recoveries by phase."""

from __future__ import annotations

import numpy as np

from control_plane.cluster_state import ClusterState
from control_plane.control_reporter import ControlReporter
from control_plane.telemetry import Metrics
from control_plane.writes import PublishMap
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.metrics_endpoint import render_metrics
from shared.records import Verdict
from shared.types import Epoch, Incarnation, Member, RankId, SuspicionReason
from tests.support.metrics import metric_value

MEMBERS = tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in range(3))


def expert_map(
    epoch: int, rows: list[list[int]], cause: str = "formed by 3 of 3 ranks"
) -> ExpertMap:
    """One layer of two experts; a row for each rank."""
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=2,
        members=MEMBERS,
        placement=np.array([rows], dtype=np.int16),
        cause=cause,
        published_at=10.0,
    )


def text_of(metrics: Metrics) -> str:
    return render_metrics(metrics.registry, "")[0].decode()


async def test_what_the_map_survives_follows_the_map() -> None:
    metrics = Metrics()

    async def survives(placed: ExpertMap | None) -> tuple[float, float]:
        metrics.tolerance.on_state(placed, {})
        await metrics.tolerance.update()
        text = text_of(metrics)
        return (
            metric_value(text, "starfish_survivable_rank_failures"),
            metric_value(text, "starfish_experts_on_one_rank"),
        )

    assert await survives(None) == (0.0, 0.0)
    assert await survives(expert_map(1, [[0, 1], [0, 1], [0, 1]])) == (2.0, 0.0)
    assert await survives(expert_map(2, [[0, -1], [0, 1], [0, -1]])) == (0.0, 1.0)


def test_a_recovery_is_told_by_phase_and_the_map_by_its_cause() -> None:
    metrics = Metrics()
    reporter = ControlReporter(metrics)
    verdict = Verdict(
        rank=RankId(1),
        incarnation=Incarnation(1),
        cause=SuspicionReason.EXIT,
        signals=(),
        epoch=Epoch(2),
        first_signal_at=9.0,
        decided_at=9.5,
    )
    reporter.report_judgements([verdict])
    published = expert_map(2, [[0, 1], [0, 1], [0, 1]], cause="dead: 1.1 (exit)")
    write = PublishMap(expert_map=published, verdicts=(verdict,), assignments=())
    reporter.report_write(write, None, ClusterState(keys=Keys()), now=10.25)
    text = text_of(metrics)
    assert metric_value(text, "starfish_recovery_seconds_sum", phase="verdict") == 0.5
    assert metric_value(text, "starfish_recovery_seconds_sum", phase="publish") == 0.75
    assert metric_value(text, "starfish_publish_seconds_sum") == 0.25
    assert metric_value(text, "starfish_maps_total", cause="dead") == 1.0
    assert metric_value(text, "starfish_verdicts_total", cause="exit") == 1.0


def test_openmetrics_if_asked_for() -> None:
    body, content_type = render_metrics(Metrics().registry, "application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    body, content_type = render_metrics(Metrics().registry, "")
    assert content_type.startswith("text/plain")
    assert b"# EOF" not in body
