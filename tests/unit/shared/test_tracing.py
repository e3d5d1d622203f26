"""Traces without OpenTelemetry's SDK."""

from __future__ import annotations

import sys

import pytest

from shared.clock import SystemClock
from shared.errors import ConfigError
from shared.tracing import open_tracer


def test_without_the_sdk_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'starfish-moe\[otel\]'"):
        open_tracer("http://localhost:4318", SystemClock(), service="x", attributes={})
