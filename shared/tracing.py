"""Traces for OpenTelemetry: spans that one process makes, sent over OTLP. The SDK is needed by who
turns traces on alone, so it is imported here, when a tracer is opened."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.clock import Clock
from shared.errors import ConfigError
from shared.types import TRACEPARENT_PATTERN
from shared.version import starfish_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

Attributes = Mapping[str, str | bool | int | float]

SIGNAL_PATH = "/v1/traces"
FLUSH_MS = 1000
_TRACEPARENT = re.compile(TRACEPARENT_PATTERN)
_NO_SDK = "--otlp-endpoint needs OpenTelemetry's SDK: pip install 'starfish-moe[otel]'"


class TraceSpan:
    """Made by `Tracer.start`. A time `at` is in the seconds of the clock; None is now."""

    def __init__(self, span: Span, clock: Clock) -> None:
        self._span = span
        self._clock = clock

    @property
    def traceparent(self) -> str:
        """W3C's, to pass on: who makes a span with it as its parent makes a child of this one."""
        found = self._span.get_span_context()
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def event(self, name: str, attributes: Attributes, *, at: float | None = None) -> None:
        self._span.add_event(name, attributes, timestamp=_unix_ns(self._clock, at))

    def describe(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, *, error: str | None = None) -> None:
        """`error` says why what it is about failed."""
        if error is not None:
            trace = importlib.import_module("opentelemetry.trace")
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(_unix_ns(self._clock, None))


class Tracer:
    """`exporter` gets the spans that have ended, in batches and on a thread of its own. Which
    requests are traced, their `traceparent` says, else the SDK's own environment variables."""

    def __init__(
        self, exporter: SpanExporter, clock: Clock, *, service: str, attributes: Attributes
    ) -> None:
        """Raises ConfigError if the SDK is not installed."""
        sdk, export = _sdk("opentelemetry.sdk.trace"), _sdk("opentelemetry.sdk.trace.export")
        resource = _sdk("opentelemetry.sdk.resources").Resource.create(
            {"service.name": service, "service.version": starfish_version(), **attributes}
        )
        self._clock = clock
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("starfish")
        self._kinds = _sdk("opentelemetry.trace").SpanKind
        self._propagator = _sdk(
            "opentelemetry.trace.propagation.tracecontext"
        ).TraceContextTextMapPropagator()

    def start(
        self, name: str, attributes: Attributes, *, parent: str = "", at: float | None = None
    ) -> TraceSpan:
        """The span of something that another process asked for. `parent` is the `traceparent` that
        came with it; a malformed one counts as none."""
        carrier = {"traceparent": parent} if _TRACEPARENT.fullmatch(parent) else {}
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._kinds.SERVER,
            attributes=attributes,
            start_time=_unix_ns(self._clock, at),
        )
        return TraceSpan(span, self._clock)

    def flush(self) -> None:
        """Blocks until what has ended is sent, but not for long."""
        self._provider.force_flush(FLUSH_MS)

    def close(self) -> None:
        """Sends what has ended, and sends nothing more."""
        self.flush()
        self._provider.shutdown()


def open_tracer(
    endpoint: str, clock: Clock, *, service: str, attributes: Attributes
) -> Tracer | None:
    """None without an endpoint. `endpoint` is that of an OTLP collector over HTTP, such as
    http://collector:4318. Raises ConfigError."""
    if not endpoint:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-endpoint {endpoint!r}: pass http://HOST:4318 of a collector")
    module = _sdk("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    url = endpoint.rstrip("/")
    exporter = module.OTLPSpanExporter(
        endpoint=url if url.endswith(SIGNAL_PATH) else url + SIGNAL_PATH
    )
    return Tracer(exporter, clock, service=service, attributes=attributes)


def _sdk(module: str) -> Any:
    """Raises ConfigError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(_NO_SDK) from error


def _unix_ns(clock: Clock, at: float | None) -> int:
    ago_s = 0.0 if at is None else clock.now() - at
    return int((clock.wall() - ago_s) * 1e9)
