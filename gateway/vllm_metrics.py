"""The metrics that vLLM's dashboards and autoscalers read, under vLLM's names and labels: `engine`
is the rank, as a data-parallel rank is there. What a gateway tells is of its own sessions, so that
sums over gateways are right; only the use of KV blocks is the rank's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.rank_histogram import RankHistogram, rank_label
from gateway.session_state import SessionState
from gateway.stream_session import StreamSession
from shared.types import FinishReason
from shared.wire import Load

NO_ENGINE = "none"
"""Of sessions that wait for a rank."""

# vLLM's boundaries, which rules about latencies name, and finer ones for what is fast here.
_TOKEN_S = (
    *(0.005, 0.01, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

_ENDED = {
    SessionState.CANCELLED: "abort",
    SessionState.FAILED: "error",
}
_REASONS = (FinishReason.STOP.value, FinishReason.LENGTH.value, *_ENDED.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGauges:
    """Of one rank, as a gateway sees it. `running` and `waiting` are the gateway's own sessions."""

    running: int
    waiting: int
    kv_usage: float  # share of its KV blocks, 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSources:
    """What is read when the metrics are rendered."""

    model_name: Callable[[], str]
    generated: Callable[[], Mapping[int, int]]  # tokens, by rank
    ranks: Callable[[], Mapping[int, RankGauges]]
    unplaced: Callable[[], int]  # sessions that wait for a rank


class VllmMetrics(Collector):
    """Its methods are called on the event loop."""

    def __init__(self) -> None:
        self.sources = VllmSources(
            model_name=str, generated=dict[int, int], ranks=dict[int, RankGauges], unplaced=int
        )
        self.inter_token = RankHistogram(_TOKEN_S)
        self._first_token = RankHistogram(_FIRST_TOKEN_S)
        self._per_token = RankHistogram(_TOKEN_S)
        self._e2e = RankHistogram(_REQUEST_S)
        self._queue = RankHistogram(_REQUEST_S)
        self._prefill = RankHistogram(_REQUEST_S)
        self._decode = RankHistogram(_REQUEST_S)
        self._inference = RankHistogram(_REQUEST_S)
        self._prompt_size = RankHistogram(_TOKENS)
        self._answer_size = RankHistogram(_TOKENS)
        self._max_tokens = RankHistogram(_TOKENS)
        self._prompt_tokens: Counter[str] = Counter()
        self._queried_tokens: Counter[str] = Counter()
        self._cached_tokens: Counter[str] = Counter()
        self._ended: Counter[tuple[str, str]] = Counter()

    def on_first_placed(self, rank: int, num_prompt_tokens: int) -> None:
        """A session's prompt has been sent to a rank for the first time."""
        self._prompt_tokens[rank_label(rank)] += num_prompt_tokens

    def on_session_end(self, session: StreamSession) -> None:
        rank = session.member.rank if session.member is not None else None
        if rank is None:
            self._ended[NO_ENGINE, _finished_reason(session)] += 1
            return
        label = rank_label(rank)
        self._ended[label, _finished_reason(session)] += 1
        if session.first_token_at is None:
            return
        self._queried_tokens[label] += len(session.prompt)
        self._cached_tokens[label] += session.cached_tokens
        first_token_s = session.first_token_at - session.opened_at
        decode_s = session.last_token_at - session.first_token_at
        queue_s = min(session.queue_s, first_token_s)
        self._first_token.observe(rank, first_token_s)
        self._e2e.observe(rank, first_token_s + decode_s)
        self._queue.observe(rank, queue_s)
        self._prefill.observe(rank, first_token_s - queue_s)
        self._decode.observe(rank, decode_s)
        self._inference.observe(rank, first_token_s - queue_s + decode_s)
        self._prompt_size.observe(rank, len(session.prompt))
        self._answer_size.observe(rank, len(session.emitted))
        self._max_tokens.observe(rank, session.sampling.max_tokens)
        if len(session.emitted) > 1:
            self._per_token.observe(rank, decode_s / (len(session.emitted) - 1))

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        model = {"model_name": self.sources.model_name()}
        # From 0 on: a series that begins with 1 has not increased for who watches it.
        begun = list(dict.fromkeys(map(rank_label, self.sources.ranks())))
        yield from self._gauges(model)
        yield from self._counters(model, begun)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From admission to the first token", self._first_token),
            ("inter_token_latency_seconds", "Between two batches of a stream", self.inter_token),
            ("time_per_output_token_seconds", "Older name of the same", self.inter_token),
            (
                "request_time_per_output_token_seconds",
                "A session's mean time per token after the first",
                self._per_token,
            ),
            ("e2e_request_latency_seconds", "From admission to the last token", self._e2e),
            ("request_queue_time_seconds", "Until a rank began with the prompt", self._queue),
            ("request_prefill_time_seconds", "From then to the first token", self._prefill),
            ("request_decode_time_seconds", "From the first to the last token", self._decode),
            ("request_inference_time_seconds", "Prefill and decode", self._inference),
            ("request_prompt_tokens", "Prompt tokens of a session", self._prompt_size),
            ("request_generation_tokens", "Generated tokens of a session", self._answer_size),
            ("request_max_num_generation_tokens", "The same", self._answer_size),
            ("request_params_max_tokens", "max_tokens of a session", self._max_tokens),
        ):
            yield histogram.family("vllm:" + name, text, label="engine", others=model, begun=begun)

    def _gauges(self, model: Mapping[str, str]) -> Iterable[Metric]:
        labels = [*model, "engine"]
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Sessions of this gateway in a rank's batch", labels=labels
        )
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting",
            "Sessions of this gateway in a rank's queue; engine none: that wait for a rank",
            labels=labels,
        )
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of a rank's KV blocks in use, 0 to 1", labels=labels
        )
        old_usage = GaugeMetricFamily(
            "vllm:gpu_cache_usage_perc", "Older name of the same", labels=labels
        )
        waiting.add_metric([*model.values(), NO_ENGINE], self.sources.unplaced())
        for rank, gauges in self.sources.ranks().items():
            values = [*model.values(), str(rank)]
            running.add_metric(values, gauges.running)
            waiting.add_metric(values, gauges.waiting)
            usage.add_metric(values, gauges.kv_usage)
            old_usage.add_metric(values, gauges.kv_usage)
        return running, waiting, usage, old_usage

    def _counters(self, model: Mapping[str, str], begun: Sequence[str]) -> Iterable[Metric]:
        generated: Counter[str] = Counter()
        for rank, number in self.sources.generated().items():
            generated[rank_label(rank)] += number
        for name, text, counts in (
            ("prompt_tokens", "Prompt tokens, counted when a rank gets them", self._prompt_tokens),
            ("generation_tokens", "Tokens generated", generated),
            ("prefix_cache_queries", "Prompt tokens of ended sessions", self._queried_tokens),
            ("prefix_cache_hits", "Those that a KV cache held", self._cached_tokens),
            ("prompt_tokens_cached", "The same", self._cached_tokens),
            ("gpu_prefix_cache_queries", "Older name of the same", self._queried_tokens),
            ("gpu_prefix_cache_hits", "Older name of the same", self._cached_tokens),
        ):
            family = CounterMetricFamily("vllm:" + name, text, labels=[*model, "engine"])
            for label, count in (dict.fromkeys(begun, 0) | counts).items():
                family.add_metric([*model.values(), label], count)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success",
            "Sessions that ended",
            labels=[*model, "engine", "finished_reason"],
        )
        unseen = {(label, reason): 0 for label in begun for reason in _REASONS}
        for (label, reason), count in (unseen | self._ended).items():
            success.add_metric([*model.values(), label, reason], count)
        yield success


def gauges_of(load: Load | None, own: Collection[StreamSession]) -> RankGauges:
    """`own` are this gateway's sessions on the rank; `load` is the rank's last report, of those of
    all gateways. A session without a token of its attempt waits, if so many wait there at all."""
    if load is None:
        return RankGauges(running=len(own), waiting=0, kv_usage=0.0)
    unbegun = sum(len(session.emitted) == session.tokens_before for session in own)
    waiting = min(unbegun, load.waiting)
    used = load.kv_blocks - load.kv_blocks_free
    return RankGauges(
        running=len(own) - waiting,
        waiting=waiting,
        kv_usage=used / load.kv_blocks if load.kv_blocks else 0.0,
    )


def _finished_reason(session: StreamSession) -> str:
    """As vLLM spells it: stop, length, abort or error."""
    reason = session.finish or FinishReason.STOP
    return _ENDED.get(session.state, reason.value)
