"""A gateway's Prometheus metrics. One registry per gateway; no globals."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway.connection_table import Refusal
from gateway.stream_session import FailureKind, SessionState, StreamSession
from shared.types import SuspicionReason

_PREFIX = "starfish_gateway_"
KEY_LABELS_MAX = 256
OTHER_KEYS = "(other)"
_FINE_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_COARSE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """Its methods are called on the event loop."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests answered", "endpoint", "status")
        self._refused = self._counter(
            "connections_refused", "Connections refused because there are too many", "reason"
        )
        self._timed_out = self._counter(
            "connection_timeouts", "Connections closed because their client sent nothing whole"
        )
        self._sessions = self._counter("sessions", "Sessions that ended", "outcome")
        self._unauthenticated = self._counter("unauthenticated", "Requests without a valid API key")
        self._key_requests = self._counter(
            "key_requests",
            "Answers to requests that generate or tokenise, by API key",
            "key",
            "status",
        )
        self._key_prompt = self._counter(
            "key_prompt_tokens", "Prompt tokens of requests, by API key", "key"
        )
        self._key_generated = self._counter(
            "key_generated_tokens", "Tokens generated for requests, by API key", "key"
        )
        self._keys_shown: set[str] = set()
        self._resumed = self._counter(
            "sessions_resumed",
            "Sessions of streams that were resumed: their rank had kept their tokens, or not",
            "tokens",
        )
        self._moves = self._counter("session_moves", "Placements after a session's first one")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, counted as requests begin")
        self._cached = self._counter(
            "cached_prompt_tokens",
            "Prompt tokens of ended sessions that were in a rank's KV cache",
        )
        self._suspicions = self._counter("suspicions", "Suspicions raised on ranks", "reason")
        self._ttft = self._histogram("time_to_first_token", "From admission on", _COARSE_S)
        self._itl = FrequentHistogram(
            _PREFIX + "inter_token_seconds", "Between two batches of a stream", _FINE_S
        )
        self._registry.register(self._itl)
        self._e2e = self._histogram("request", "From admission to a session's last token", _LONG_S)
        self._gap = self._histogram(
            "longest_gap", "The longest time between two tokens of a stream", _FINE_S
        )

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a gauge whose value is read when the metrics are rendered."""
        Gauge(_PREFIX + name, text, registry=self._registry).set_function(read)

    def add_counter(self, name: str, text: str, read: Callable[[], float], **labels: str) -> None:
        """Adds a counter whose value is read when the metrics are rendered."""
        self._registry.register(ReadCounter(_PREFIX + name, text, read, labels))

    def on_session_begin(self, num_prompt_tokens: int) -> None:
        self._prompt.inc(num_prompt_tokens)

    def on_request(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()

    def on_unauthenticated(self) -> None:
        self._unauthenticated.inc()

    def on_key_request(
        self, key: str, status: int, *, num_prompt_tokens: int, num_generated: int
    ) -> None:
        """Names beyond the first KEY_LABELS_MAX share one label: keys may come and go for ever."""
        if key not in self._keys_shown and len(self._keys_shown) >= KEY_LABELS_MAX:
            key = OTHER_KEYS
        self._keys_shown.add(key)
        self._key_requests.labels(key, str(status)).inc()
        self._key_prompt.labels(key).inc(num_prompt_tokens)
        self._key_generated.labels(key).inc(num_generated)

    def on_connection_refused(self, refusal: Refusal) -> None:
        self._refused.labels(refusal.value).inc()

    def on_connection_timeout(self) -> None:
        self._timed_out.inc()

    def on_suspicion(self, reason: SuspicionReason) -> None:
        self._suspicions.labels(reason.value).inc()

    def on_tokens(self, session: StreamSession) -> None:
        """A session that has not ended got tokens."""
        if session.last_gap_s:
            self._itl.observe(session.last_gap_s)

    def on_session_end(self, session: StreamSession) -> None:
        failure = session.failure.kind if session.failure else None
        self._sessions.labels(_outcome(session.state, failure)).inc()
        self._moves.inc(session.moves)
        if session.home_rank is not None:
            self._resumed.labels("kept" if session.taken_over else "computed_again").inc()
        self._cached.inc(session.cached_tokens)
        if session.first_token_at is not None:
            self._ttft.observe(session.first_token_at - session.opened_at)
            self._e2e.observe(session.last_token_at - session.opened_at)
        if len(session.emitted) > 1:
            self._gap.observe(session.longest_gap_s)

    def render(self, accept: str) -> tuple[bytes, str]:
        """(the metrics, their content type): OpenMetrics if the Accept header asks for it, else
        Prometheus' text format."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            _PREFIX + name + "_seconds", text, buckets=buckets, registry=self._registry
        )


class ReadCounter(Collector):
    """A counter that is kept elsewhere."""

    def __init__(
        self, name: str, text: str, read: Callable[[], float], labels: Mapping[str, str]
    ) -> None:
        self._name = name
        self._text = text
        self._read = read
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._text, labels=list(self._labels))]

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self._read())
        yield family


class FrequentHistogram(Collector):
    """A histogram for what happens at every token: an observation is one addition, without the
    library's lock and checks. For one thread; the exposition is the library's."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)  # not cumulative; the last is +Inf
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


def _outcome(state: SessionState, failure: FailureKind | None) -> str:
    return state.value if failure is None else f"failed_{failure.value}"
