"""When `bench serve` says that the gateway limits, and what it reads."""

from __future__ import annotations

from cli.bench.gateway_cpu import busiest_share, cpu_seconds_of, limit_warning
from gateway.metrics import GatewayMetrics


def test_it_reads_what_a_gateway_writes() -> None:
    metrics = GatewayMetrics()
    metrics.add_counter("event_loop_cpu_seconds", "x", lambda: 12.5, gateway="gateway-h.1")
    assert cpu_seconds_of(metrics.render("")[0].decode()) == {"gateway-h.1": 12.5}
    assert cpu_seconds_of("starfish_gateway_epoch 3.0\n") == {}


def test_the_busiest_of_those_that_were_met_twice() -> None:
    before, after = {"a": 1.0, "b": 4.0, "gone": 9.0}, {"a": 1.5, "b": 5.9, "new": 3.0}
    share = busiest_share(before, after, 2.0)
    assert share is not None
    assert round(share, 6) == 0.95
    assert busiest_share({"gone": 1.0}, {"new": 1.0}, 2.0) is None


def test_it_warns_from_nine_tenths_of_a_core() -> None:
    assert limit_warning({1: 0.2, 8: 0.899, 32: None}) is None
    said = limit_warning({8: 0.5, 128: 0.9, 512: 0.997})
    assert said is not None
    assert "concurrency 128 (90% of a core), 512 (100% of a core)" in said
    assert "--gateways" in said
