"""The metrics under vLLM's names: of which rank, of which phase, and how many series at most."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gateway.metrics import GatewayMetrics
from gateway.rank_histogram import OTHER_RANKS, RANK_LABELS_MAX, RankHistogram
from gateway.stream_session import SessionPolicy, StreamSession
from gateway.vllm_metrics import RankGauges, gauges_of
from shared.types import (
    Attempt,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SessionId,
)
from shared.wire import Load, SessionTokens
from tests.support.metrics import metric_value, series_names

# What vLLM's own dashboards and the usual autoscalers read.
READ_BY_DASHBOARDS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    *(
        f"vllm:{name}_bucket"
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
            "request_params_max_tokens",
        )
    ),
}


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def session(prompt: tuple[int, ...] = (7, 8, 9)) -> StreamSession:
    return StreamSession(
        session=SessionId("g/1"),
        prompt=prompt,
        sampling=SamplingParams(max_tokens=3),
        policy=SessionPolicy(),
        now=10.0,
    )


def tokens(index: int, *ids: int, attempt: int = 0, queued_ms: float = 0.0) -> SessionTokens:
    return SessionTokens(
        session=SessionId("g/1"),
        attempt=Attempt(attempt),
        index=index,
        ids=ids,
        queued_ms=queued_ms,
        finish=FinishReason.LENGTH if index + len(ids) == 3 else None,
    )


def rendered(metrics: GatewayMetrics) -> str:
    return metrics.render("")[0].decode()


def test_every_name_that_dashboards_read_is_there() -> None:
    assert series_names(rendered(GatewayMetrics())) >= READ_BY_DASHBOARDS


def test_all_series_of_a_rank_begin_with_it() -> None:
    metrics = GatewayMetrics()
    metrics.vllm.sources = replace(
        metrics.vllm.sources,
        model_name=lambda: "m",
        ranks=lambda: {3: RankGauges(running=0, waiting=0, kv_usage=0.0)},
    )
    text = rendered(metrics)
    for name in READ_BY_DASHBOARDS:
        assert metric_value(text, name, engine="3", model_name="m") == 0.0, name
    for reason in ("stop", "length", "abort", "error"):
        assert metric_value(text, "vllm:request_success_total", finished_reason=reason) == 0.0


# The boundaries of vLLM 0.33: rules for alerts and objectives name them.
BOUNDARIES = {
    "time_to_first_token_seconds": """0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0
        2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0""",
    "inter_token_latency_seconds": """0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5
        5.0 7.5 10.0 20.0 40.0 80.0""",
    "e2e_request_latency_seconds": """0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0
        60.0 120.0 240.0 480.0 960.0 1920.0 7680.0""",
    "request_prompt_tokens": "1.0 2.0 5.0 10.0 20.0 50.0 100.0 1000.0 200000.0",
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_histograms_have_the_boundaries_that_rules_for_vllm_name(name: str) -> None:
    metrics, streamed = GatewayMetrics(), session()
    streamed.place(member(1), 10.5)
    streamed.on_tokens(member(1), tokens(0, 4), 11.0)
    streamed.on_tokens(member(1), tokens(1, 5), 11.5)
    metrics.on_tokens(streamed)
    metrics.on_session_end(streamed)
    found = set(re.findall(rf'vllm:{name}_bucket{{.*le="([^"]+)"', rendered(metrics)))
    assert found >= set(BOUNDARIES[name].split())


def test_the_phases_of_a_session_add_up() -> None:
    metrics, streamed = GatewayMetrics(), session()
    streamed.place(member(1), 10.5)
    streamed.on_tokens(member(1), tokens(0, 4, queued_ms=250.0), 11.0)
    streamed.on_tokens(member(1), tokens(1, 5), 11.5)
    metrics.on_tokens(streamed)
    streamed.on_tokens(member(1), tokens(2, 6), 12.5)
    metrics.on_session_end(streamed)
    text = rendered(metrics)

    def seconds(name: str) -> float:
        return metric_value(text, f"vllm:{name}_sum", engine="1")

    assert seconds("request_queue_time_seconds") == 0.75
    assert seconds("request_prefill_time_seconds") == 0.25
    assert seconds("time_to_first_token_seconds") == 1.0
    assert seconds("request_decode_time_seconds") == 1.5
    assert seconds("request_inference_time_seconds") == 1.75
    assert seconds("e2e_request_latency_seconds") == 2.5
    assert seconds("request_time_per_output_token_seconds") == 0.75
    assert seconds("inter_token_latency_seconds") == 0.5
    assert metric_value(text, "starfish_gateway_inter_token_seconds_sum") == 0.5
    assert metric_value(text, "vllm:request_success_total", finished_reason="length") == 1.0


def test_a_session_that_goes_on_elsewhere_says_how_long_that_took() -> None:
    metrics, streamed = GatewayMetrics(), session()
    streamed.place(member(1), 10.0)
    streamed.on_tokens(member(1), tokens(0, 4), 11.0)
    streamed.on_rank_lost(member(1), 11.25)
    streamed.place(member(2), 11.25)
    streamed.on_tokens(member(2), tokens(1, 5, 6, attempt=1), 11.75)
    metrics.on_session_end(streamed)
    text = rendered(metrics)
    assert metric_value(text, "starfish_gateway_sessions_resumed_total", on_copy="false") == 1.0
    assert metric_value(text, "starfish_gateway_resume_seconds_sum") == 0.5


def test_a_session_waits_only_if_its_rank_says_that_some_do() -> None:
    begun, unbegun = session(), session()
    for each in (begun, unbegun):
        each.place(member(1), 10.0)
    begun.on_tokens(member(1), tokens(0, 4), 11.0)

    def of(waiting: int) -> tuple[int, int]:
        load = Load(running=1, waiting=waiting, tokens=9, kv_blocks_free=3, kv_blocks=4)
        gauges = gauges_of(load, [begun, unbegun])
        assert gauges.kv_usage == 0.25
        return gauges.running, gauges.waiting

    assert of(0) == (2, 0)
    assert of(1) == (1, 1)
    assert of(5) == (1, 1)  # of other gateways


def test_a_thousand_ranks_make_no_more_series_than_some() -> None:
    histogram = RankHistogram((1.0, 2.0))
    for rank in range(1000):
        histogram.observe(rank, 1.5)
    family = histogram.family("x", "y", label="engine", others={"model_name": "m"})
    counts = {
        sample.labels["engine"]: sample.value
        for sample in family.samples
        if sample.name == "x_count"
    }
    assert len(counts) == RANK_LABELS_MAX + 1
    assert counts[OTHER_RANKS] == 1000 - RANK_LABELS_MAX
    assert sum(counts.values()) == 1000
    total = histogram.sum_family("x", "y")
    assert [s.value for s in total.samples] == [0.0, 1000.0, 1000.0, 1000.0, 1500.0]
