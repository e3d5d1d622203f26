"""A gateway's Prometheus metrics. One registry per gateway; no globals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.rank_histogram import RankHistogram
from gateway.session_state import FailureKind, SessionState
from gateway.stream_session import StreamSession
from gateway.vllm_metrics import VllmMetrics
from shared.connection_table import Refusal
from shared.metrics_endpoint import render_metrics
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
            "connections_refused",
            "Connections refused, or closed to make room for one (displaced): there are too many",
            "reason",
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
        self._streams_resumed = self._counter(
            "streams_resumed",
            "Streams that a client resumed here: their rank had kept their tokens, or not",
            "tokens",
        )
        self._moves = self._counter("session_moves", "Placements after a session's first one")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, counted as requests begin")
        self._cached = self._counter(
            "cached_prompt_tokens",
            "Prompt tokens of ended sessions that were in a rank's KV cache",
        )
        self._suspicions = self._counter("suspicions", "Suspicions raised on ranks", "reason")
        self._detect = self._histogram(
            "detect", "From a rank's last message to this gateway's suspicion on it", _FINE_S
        )
        self._ttft = self._histogram(
            "time_to_first_token", "From admission on", _COARSE_S, "endpoint"
        )
        self._e2e = self._histogram(
            "request", "From admission to a session's last token", _LONG_S, "endpoint"
        )
        self._gap = self._histogram(
            "longest_gap", "The longest time between two tokens of a stream", _FINE_S
        )
        self._resumed = self._counter(
            "sessions_resumed",
            "Times that a session went on after its rank was lost; on_copy: on the rank that had "
            "its KV replicas",
            "on_copy",
        )
        self._resume = self._histogram(
            "resume", "From the loss of a session's rank to its next token", _FINE_S
        )
        self.vllm = VllmMetrics()
        self._registry.register(self.vllm)
        self._observe_gap = self.vllm.inter_token.observe
        self.inter_token = TotalHistogram(
            _PREFIX + "inter_token_seconds",
            "Between two batches of a stream",
            self.vllm.inter_token,
        )
        self._registry.register(self.inter_token)
        self._begin_series()

    def _begin_series(self) -> None:
        """From 0 on: a series that begins with 1 has not increased for who watches it."""
        for state in (SessionState.FINISHED, SessionState.CANCELLED):
            self._sessions.labels(_outcome(state, None))
        for failure in FailureKind:
            self._sessions.labels(_outcome(SessionState.FAILED, failure))
        for reason in SuspicionReason:
            self._suspicions.labels(reason.value)
        for refusal in Refusal:
            self._refused.labels(refusal.value)
        for on_copy in ("true", "false"):
            self._resumed.labels(on_copy)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a gauge whose value is read when the metrics are rendered."""
        Gauge(_PREFIX + name, text, registry=self._registry).set_function(read)

    def add_counter(self, name: str, text: str, read: Callable[[], float], **labels: str) -> None:
        """Adds a counter whose value is read when the metrics are rendered."""
        self._registry.register(ReadCounter(_PREFIX + name, text, read, labels))

    def add_info(self, text: str, read: Callable[[], Mapping[str, str]]) -> None:
        """Adds what the gateway is, as labels of a metric whose value is 1."""
        self._registry.register(ReadInfo(_PREFIX.rstrip("_"), text, read))

    def on_first_placed(self, rank: int, num_prompt_tokens: int) -> None:
        """A session's prompt has been sent to a rank for the first time."""
        self.vllm.on_first_placed(rank, num_prompt_tokens)

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

    def on_connection_displaced(self) -> None:
        self._refused.labels("displaced").inc()

    def on_connection_timeout(self) -> None:
        self._timed_out.inc()

    def on_suspicion(self, reason: SuspicionReason, silent_s: float) -> None:
        """`silent_s` since the rank's last message."""
        self._suspicions.labels(reason.value).inc()
        self._detect.observe(silent_s)

    def on_tokens(self, session: StreamSession) -> None:
        """A session that has not ended got tokens."""
        if (gap_s := session.last_gap_s) and (member := session.member) is not None:
            self._observe_gap(member.rank, gap_s)

    def on_session_end(self, session: StreamSession) -> None:
        failure = session.failure.kind if session.failure else None
        self._sessions.labels(_outcome(session.state, failure)).inc()
        self._moves.inc(session.moves)
        if session.home_rank is not None:
            self._streams_resumed.labels("kept" if session.taken_over else "computed_again").inc()
        self._cached.inc(session.cached_tokens)
        self.vllm.on_session_end(session)
        if session.first_token_at is not None:
            endpoint = session.tag.endpoint
            self._ttft.labels(endpoint).observe(session.first_token_at - session.opened_at)
            self._e2e.labels(endpoint).observe(session.last_token_at - session.opened_at)
        for resumption in session.resumptions:
            self._resumed.labels(str(resumption.on_copy).lower()).inc()
            self._resume.observe(resumption.gap_s)
        if len(session.emitted) > 1:
            self._gap.observe(session.longest_gap_s)

    def render(self, form: str) -> tuple[bytes, str]:
        """See `render_metrics`."""
        return render_metrics(self._registry, form)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        name = _PREFIX + name + "_seconds"
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)


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


class ReadInfo(Collector):
    def __init__(self, name: str, text: str, read: Callable[[], Mapping[str, str]]) -> None:
        self._name = name
        self._text = text
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return [InfoMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(self._name, self._text, value=dict(self._read()))


class TotalHistogram(Collector):
    """Of all ranks together."""

    def __init__(self, name: str, text: str, histogram: RankHistogram) -> None:
        self._name = name
        self._text = text
        self._histogram = histogram

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        yield self._histogram.sum_family(self._name, self._text)


def _outcome(state: SessionState, failure: FailureKind | None) -> str:
    return state.value if failure is None else f"failed_{failure.value}"
