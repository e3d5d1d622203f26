"""What a control plane tells of etcd's own state."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from control_plane.etcd_health_watch import EtcdHealthWatch
from control_plane.telemetry import Metrics
from shared.etcd_health import EtcdHealth, describe_alarm


class Silent:
    async def health(self) -> EtcdHealth:
        raise AssertionError


def health(*alarms: str) -> EtcdHealth:
    return EtcdHealth(alarms=alarms, version="3.5.1", size_bytes=4096)


def alarm(metrics: Metrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("starfish_etcd_alarm", {"kind": kind})


def test_an_alarm_is_shown_while_it_lasts_and_logged_once() -> None:
    metrics = Metrics()
    watch = EtcdHealthWatch(Silent(), metrics)
    watch.on_health(health())
    assert alarm(metrics, "NOSPACE") == 0
    assert metrics.registry.get_sample_value("starfish_etcd_size_bytes") == 4096
    with capture_logs() as logs:
        watch.on_health(health("NOSPACE"))
        watch.on_health(health("NOSPACE"))
    assert [entry["event"] for entry in logs] == ["etcd_alarm"]
    assert watch.alarms == ("NOSPACE",)
    assert (alarm(metrics, "NOSPACE"), alarm(metrics, "CORRUPT")) == (1, 0)
    with capture_logs() as logs:
        watch.on_health(health())
    assert [entry["event"] for entry in logs] == ["etcd_alarm_over"]
    assert alarm(metrics, "NOSPACE") == 0


@pytest.mark.parametrize("kind", ["NOSPACE", "CORRUPT"])
def test_an_alarm_says_what_goes_on_and_what_does_not(kind: str) -> None:
    assert "serving goes on" in describe_alarm(kind)


def test_an_unknown_alarm_is_named() -> None:
    assert "7" in describe_alarm("7")
